"""`Model`: what is known about one model. It never changes the HuggingFace module that it holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch

from ..cached import ForwardPass, TokenIds
from ..edits import Edit
from ..errors import AuditError, PairsError, SiteError, SiteUnavailableError
from ..estimates import Estimate
from ..findings import AuditReport
from ..generated import Generation
from ..order import Order
from ..pairs import EncodedPairs, PromptPairs
from ..prompts import Given, is_ids
from ..sites import KINDS, KV_KINDS, Site
from .families import Family
from .layout import Envoy, Taps, count_of

#: What every method rests on that follows or cuts edges, see `interp.audit.laws`.
EDGE_LAWS = ("senders", "receivers")
GRADIENT_LAWS = ("backward", "edge gradients")


@dataclass(frozen=True)
class Model:
    """A language model that experiments run on. Made by `load_model`.

    `hf` is the unmodified HuggingFace module (on the meta device when the weights live elsewhere), `nn` the nnsight
    model around it, `taps` the plain dictionary of facts that travels with every trace.

    Examples:
        >>> model.tokens("The Eiffel Tower").labels
        ('<|endoftext|>', 'The', ' E', 'iffel', ' Tower')
        >>> model.generate("The Eiffel Tower is in the city of", steps=1).text
        (' Paris',)
    """

    name: str
    hf: Envoy
    nn: Envoy
    tokenizer: Envoy
    family: Family
    taps: Taps
    backend: Any
    prefix: str = ""
    revision: str = ""
    note: str = ""
    #: what audits it, makes tokens with it, runs prompts and estimates: given by `load_model`, since they run the engine
    auditor: Callable[..., AuditReport] | None = None
    generator: Callable[..., Generation] | None = None
    runner: Callable[..., ForwardPass] | None = None
    estimator: Callable[..., Estimate] | None = None
    #: the call of `load_model` that made it, without passwords; nothing for a module in memory
    loaded: Mapping[str, object] = field(default_factory=dict)
    #: sites refused because an audit showed them to be wrong: {kind: reason}
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def provenance(self) -> dict[str, object]:
        """What a record says of the model that it is about."""
        return {"model": self.name, "revision": self.revision, "note": self.note, "family": self.family.name,
                "n_layers": self.n_layers, "prefix": self.prefix, "device": str(self.device),
                "dtype": str(self.dtype).removeprefix("torch.")}  # fmt: skip

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return int(self.taps["n_layers"])

    @property
    def n_heads(self) -> int:
        """Query heads per layer."""
        return int(self.taps["n_heads"])

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads per layer; fewer than `n_heads` in grouped-query models."""
        return int(self.taps["n_kv_heads"])

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.taps["d_model"])

    @property
    def d_head(self) -> int:
        """Width of one head's z."""
        return int(self.taps["d_head"])

    @property
    def d_mlp(self) -> int | None:
        """Hidden units of one MLP, or None in fused-expert MoE blocks."""
        return self.taps["d_mlp"]

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model embeds."""
        return int(self.taps["d_vocab"])

    @property
    def n_positions(self) -> int | None:
        """Tokens that a prompt may have, where each position has an embedding of its own; None where there is no such end."""
        config = self.hf.config.get_text_config()
        limit = getattr(config, self.family.positions, None) if self.family.positions else None
        return None if limit is None else int(limit)

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream."""
        return self.family.parallel

    @property
    def device(self) -> torch.device:
        """Where the embedding lies; other layers may lie elsewhere under `device_map`."""
        return next(self.hf.parameters()).device

    @property
    def accepts(self) -> frozenset[str]:
        """What programs tell the forward beside token ids and masks: positions, and to leave out a router's logits.

        The latter where the config asks for them: their loss counts the rows that came in, not those that joined.
        """
        names = {"position_ids"}
        configs = (self.hf.config, self.hf.config.get_text_config())
        if any(getattr(config, "output_router_logits", False) for config in configs):
            names.add("output_router_logits")
        return frozenset(names & set(inspect.signature(type(self.hf).forward).parameters))

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights."""
        return next(p.dtype for p in self.hf.parameters() if p.is_floating_point())

    @property
    def cfg(self) -> SimpleNamespace:
        """The same facts under the names that TransformerLens users know."""
        return SimpleNamespace(
            model_name=self.name,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            n_key_value_heads=self.n_kv_heads,
            d_model=self.d_model,
            d_head=self.d_head,
            d_mlp=self.d_mlp,
            d_vocab=self.vocab_size,
            device=self.device,
            dtype=self.dtype,
        )

    @cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """Token ids put before every prompt given as a string."""
        if not self.prefix:
            return ()
        return tuple(self.tokenizer(self.prefix, add_special_tokens=False)["input_ids"])

    def encode(self, pairs: PromptPairs) -> EncodedPairs:
        """Token ids of prompt pairs, every answer checked to be one token. Raises PairsError, AnswerError."""
        encoded = pairs.encode(self.tokenizer, prefix_ids=self.prefix_ids, vocab_size=self.vocab_size)
        for side, prompts in (("clean", encoded.clean), ("corrupted", encoded.corrupted or ())):
            for pair, prompt in enumerate(prompts):
                self.check_length(f"{side} of pair {pair}", len(prompt), "give a shorter prompt")
        return encoded

    def check_length(self, what: str, tokens: int, remedy: str) -> None:
        """Refuse a prompt with more tokens than the model has positions for; on a GPU that would end the process's use of it.

        Raises:
            PairsError: it names the prompt, its length, the limit and the remedy.
        """
        if self.n_positions is not None and tokens > self.n_positions:
            raise PairsError(
                f"{what} has {tokens} tokens, but {self.name} has embeddings for {self.n_positions} positions; {remedy}"
            )

    def heads_of(self, kind: str) -> int:
        """How many heads a kind of site has in each layer: key/value heads for k, v and k_rot."""
        return count_of(self.taps, kind)

    @property
    def order(self) -> Order:
        """The order of its senders and receivers."""
        return Order.of(self.taps)

    def units_of(self, kind: str) -> int:
        """How many units `mlp_pre` or `neuron` has in each layer."""
        self.require(Site(kind, layer=0))
        assert self.d_mlp is not None
        return self.d_mlp

    def width_of(self, site: Site) -> int:
        """How many numbers of a site each token has, over all of its heads or units; of a view its parts."""
        if site.view is not None:
            return site.view.parts
        facts = site.facts
        parts = self.heads_of(site.kind) if facts.axis.endswith("head") else 1
        return parts * {"d_model": self.d_model, "d_head": self.d_head, "d_mlp": self.d_mlp or 0}[facts.width]

    def require(self, site: Site) -> Site:
        """The site with its layer counted from 0, if this model has it.

        Raises:
            SiteError: layer, head or unit out of range, with the valid range.
            SiteUnavailableError: the architecture has no such site, with the reason.
            AuditError: the audit refused this kind of site on this model.
        """
        for kind in filter(None, (site.kind, site.facts.through)):
            if kind in self.refused:
                made = "" if kind == site.kind else f", which {site.kind} is made from,"
                raise AuditError(f"{kind}{made} is refused on {self.name}: {self.refused[kind]}")
        tap = site if site.view is None else site.view.tap
        if tap.kind in self.family.missing:
            raise SiteUnavailableError(
                f"{self.family.name} models have no {tap.kind}: {self.family.missing[tap.kind]}; they have "
                + ", ".join(kind for kind in KINDS if kind not in self.family.missing)
            )
        if site.view is not None and tap.facts.view == "whole" and site.view.width not in (None, self.d_model):
            raise SiteError(
                f"view {site.kind!r} is of {site.view.width} numbers, but {tap.kind} of {self.name} has {self.d_model}; "
                "it belongs to another model or site"
            )
        layer = site.layer
        if site.facts.layered:
            if layer is None:
                raise SiteError(f"site {site} needs a layer; this model has layers 0 to {self.n_layers - 1}")
            if not -self.n_layers <= layer < self.n_layers:
                hint = f", did you mean L{layer // 10}?" if layer >= 10 and layer // 10 < self.n_layers else ""
                raise SiteError(
                    f"site {site}: layer {layer}, but {self.name} has layers 0 to {self.n_layers - 1}{hint}"
                )
            layer %= self.n_layers
        if site.head is not None and not 0 <= site.head < self.heads_of(site.kind):
            what = "key/value heads" if site.kind in KV_KINDS else "heads"
            raise SiteError(
                f"site {site}: head {site.head}, but {self.name} has {what} 0 to {self.heads_of(site.kind) - 1}"
            )
        if site.unit is not None:
            count = self.units_of(site.kind) if site.view is None else site.view.parts
            if not 0 <= site.unit < count:
                where = self.name if site.view is None else f"view {site.kind!r}"
                raise SiteError(f"site {site}: unit {site.unit}, but {where} has units 0 to {count - 1}")
        return site.at(layer=layer)

    def rests_on(self, method: str, *names: str) -> None:
        """Refuse a method that rests on kinds of sites or laws of edges which the audit refused on this model.

        Raises:
            AuditError: one of them is refused, with the audit's reason.
        """
        for name in names:
            if name in self.refused:
                what = name if name in KINDS else f"the law of {name}"
                raise AuditError(f"{method} rests on {what}, which is refused on {self.name}: {self.refused[name]}")

    def audit(self, **options: Any) -> AuditReport:
        """Prove every tap of this model, read and write; a site that fails is refused from then on. See `interp.audit`."""
        return self.auditor(self, **options)  # type: ignore[misc]  # made by load_model

    def generate(self, prompt: Given, edits: Sequence[Edit] = (), steps: int = 20, **options: Any) -> Generation:
        """Make tokens with edits that hold while they are made. See `interp.generation.generate`."""
        assert self.generator is not None, "made by load_model"
        return self.generator(self, prompt, edits, steps, **options)

    def run(self, prompt: Given, sites: Given = None, **options: Any) -> ForwardPass:
        """Logits, and a labelled cache of the sites asked for, by our names or TransformerLens's. See `interp.running.run`."""
        assert self.runner is not None, "made by load_model"
        return self.runner(self, prompt, sites, **options)

    def estimate(self, plan: object, pairs: PromptPairs, **options: Envoy) -> Estimate:
        """What patching a plan takes on this model's server; nothing is sent. See `interp.engine.estimate`."""
        return self.estimator(self, plan, pairs, **options)  # type: ignore[misc]  # made by load_model

    def logits(self, prompt: Given, edits: Edit | Sequence[Edit] = ()) -> torch.Tensor:
        """What comes next at every token, `[prompt, position, d_vocab]` fp32; NaN behind a prompt's end. See `run`."""
        return self.run(prompt, edits=edits).logits  # type: ignore[return-value]

    def tokens(self, prompt: Given) -> TokenIds | list[TokenIds]:
        """The token ids of a prompt as every experiment takes it, the prefix included, the text of each as `.labels`.

        Several prompts give a list of them. Raises PairsError: a prompt that is none.
        """
        one = isinstance(prompt, str) or is_ids(prompt)
        encoded = self.encode(PromptPairs([prompt] if one else prompt, answer_positions=-1))
        made = [TokenIds(ids, tuple(labels)) for ids, labels in zip(encoded.clean, encoded.labels, strict=True)]
        return made[0] if one else made

    def __repr__(self) -> str:
        grouped = f" over {self.n_kv_heads} kv heads" if self.n_kv_heads != self.n_heads else ""
        return (
            f"Model({self.name!r}, {self.family.name}: {self.n_layers} layers, d_model {self.d_model}, "
            f"{self.n_heads} heads{grouped}, d_head {self.d_head}, {self.dtype}, {self.device})"
        )
