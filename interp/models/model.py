"""Loading: a plain HuggingFace model inside an nnsight model, with the facts and taps of its family.

`Model` holds what is known about one model; it never changes the HuggingFace module it is given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import nnsight
import torch

from ..errors import ArchitectureError, AuditError, ModelNotFoundError, SiteError, SiteUnavailableError
from ..pairs import EncodedPairs, PromptPairs
from ..sites import KINDS, KV_KINDS, Site
from .bundled import BUNDLED, ensure_bundled
from .families import FAMILIES, Family, find_family
from .infer import infer_family
from .views import at, matrix

if TYPE_CHECKING:
    from ..audit import AuditReport

#: How transformers says that a folder's architecture is not one that it can load as a language model.
UNKNOWN_ARCHITECTURE = ("not recognize this architecture", "Unrecognized configuration class", "Unrecognized model")


@dataclass(frozen=True)
class Model:
    """A language model that experiments run on. Made by `load_model`.

    `hf` is the unmodified HuggingFace module (on the meta device when the weights live elsewhere), `nn` the nnsight
    model around it, `taps` the plain dictionary of facts that travels with every trace.
    """

    name: str
    hf: Any
    nn: Any
    tokenizer: Any
    family: Family
    taps: dict[str, Any]
    backend: Any
    prefix: str = ""
    revision: str = ""
    note: str = ""
    #: sites refused because an audit showed them to be wrong: {kind: reason}
    refused: dict[str, str] = field(default_factory=dict)

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
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream."""
        return self.family.parallel

    @property
    def device(self) -> torch.device:
        """Where the embedding lies; other layers may lie elsewhere under `device_map`."""
        return next(self.hf.parameters()).device

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
        return pairs.encode(self.tokenizer, prefix_ids=self.prefix_ids, vocab_size=self.vocab_size)

    def heads_of(self, kind: str) -> int:
        """How many heads a kind of site has in each layer: key/value heads for k, v and k_rot."""
        return self.n_kv_heads if kind in KV_KINDS else self.n_heads

    def units_of(self, kind: str) -> int:
        """How many units `mlp_pre` or `neuron` has in each layer."""
        self.require(Site(kind, layer=0))
        assert self.d_mlp is not None
        return self.d_mlp

    def require(self, site: Site) -> Site:
        """The site with its layer counted from 0, if this model has it.

        Raises:
            SiteError: layer, head or unit out of range, with the valid range.
            SiteUnavailableError: the architecture has no such site, with the reason.
            AuditError: the audit refused this kind of site on this model.
        """
        if site.kind in self.refused:
            raise AuditError(f"{site.kind} is refused on {self.name}: {self.refused[site.kind]}")
        if site.kind in self.family.missing:
            raise SiteUnavailableError(
                f"{self.family.name} models have no {site.kind}: {self.family.missing[site.kind]}; they have "
                + ", ".join(kind for kind in KINDS if kind not in self.family.missing)
            )
        if site.kind == "pattern" and self.family.name == "falcon" and self.taps["attention"] != "eager":
            raise SiteUnavailableError(
                f"{self.name} computes attention in one fused call that has no pattern; load it with "
                "attn_implementation='eager'"
            )
        layer = site.layer
        if site.kind not in ("embed", "logits"):
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
        if site.unit is not None and not 0 <= site.unit < self.units_of(site.kind):
            raise SiteError(
                f"site {site}: unit {site.unit}, but {self.name} has units 0 to {self.units_of(site.kind) - 1}"
            )
        return site.at(layer=layer)

    def audit(self, **options: Any) -> AuditReport:
        """Prove every tap of this model, read and write; a site that fails is refused from then on. See `interp.audit`."""
        from ..audit import audit

        return audit(self, **options)

    def __repr__(self) -> str:
        grouped = f" over {self.n_kv_heads} kv heads" if self.n_kv_heads != self.n_heads else ""
        return (
            f"Model({self.name!r}, {self.family.name}: {self.n_layers} layers, d_model {self.d_model}, "
            f"{self.n_heads} heads{grouped}, d_head {self.d_head}, {self.dtype}, {self.device})"
        )


