"""The reference: every patch a run of its own on a HuggingFace model, with PyTorch hooks and nothing else.

Runs of one prompt may be rows of one forward pass (`run_rows`): each row is written on its own, and
`test_rows_of_a_batch_are_runs_one_at_a_time` holds them to passes one at a time.

Activations are those of one unpadded prompt: [position, d_model]; [position, head, d_head] for q, k, v,
q_rot, k_rot, z; [position, head, d_model] for head_out; [head, query, key] for pattern; [position, d_mlp] for
mlp_pre and neuron.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .attention import dot_products
from .names import columns, kv_heads, names_of, output_matrix

KINDS = (
    "embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "q_rot", "k_rot",
    "z", "head_out", "pattern", "mlp_in", "mlp_pre", "neuron",
)  # fmt: skip
#: Kinds that are taken from the dot product itself, which only eager attention spells out.
DOT_PRODUCT_KINDS = ("q_rot", "k_rot", "pattern")
#: How many rows `Oracle.run_all` puts into one forward pass at most.
ROWS = 128


@dataclass(frozen=True)
class Patch:
    """One write. `value` is what `Oracle.read` gives for the site, or anything that broadcasts to it.

    positions: rows to write (queries, for a pattern), counted from 0 or from the end; None is all of them.
    op: "replace", "add" or "zero".
    """

    kind: str
    layer: int = 0
    value: Tensor | float = 0.0
    positions: tuple[int, ...] | None = None
    head: int | None = None
    unit: int | None = None
    op: str = "replace"

    def apply(self, old: Tensor) -> Tensor:
        """`old` with the patch written in; positions are the first axis."""
        value = torch.as_tensor(self.value, dtype=old.dtype)
        if self.kind == "pattern" and value.ndim == 3:
            value = value.transpose(0, 1)
        new = {"replace": value, "add": old + value, "zero": torch.zeros_like(old)}[self.op]
        here = torch.ones(old.shape, dtype=torch.bool)
        if self.positions is not None:
            rows = torch.zeros(len(old), dtype=torch.bool)
            rows[list(self.positions)] = True
            here &= rows.view(-1, *[1] * (old.ndim - 1))
        if self.head is not None:
            here &= (torch.arange(old.shape[1]) == self.head).view(1, -1, *[1] * (old.ndim - 2))
        if self.unit is not None:
            here &= torch.arange(old.shape[-1]) == self.unit
        return torch.where(here, new, old)


class Oracle:
    """Reads and patches activations of a causal language model, one prompt at a time and without padding.

    The model is copied, so that nothing else that is done to it touches the oracle (`copy_model=False`: hooks
    are put on the model itself and taken off again).
    """

    def __init__(self, hf_model: Any, copy_model: bool = True) -> None:
        self.model = copy.deepcopy(hf_model).eval() if copy_model else hf_model
        self.config = self.model.config.get_text_config()
        self.names = names_of(self.model.config)
        self.blocks = self.model.get_submodule(self.names.blocks)
        self.n_layers = len(self.blocks)
        self.n_heads: int = self.config.num_attention_heads
        self.n_kv_heads = kv_heads(self.config)
        self.d_head = output_matrix(self.part(0, "o"), self.n_heads).shape[1]
        #: What the block multiplies an attention or MLP output with before it adds it (Granite).
        self.scale: float = getattr(self.config, "residual_multiplier", 1.0)

    def part(self, layer: int, name: str) -> Any:
        """A module of a block by its field in `Names`."""
        return self.blocks[layer].get_submodule(getattr(self.names, name))

    def run(self, ids: Sequence[int], patches: Iterable[Patch] = ()) -> Tensor:
        """Logits [position, d_vocab] in fp32 of one prompt, with the patches written."""
        return self.run_rows(ids, [patches])[0]

    def run_rows(self, ids: Sequence[int], rows: Sequence[Iterable[Patch]]) -> Tensor:
        """Logits [row, position, d_vocab] of as many runs of one prompt, each with its own patches."""
        return self._forward(ids, [list(patches) for patches in rows], {})

    def run_all(self, runs: Iterable[tuple[Sequence[int], Iterable[Patch]]]) -> list[Tensor]:
        """`run` of each (prompt, patches), in their order; those of one prompt are rows of few forward passes."""
        runs = [(tuple(ids), list(patches)) for ids, patches in runs]
        alike: dict[tuple[tuple[int, ...], bool], list[int]] = {}
        for number, (ids, patches) in enumerate(runs):
            eager = any(patch.kind in DOT_PRODUCT_KINDS for patch in patches)
            alike.setdefault((ids, eager), []).append(number)
        found: dict[int, Tensor] = {}
        for (ids, _), numbers in alike.items():
            for start in range(0, len(numbers), ROWS):
                some = numbers[start : start + ROWS]
                found |= dict(zip(some, self.run_rows(ids, [runs[number][1] for number in some]), strict=True))
        return [found[number] for number in range(len(runs))]

    def read(self, ids: Sequence[int], kind: str, layer: int = 0, patches: Iterable[Patch] = ()) -> Tensor:
        """The activation at a site in the run of `ids` (with other patches written, where given).

        Raises:
            LookupError: the architecture has no such site.
        """
        return self.reads(ids, [(kind, layer)], patches)[kind, layer]

    def reads(
        self, ids: Sequence[int], sites: Iterable[tuple[str, int]], patches: Iterable[Patch] = ()
    ) -> dict[tuple[str, int], Tensor]:
        """What `read` gives for several (kind, layer), in one run."""
        return {site: rows[0] for site, rows in self.reads_rows(ids, sites, [patches]).items()}

    def reads_rows(
        self, ids: Sequence[int], sites: Iterable[tuple[str, int]], rows: Sequence[Iterable[Patch]]
    ) -> dict[tuple[str, int], Tensor]:
        """The same of as many runs of one prompt, each with its own patches: the row is the first axis."""
        seen = {site: torch.empty(0) for site in sites}
        self._forward(ids, [list(patches) for patches in rows], seen)
        return {site: value.transpose(1, 2) if site[0] == "pattern" else value for site, value in seen.items()}

    def patched(
        self,
        ids: Sequence[int],
        source_ids: Sequence[int] | None,
        kind: str,
        layer: int = 0,
        positions: Sequence[int] | None = None,
        head: int | None = None,
        unit: int | None = None,
        op: str = "replace",
        value: Tensor | float | None = None,
        source_positions: Sequence[int] | None = None,
    ) -> Tensor:
        """Logits of the base prompt `ids` with one site taken from the source's run or from `value`."""
        if value is None and op != "zero":
            assert source_ids is not None, "a source prompt or a value is needed"
            value = self.read(source_ids, kind, layer)
            if source_positions is not None:  # prompts of different lengths: these rows go to `positions`
                assert positions is not None and kind != "pattern"
                rows_of_base = self.read(ids, kind, layer)
                rows_of_base[list(positions)] = value[list(source_positions)]
                value = rows_of_base
        rows = None if positions is None else tuple(positions)
        return self.run(ids, [Patch(kind, layer, 0.0 if value is None else value, rows, head, unit, op)])

    def sweep(
        self,
        clean_ids: Sequence[int],
        corrupted_ids: Sequence[int],
        kind: str,
        metric: Callable[[Tensor], float],
        direction: str = "noising",
        over: str = "position",
        layers: Sequence[int] | None = None,
    ) -> Tensor:
        """The naive loop, one forward per cell: the metric [layer, cell] over positions, heads or units."""
        base, source = (clean_ids, corrupted_ids) if direction == "noising" else (corrupted_ids, clean_ids)
        rows = []
        for layer in range(self.n_layers) if layers is None else layers:
            value = self.read(source, kind, layer)
            axis = {"position": 0, "head": 0 if kind == "pattern" else 1, "unit": -1}[over]
            row = []
            for i in range(value.shape[axis]):
                where = (i,) if over == "position" else None
                head, unit = (i if over == "head" else None), (i if over == "unit" else None)
                row.append(metric(self.run(base, [Patch(kind, layer, value, where, head, unit)])))
            rows.append(row)
        return torch.tensor(rows)

    @torch.no_grad()
    def _forward(self, ids: Sequence[int], rows: list[list[Patch]], seen: dict[tuple[str, int], Tensor]) -> Tensor:
        """Run a prompt once per row, every row's patches written; keys of `seen` get what they hold after the writes."""
        writes: dict[tuple[str, int], list[tuple[int, Patch]]] = {}
        for row, patches in enumerate(rows):
            for patch in patches:
                writes.setdefault((patch.kind, patch.layer), []).append((row, patch))
        sites = set(writes) | set(seen)
        with ExitStack() as stack:

            def rewrite(kind: str, layer: int, old: Tensor) -> Tensor:
                new = list(old)
                for row, patch in writes.get((kind, layer), ()):
                    new[row] = patch.apply(new[row])
                if (kind, layer) in seen:
                    seen[kind, layer] = torch.stack(new)
                return torch.stack(new)  # of its own: later modules may write in place

            if any(kind in DOT_PRODUCT_KINDS for kind, _ in sites):
                here = {site: partial(rewrite, *site) for site in sites if site[0] in DOT_PRODUCT_KINDS}
                stack.enter_context(dot_products(self, here, len(rows)))
            # the stream first: where no norm stands before an MLP, its input is the stream's own tensor
            for kind, layer in sorted(sites, key=lambda site: (site[0] != "resid_mid", site)):
                if kind not in DOT_PRODUCT_KINDS:
                    self._hook(stack, kind, layer, partial(rewrite, kind, layer), len(rows))
            logits = self.model(torch.tensor([list(ids)] * len(rows), device=self.model.device), use_cache=False).logits
        return logits.float()

    def _hook(self, stack: ExitStack, kind: str, layer: int, change: Callable[[Tensor], Tensor], rows: int = 1) -> None:
        """Put one site's hook on the model; `change` sees the activation of a batch, [row, position, …]."""
        names = self.names

        def apart(t: Tensor, *shape: int) -> Tensor:
            """[row, position, …], also where the module has put all rows' positions in one axis (OPT)."""
            return t.reshape(rows, -1, *(shape or t.shape[-1:]))

        if kind in ("embed", "resid_pre", "resid_post"):
            module = self.model.get_input_embeddings() if kind == "embed" else self.blocks[layer]
            self._edit(stack, module, "in" if kind == "resid_pre" else "out", change)
        elif kind == "resid_mid":
            if names.parallel:
                raise LookupError(f"no resid_mid in {self.config.model_type}: attention and MLP are parallel")
            # the norm's input is also the residual: a write in place reaches both
            module = self.part(layer, "mid")
            self._edit(stack, module, "in", lambda t: t.copy_(change(apart(t).clone()).view(t.shape)))
        elif kind in ("attn_out", "mlp_out"):
            module, scale = self.part(layer, kind), self.scale
            self._edit(stack, module, "out", lambda t: (change(apart(t) * scale) / scale).view(t.shape))
        elif kind in ("q", "k", "v"):
            index = columns(names, kind, self.n_heads, self.n_kv_heads, self.d_head)

            def write(t: Tensor) -> Tensor:
                new = apart(t).clone()
                new[..., index] = change(new[..., index])
                return new.view(t.shape)

            self._edit(stack, self.part(layer, "qkv" if names.qkv else kind), "out", write)
        elif kind == "z":
            shape = (self.n_heads, self.d_head)
            self._edit(stack, self.part(layer, "o"), "in", lambda t: change(apart(t, *shape)).reshape(t.shape))
        elif kind == "head_out":
            matrix = output_matrix(self.part(layer, "o"), self.n_heads)

            def add(t: Tensor, z: Tensor) -> Tensor:
                old = torch.einsum("rphd,hdm->rphm", apart(z, self.n_heads, self.d_head), matrix)
                return t + (change(old) - old).sum(2)

            handle = self.part(layer, "o").register_forward_hook(lambda _, args, output: add(output, args[0]))
            stack.callback(handle.remove)
        elif kind == "mlp_in":  # what the MLP reads, after its norm
            self._edit(stack, self.part(layer, "mlp"), "in", lambda t: change(apart(t)).view(t.shape))
        elif kind in ("mlp_pre", "neuron"):
            if not names.down:
                raise LookupError(f"no {kind} in {self.config.model_type}: its experts are fused")
            module = self.part(layer, "act" if kind == "mlp_pre" else "down")
            self._edit(stack, module, "in", lambda t: change(apart(t)).view(t.shape))
        else:
            raise LookupError(f"no kind of site {kind!r}; the kinds are {KINDS}")

    @staticmethod
    def _edit(stack: ExitStack, module: nn.Module, side: str, change: Callable[[Tensor], Tensor]) -> None:
        """Replace a module's first input, or its output (the first of a tuple), by `change` of it."""

        def before(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if args:
                return (change(args[0]), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

        def after(_: nn.Module, args: tuple, output: Any) -> Any:
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

        if side == "in":
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        else:
            stack.callback(module.register_forward_hook(after).remove)


def logit_diff(right: int, wrong: int, position: int = -1) -> Callable[[Tensor], float]:
    """A metric for `Oracle.sweep`: logit of `right` minus logit of `wrong` at one position."""
    return lambda logits: float(logits[position, right] - logits[position, wrong])
