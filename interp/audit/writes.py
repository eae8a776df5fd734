"""The invariants of writing: a write is proved by what its consumer then did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.reading import entry, read
from ..findings import Finding
from ..models.layout import at, mix_values, part_index
from ..models.model import Model
from ..sites import HEAD_KINDS, KIND, KV_KINDS
from .parts import Parts, compare
from .plain import Plain, logits_from, moved_by
from .reads import rounding_of_pattern


@torch.no_grad()
def check_writes(
    model: Model, prompt: Sequence[int], other: Sequence[int], layer: int, plain: Plain, kinds: Sequence[str]
) -> Iterator[Finding]:
    """Every kind of write at one layer, one grown row each; each is proved by what its consumer then did."""
    last = layer == model.n_layers - 1
    base = read(model, [prompt], [(layer, kind) for kind in kinds], last=layer + 1)["reads"]
    place = len(prompt) // 2
    generator = torch.Generator().manual_seed(layer)
    values: dict[tuple[int, str], Tensor] = {}
    delta: dict[str, Tensor] = {}
    edits: list[tuple[int, ...]] = []
    row_of: dict[str, int] = {}
    for kind in kinds:
        row_of[kind] = 2 + len(row_of)
        if KIND[kind].view == "mixture":
            edits.append(entry(layer, kind, "replace", row_of[kind], source=1))
            continue
        tensor = base[layer, KIND[kind].through or kind]  # a head's output is written as a step of its z
        width = int(part_index(model.taps, kind).max()) + 1 if KIND[kind].axis else 0
        step = torch.randn(width or tensor.shape[-1], generator=generator) * max(float(tensor.float().std()), 1e-2)
        values[layer, kind] = step.to(model.device, model.dtype)[None, None]
        part = model.heads_of(kind) - 1 if kind in HEAD_KINDS else -1  # the first head is alike in most layouts
        edits.append(entry(layer, kind, "add", row_of[kind], column=place, source_column=place, value=0, part=part))
        delta[kind] = values[layer, kind][0, 0]
    reads = [(layer, kind) for kind in (*kinds, "value")] + ([] if last else [(layer + 1, kind) for kind in "qkv"])
    origin = [0] * len(kinds)
    stage = [layer + KIND[kind].stage for kind in kinds]
    order = sorted(range(len(kinds)), key=lambda index: stage[index])  # rows must join in the order of their stage
    rank = {2 + index: 2 + place for place, index in enumerate(order)}
    edits = [(*edit[:3], rank[edit[3]], *edit[4:]) for edit in edits]
    row_of = {kind: rank[row] for kind, row in row_of.items()}
    run = read(
        model,
        [prompt, other],
        reads,
        edits=edits,
        values=values,
        origin=origin,
        stage=[stage[index] for index in order],
        last=None if last else layer + 1,
    )
    trial = Trial(model, layer, place, run, row_of, delta, prompt, plain)
    yield from trial.findings()


class Trial:
    """The rows of one run of writes at one layer, and what each must have done."""

    def __init__(
        self,
        model: Model,
        layer: int,
        place: int,
        run: dict[str, Any],
        row_of: dict[str, int],
        delta: dict[str, Tensor],
        prompt: Sequence[int],
        plain: Plain,
    ) -> None:
        self.model, self.layer, self.place, self.run = model, layer, place, run
        self.prompt, self.plain = prompt, plain
        self.row_of, self.delta, self.parts = row_of, delta, Parts(model, layer)
        index = part_index(model.taps, "z")
        self.head_delta = {
            kind: step[index[-1].to(step.device)] for kind, step in delta.items() if kind in ("z", "head_out")
        }

    def get(self, kind: str, row: str | None, layer: int | None = None) -> Tensor:
        """What was read at a kind of site in the row of a write (None: the base row): `[1, position, …]`."""
        number = 0 if row is None else self.row_of[row]
        return self.run["reads"][self.layer if layer is None else layer, kind][number : number + 1]

    def moved(self, kind: str, row: str) -> Tensor:
        """How far a site moved in the row of a write."""
        return self.get(kind, row) - self.get(kind, None)

    def expect(
        self, kind: str, got: Tensor, want: Tensor, still: Tensor | None = None, beside: Sequence[Tensor] = ()
    ) -> Finding:
        """A finding on a write; where the consumer would do the same without it (`still`), its weights are zero: a note."""
        zero = still is not None and torch.equal(want, still)
        return compare(kind, "write", self.layer, got, want, "weights are zero" if zero else "", beside=beside)

    def at_place(self, step: Tensor, like: Tensor) -> Tensor:
        """A change at the edited position only."""
        full = torch.zeros_like(like)
        full[:, self.place] = step
        return full

    def findings(self) -> Iterator[Finding]:
        """Every write of this layer."""
        family, has = self.model.family, set(self.row_of)
        for kind in ("attn_out", "mlp_out"):
            before = [part for part in ("resid_pre", "attn_out", "mlp_out") if part != kind]
            after = self.get("resid_post", kind)
            if kind == "attn_out" and "resid_mid" in has:  # a sequential MLP answers to the write
                before, after = ["resid_pre"], self.get("resid_mid", kind)
            operands = [self.get(part, kind) for part in before]
            want = sum(operands, self.get(kind, None))
            yield self.expect(kind, after, want + self.at_place(self.delta[kind], want), beside=operands)
        if family.parallel:
            yield self.expect("attn_out", self.get("mlp_out", "attn_out"), self.get("mlp_out", None))
        yield from self._stream("resid_pre", family.norm1)
        if "resid_mid" in has:
            yield from self._stream("resid_mid", family.norm2)
        yield from self._last_stream()
        yield from self._attention(has)
        yield self._mlp_input()
        if "neuron" in has:
            yield from self._units()

    def _stream(self, kind: str, norm: str | None) -> Iterator[Finding]:
        """A write to the stream moves what the next projection reads and what is carried on."""
        moved = self.moved(kind, kind)
        x = self.parts.normed(norm, self.get(kind, None) + self.at_place(self.delta[kind], moved))
        if kind == "resid_pre":
            yield self.expect(kind, self.get("q", kind), self.parts.projected("q", x))
        elif "mlp_pre" in self.row_of:
            pre = at(self.parts.block, self.model.family.mlp_pre or "")(x)[..., : self.model.d_mlp]
            yield self.expect(kind, self.get("mlp_pre", kind), pre)
        operands = [self.get(part, kind) for part in (("attn_out",) if kind == "resid_pre" else ()) + ("mlp_out",)]
        want = sum(operands, self.get(kind, None) + self.at_place(self.delta[kind], moved))
        yield self.expect(kind, self.get("resid_post", kind), want, beside=[self.get(kind, kind), *operands])

    def _mlp_input(self) -> Finding:
        """What an MLP receives moves its first projection, or where experts hide that, what it adds to the stream."""
        before = self.get("mlp_in", None)
        x = before + self.at_place(self.delta["mlp_in"], before)
        if "mlp_pre" in self.row_of:
            module = at(self.parts.block, self.model.family.mlp_pre or "")
            want, still = (module(entered)[..., : self.model.d_mlp] for entered in (x, before))
            return self.expect("mlp_in", self.get("mlp_pre", "mlp_in"), want, still)
        return self.expect("mlp_in", self.get("mlp_out", "mlp_in"), self.parts.through_mlp(x))

    def _last_stream(self) -> Iterator[Finding]:
        kind = "resid_post"
        after = self.get(kind, None) + self.at_place(self.delta[kind], self.get(kind, None))
        if self.layer + 1 < self.model.n_layers:
            following = Parts(self.model, self.layer + 1)
            want = following.projected("q", following.normed(self.model.family.norm1, after))
            yield self.expect(kind, self.get("q", kind, self.layer + 1), want)
        else:
            row = self.row_of[kind]
            logits = self.run["logits"][row : row + 1], logits_from(self.model, self.prompt, after)
            yield compare(kind, "write", self.layer, *logits, noise=self.plain.logits_noise)
            got = self.get(kind, kind)
            yield self.expect(kind, got, after)

    def _attention(self, has: set[str]) -> Iterator[Finding]:
        """q, k, v reach only the heads that use them; z and head_out move attention's output by W_O·Δ."""
        model = self.model
        group = model.n_heads // model.n_kv_heads
        z = self.get("z", None)
        still = self.parts.attn_out(z)
        for kind in self.head_delta:
            step = torch.zeros_like(z)
            step[:, self.place, -1] = self.head_delta[kind]
            yield self.expect(kind, self.get("attn_out", kind), self.parts.attn_out(z + step), still)
        for kind in ("q", "k", "v", "q_rot", "k_rot"):
            if kind not in has:
                continue
            reach = group if kind in KV_KINDS else 1
            moved = self.moved("z", kind)
            joint = self.model.family.joint_qk_norm and kind in "qk"
            outside = moved[:, :, : 0 if joint else model.n_heads - reach]
            yield self.expect(kind, outside, torch.zeros_like(outside), beside=[z])
            before = moved[:, : self.place]
            yield self.expect(kind, before, torch.zeros_like(before), beside=[z])
            if kind == "v":
                if "pattern" in has:
                    step = self.delta[kind][part_index(model.taps, "v")[-1].to(moved.device)]
                    weight = self.get("pattern", None)[:, -reach:, :, self.place].transpose(1, 2)
                    yield self.expect(kind, moved[:, :, -reach:], weight[..., None] * step, beside=[z])
                continue
            if kind.startswith(
                "q"
            ):  # a query acts at its own position alone; where it acts later, the row has q and k exchanged
                later = moved[:, self.place + 1 :]
                for one in (kind, kind.replace("q", "k")):
                    yield self.expect(one, later, torch.zeros_like(later), beside=[z])
            if "pattern" in has:
                value = self._values(kind)
                yield self.expect(kind, value, self._values(None))
                mixed, noise = mix_values(self.get("pattern", kind), value.transpose(1, 2)), self._pattern_noise(kind)
                got = self.get("z", kind)
                yield compare(kind, "write", self.layer, got, mixed, beside=[value.abs().max()[None]], noise=noise)
            inside = float(moved[:, self.place :, -reach:].abs().max())
            other = self.get("k" if kind.startswith("q") else "q", None)
            idle = not float(other.abs().max()) or not float(self.get("v", None).abs().max())
            note = "weights are zero" if idle else "attention is saturated" if self._saturated(kind, reach) else ""
            if not inside and not note and kind in "qk" and self._clipped(kind):
                note = "the model clips the step"
            yield Finding(kind, "write", self.layer, 0.0 if inside or note else float("inf"), 0.0, note)
        if "pattern" in has:
            pattern = self.run["reads"][self.layer, "pattern"][1:2]
            want = mix_values(pattern, self._values(None).transpose(1, 2))
            yield self.expect("pattern", self.get("z", "pattern"), want)
            yield self.expect("pattern", self.get("attn_out", "pattern"), self.parts.attn_out(want), still)

    def _values(self, row: str | None) -> Tensor:
        """v as attention mixes it in a row."""
        value, v = self.run["reads"].get((self.layer, "value")), self.get("v", row)
        return v if value is None or value.shape[1:] != v.shape[1:] else self.get("value", row)

    def _clipped(self, kind: str) -> bool:
        """Whether the model itself does nothing with the step, when a plain hook adds it to the projection's output."""
        block = f"{self.model.family.layers}.{self.layer}."
        step = torch.zeros(1, len(self.prompt), len(self.delta[kind]))
        head = part_index(self.model.taps, kind)[-1]  # the head that was written
        step[:, self.place, head] = self.delta[kind][head].float().cpu()
        path, reader = block + self.model.family.qkv["qkv".index(kind)], block + self.model.family.o
        return not bool(moved_by(self.model, self.prompt, path, step, reader).abs().max())

    def _pattern_noise(self, row: str) -> Tensor | None:
        """How far z moves when the scores that the pattern is recomputed from are rounded."""
        if self.model.family.pattern != "interface":
            return None
        return rounding_of_pattern({kind: self.get(kind, row) for kind in ("q_rot", "k_rot", "v")})

    def _saturated(self, kind: str, reach: int) -> bool:
        """Whether attention is so sharp that a step of a query or key cannot move it."""
        if "pattern" not in self.row_of:
            return False
        pattern = self.get("pattern", None)[:, -reach:].float()
        if kind.startswith("q"):
            return bool((pattern[:, :, self.place].max(-1).values > 1 - 1e-3).all())
        weight = pattern[:, :, self.place :, self.place]
        return bool(((weight < 1e-6) | (weight > 1 - 1e-6)).all())

    def _units(self) -> Iterator[Finding]:
        """Hidden units move the MLP's output by W_down·Δ; `mlp_pre` moves its own hidden units only."""
        neuron = self.get("neuron", None)
        step = self.at_place(self.delta["neuron"], neuron)
        still = self.parts.mlp_out(neuron)
        yield self.expect("neuron", self.get("mlp_out", "neuron"), self.parts.mlp_out(neuron + step), still)
        act = self.parts.activation()
        moved = self.get("neuron", "mlp_pre")
        if act is None:
            yield self.expect("mlp_pre", moved[:, : self.place], neuron[:, : self.place])
            return
        before = act(self.get("mlp_pre", None))
        after = act(self.get("mlp_pre", None) + self.at_place(self.delta["mlp_pre"][: self.model.d_mlp], neuron))
        steady = before.abs() > 1e-2
        want = torch.where(steady, neuron * after / torch.where(steady, before, torch.ones_like(before)), moved)
        yield self.expect("mlp_pre", moved, want)