def load_model(
    model: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    backend: Any = "local",
    prefix: str | None = None,
    revision: str | None = None,
    check: bool = True,
    **options: Any,
) -> Model:
    """Load a causal language model as it is, for experiments.

    Args:
        model: a hub id, a local folder, a bundled name (`"smollm2-135m"`), or a HuggingFace module already in memory.
        tokenizer: for a module in memory; left out, prompts must be token ids.
        device: where the weights go; the GPU when there is one and neither this nor `device_map` is given.
        dtype: float type; default fp32 on a CPU, the checkpoint's own elsewhere.
        device_map: passed to accelerate, e.g. `"auto"` to spread layers over several GPUs.
        attn_implementation: `"eager"`, `"sdpa"`, …; default transformers' own choice.
        backend: `"local"`, `"simulated"`, `"ndif"`, or the address of an NDIF deployment of your own.
        prefix: text put before every string prompt; a bundled model brings the one that it needs.
        revision: of a hub model.
        check: run one short forward that checks every read.
        options: passed to `from_pretrained` (`quantization_config`, `trust_remote_code`, …).

    Raises:
        ModelNotFoundError: nothing under that name. ArchitectureError: no row for this architecture and none could be
            inferred. AuditError: the model's own numbers contradict its row.
    """
    from ..engine.backends import Local, make_backend

    name, note = str(model), ""
    hf: Any
    if isinstance(model, torch.nn.Module):
        if not hasattr(model, "config"):
            raise ArchitectureError(
                f"a {type(model).__name__} is no HuggingFace language model: it has no config that says how it is built; "
                "give a transformers model, a hub id, a folder or a bundled name"
            )
        name = getattr(model.config, "name_or_path", "") or type(model).__name__
        hf = model
        tokenizer = tokenizer or _ids_only(int(hf.config.get_text_config().vocab_size))
        source: Any = hf
    else:
        if name in BUNDLED:
            entry = BUNDLED[name]
            prefix = entry.prefix if prefix is None else prefix
            note = entry.quantisation
            source = ensure_bundled(name)
        else:
            source = model
    backend = make_backend(backend, source)
    nn: Any = None
    if not isinstance(model, torch.nn.Module):
        remote = not backend.weights_here
        hf, tokenizer = _from_pretrained(
            source, tokenizer, remote, device, dtype, device_map, attn_implementation, revision, options
        )
        if remote:
            nn, hf = hf, hf._module
    hf.eval()
    row = find_family(hf.config.model_type) or infer_family(hf)
    if row is None:
        known = ", ".join(sorted(kind for family in FAMILIES for kind in family.model_types))
        raise ArchitectureError(
            f"{name} is of architecture {hf.config.model_type!r}, which has no row in interp/models/families.py, and its "
            f"modules resemble none that has. Known: {known}. Add a row (paths of its taps, in forward order), then "
            "run `python -m interp.audit` on the model: it tells which taps are right."
        )
    family = row.for_config(hf.config)
    if nn is None:
        nn = nnsight.TransformersModel(hf, tokenizer=tokenizer, task="text-generation")
    loaded = Model(
        name=name,
        hf=hf,
        nn=nn,
        tokenizer=tokenizer,
        family=family,
        taps=make_taps(hf, family),
        backend=backend,
        prefix=prefix or "",
        revision=revision or getattr(hf.config, "_commit_hash", None) or "",
        note=note,
    )
    if check and isinstance(backend, Local):
        from ..audit import check_reads

        check_reads(loaded)
    return loaded


def make_taps(hf: Any, family: Family) -> dict[str, Any]:
    """The facts of one model as a plain dictionary: sizes read off its modules, paths from its family's row.

    Raises:
        ArchitectureError: a path of the row that this model does not have, or an unsupported variant.
    """
    config = hf.config.get_text_config()
    if getattr(config, "do_layer_norm_before", True) is False:
        raise ArchitectureError(
            f"{config.model_type} with do_layer_norm_before=False normalises the stream itself after each block, "
            "so it has no residual stream to patch; use a pre-norm checkpoint"
        )
    try:
        block = at(hf, family.layers)[0]
        n_layers = len(at(hf, family.layers))
        for path in filter(None, (family.embed, family.norm, family.head)):
            at(hf, path)
        d_vocab = int(at(hf, family.embed).weight.shape[0])
        for path in filter(None, (*family.qkv, family.o, family.mlp, family.down, family.norm1, family.norm2)):
            at(block, path)
    except (AttributeError, IndexError) as error:
        raise ArchitectureError(
            f"{type(hf).__name__} does not have the modules that the row {family.name!r} names: {error}; "
            "correct the row in interp/models/families.py"
        ) from error
    n_heads = int(config.num_attention_heads)
    d_model, width = matrix(at(block, family.o)).shape
    if family.qkv_layout == "separate":
        n_kv = matrix(at(block, family.qkv[1])).shape[0] * n_heads // width
    elif family.qkv_layout == "interleaved":
        n_kv = n_heads
    else:
        total = matrix(at(block, family.qkv[0])).shape[0]
        n_kv = (total - width) * n_heads // (2 * width)
    taps: dict[str, Any] = {item.name: getattr(family, item.name) for item in fields(family)}
    for unneeded in ("model_types", "variants", "note", "missing"):
        del taps[unneeded]
    taps.update(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(n_kv),
        d_model=int(d_model),
        d_head=int(width) // n_heads,
        d_mlp=int(matrix(at(block, family.down)).shape[1]) if family.down else None,
        d_vocab=d_vocab,
        attention=getattr(config, "_attn_implementation", None),
    )
    return taps


def _from_pretrained(
    source: Any,
    tokenizer: Any,
    remote: bool,
    device: Any,
    dtype: Any,
    device_map: Any,
    attn_implementation: str | None,
    revision: str | None,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """The HuggingFace model, or when remote a weightless nnsight model that servers know, and the tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if isinstance(source, os.PathLike) or os.sep in str(source)[:1] or str(source).startswith((".", "~")):
        source = Path(source).expanduser()
        if not (source / "config.json").is_file():
            raise ModelNotFoundError(
                f"{source} is not a model folder (no config.json); give a folder written by save_pretrained, a hub "
                f"id, or a bundled name: {', '.join(BUNDLED)}"
            )
    common = {} if revision is None else {"revision": revision}
    if attn_implementation is not None:
        options = {**options, "attn_implementation": attn_implementation}
    try:  # an unknown architecture is told before its tokenizer or weights are looked for
        asked = {name: options[name] for name in ("trust_remote_code", "gguf_file") if name in options}
        AutoConfig.from_pretrained(source, **common, **asked)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **common)
        if remote:
            if dtype is not None:
                options = {**options, "dtype": dtype}
            nn = nnsight.TransformersModel(
                str(source), task="text-generation", tokenizer=tokenizer, **common, **options
            )
            return nn, tokenizer
        if device is None and device_map is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = torch.float32 if str(device) == "cpu" and "quantization_config" not in options else "auto"
        hf = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **common, **options)
        return hf if device_map is not None else hf.to(device), tokenizer
    except ValueError as error:
        if not any(text in str(error) for text in UNKNOWN_ARCHITECTURE):
            raise
        raise ArchitectureError(
            f"{source} holds no causal language model that transformers knows: {str(error).splitlines()[0]}"
        ) from error
    except OSError as error:
        raise ModelNotFoundError(
            f"no model {str(source)!r}: not a local folder, not a bundled name ({', '.join(BUNDLED)}), and the hub "
            f"could not give it ({str(error).splitlines()[0]})"
        ) from error


def _ids_only(vocab_size: int) -> Any:
    """A stand-in tokenizer for a module given without one; nnsight wants some tokenizer to exist."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<{index}>": index for index in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<0>")), unk_token="<0>", pad_token="<0>"
    )
