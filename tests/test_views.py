"""Views that only this file knows, through public names alone, against plain hooks on the model's own blocks.

Two of them: coordinates of the residual stream in a random orthonormal basis, and a random dictionary with an encoder, ReLU
and decoder. Each is one object; the expected values come from a forward hook that reads and writes the block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp
from interp import PromptPairs, View
from interp.errors import AuditError, CheckpointError, PlanError, SiteError, SiteUnavailableError
from tests.families import allowed, loaded, words
from tests.oracle.configs import tiny

#: A fused projection, grouped queries, norms behind each branch, a parallel block.
FAMILIES = ("gpt2", "llama_gqa", "gemma3", "gpt_neox")
LAYER = 1
#: So far from zero that writing D·new for D·(new − old) would show.
SHIFT = 3.0


@cache
def width(family: str) -> int:
    return loaded(family).d_model


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read_rotated(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    return x @ t["decoder"].to(x.dtype).T + t["shift"][t["part"]]


def read_features(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    return torch.relu((x - t["center"]) @ t["encoder"].T + t["bias"])


@cache
def rotated(family: str) -> View:
    """Every coordinate in a random orthonormal basis, moved away from zero."""
    d = width(family)
    basis = torch.linalg.qr(draw(d, d, seed=1))[0]
    shift = {"shift": torch.full((d,), SHIFT)}
    return View("rotated", "resid_post", d, read_rotated, decoder=basis, tensors=shift, exact=True)


@cache
def dictionary(family: str) -> View:
    """A random dictionary of twice the stream's width, most of whose features are active."""
    d, n = width(family), 2 * width(family)
    tensors = {
        "encoder": draw(n, d, seed=2) / d**0.5,
        "bias": torch.full((n,), SHIFT),
        "center": draw(d, seed=3),
    }
    own = {"decoder": draw(n, d, seed=4) / d**0.5, "tensors": tensors, "by_part": ("encoder", "bias")}
    return View("dictionary", "resid_post", n, read_features, **own)


VIEWS = {"rotated": rotated, "dictionary": dictionary}
both = pytest.mark.parametrize("name", VIEWS)
every = pytest.mark.parametrize("family", FAMILIES)
ways = pytest.mark.parametrize("direction", ["noising", "denoising"])


class Hooked:
    """The plain model, whose block's output is read, and changed, by a forward hook."""

    def __init__(self, family: str, view: View) -> None:
        self.hf = tiny(family)[0].eval()
        self.blocks = next(
            part for part in self.hf.modules() if isinstance(part, torch.nn.ModuleList) and hasattr(part[0], "forward")
        )
        self.tensors = {**view.tensors, "decoder": view.decoder, "part": torch.arange(view.parts)}
        self.view = view

    def coordinates(self, x: Tensor) -> Tensor:
        return self.view.read(x, self.tensors)

    def run(self, ids: Sequence[int], change: Callable[[Tensor], Tensor] | None = None, layer: int = LAYER) -> Any:
        """(logits of the last token, the block's output) of one prompt alone."""
        seen: list[Tensor] = []

        def hook(_: Any, __: Any, out: Any) -> Any:
            x = out[0] if isinstance(out, tuple) else out
            new = x if change is None else change(x)
            seen.append(new)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        handle = self.blocks[layer].register_forward_hook(hook)
        try:
            logits = self.hf(input_ids=torch.tensor([list(ids)])).logits[0, -1]
        finally:
            handle.remove()
        return logits, seen[0]

    def moved(self, units: Sequence[int], new: Tensor, column: int | None = None) -> Callable[[Tensor], Tensor]:
        """x + Σ (new − old)·D over these units, at one position or all."""

        def change(x: Tensor) -> Tensor:
            old = self.coordinates(x)
            step = torch.zeros_like(old)
            step[..., list(units)] = (new - old)[..., list(units)]
            if column is not None:
                keep = torch.zeros(x.shape[1], 1)
                keep[column] = 1
                step = step * keep
            return x + step @ self.tensors["decoder"]

        return change


@cache
def pairs() -> PromptPairs:
    """Two pairs of different lengths, so that the shorter one is padded."""
    clean = words(7, 5)
    corrupted = [[prompt[0], 99 - prompt[1] % 50, *prompt[2:]] for prompt in clean]
    return PromptPairs(clean, corrupted, [20, 21], [40, 41])


def runs(direction: str) -> list[tuple[list[int], list[int]]]:
    """(base, source) of each pair."""
    both_runs = list(zip(pairs().clean, pairs().corrupted, strict=True))
    return both_runs if direction == "noising" else [(source, base) for base, source in both_runs]


def difference(logits: Tensor, pair: int) -> Tensor:
    return logits[20 + pair] - logits[40 + pair]


def check(got: np.ndarray, want: list[float]) -> None:
    np.testing.assert_allclose(got, np.array(want), rtol=0, atol=allowed(torch.tensor(want)))


@both
@every
@ways
@torch.no_grad()
def test_parts_are_patched(name: str, family: str, direction: str) -> None:
    view, units = VIEWS[name](family), (0, 5, 17)
    plan = interp.features(view, units=units, layers=[LAYER], positions=[-1])
    found = interp.patch(loaded(family), pairs(), plan, direction=direction)
    assert found.values.dims == ("component", "layer", "unit", "position", "pair")
    hooked = Hooked(family, view)
    for number, unit in enumerate(units):
        for pair, (base, source) in enumerate(runs(direction)):
            new = hooked.coordinates(hooked.run(source)[1])
            want = difference(hooked.run(base, hooked.moved([unit], new, -1))[0], pair)
            check(found.values.values[0, 0, number, 0, pair], [float(want)])


@both
@every
@pytest.mark.parametrize("schedule", ["naive", "rows", "growing", "prefix"])
@torch.no_grad()
def test_all_parts_together_are_patched_under_every_schedule(name: str, family: str, schedule: str) -> None:
    view = VIEWS[name](family)
    plan = interp.grid([view, "mlp_out"], layers=[LAYER])
    found = interp.patch(loaded(family), pairs(), plan, schedule=schedule, max_tokens=40)
    hooked = Hooked(family, view)
    for pair, (base, source) in enumerate(runs("noising")):
        new = hooked.coordinates(hooked.run(source)[1])
        for column in range(len(base)):
            want = difference(hooked.run(base, hooked.moved(range(view.parts), new, column))[0], pair)
            check(found.values.values[0, 0, column, pair], [float(want)])


@both
@every
@torch.no_grad()
def test_parts_are_ablated(name: str, family: str) -> None:
    """To zero, which is far from where they are, and to their means over the prompts and their positions."""
    view, units = VIEWS[name](family), (1, 9)
    plan = interp.features(view, units=units, layers=[LAYER])
    hooked = Hooked(family, view)
    every_token = torch.cat([hooked.coordinates(hooked.run(prompt)[1])[0] for prompt in pairs().clean])
    for mode, value in (("zero", torch.zeros(view.parts)), ("mean", every_token.mean(0))):
        found = interp.ablate(loaded(family), pairs(), plan, mode)
        for number, unit in enumerate(units):
            want = [
                float(difference(hooked.run(prompt, hooked.moved([unit], value))[0], pair))
                for pair, prompt in enumerate(pairs().clean)
            ]
            check(found.values.values[0, 0, number], want)


@both
@every
@torch.no_grad()
def test_a_mean_by_position_and_constants_of_ones_own(name: str, family: str) -> None:
    view, unit = VIEWS[name](family), 3
    hooked = Hooked(family, view)
    own = words(6, 6, seed=4)
    alike = PromptPairs(own, None, [20, 21], [40, 41])
    plan = interp.features(view, units=[unit], layers=[LAYER])
    mean = torch.stack([hooked.coordinates(hooked.run(prompt)[1])[0] for prompt in own]).mean(0)
    found = interp.ablate(loaded(family), alike, plan, "positional_mean").values.values[0, 0, 0]
    want = [float(difference(hooked.run(p, hooked.moved([unit], mean))[0], pair)) for pair, p in enumerate(own)]
    check(found, want)
    value = draw(view.parts, seed=6)
    found = interp.patch(loaded(family), pairs(), plan.with_edit("set", value)).values.values[0, 0, 0]
    want = [
        float(difference(hooked.run(p, hooked.moved([unit], value))[0], pair)) for pair, p in enumerate(pairs().clean)
    ]
    check(found, want)


@both
@every
@torch.no_grad()
def test_parts_are_collected(name: str, family: str) -> None:
    view, texts = VIEWS[name](family), words(6, 3, 9)
    found, index = interp.collect_activations(loaded(family), texts, [0, LAYER], view, index=True)[:2]
    assert list(found) == [f"L0.{name}", f"L1.{name}"]
    hooked = Hooked(family, view)
    for layer in (0, LAYER):
        want = torch.cat([hooked.coordinates(hooked.run(text, layer=layer)[1])[0] for text in texts])
        got = found[f"L{layer}.{name}"]
        assert got.shape == (18, view.parts)
        assert float((got - want).abs().max()) <= allowed(want)
    assert index[:, 0].tolist() == [0] * 6 + [1] * 3 + [2] * 9


@torch.no_grad()
def test_shards_of_another_view_of_that_name_are_not_gone_on_with(tmp_path: Path) -> None:
    view, model, texts = rotated("gpt2"), loaded("gpt2"), words(6, 3)
    kept = interp.collect_activations(model, texts, LAYER, view, to_disk=tmp_path / "acts")
    assert interp.collect_activations(model, texts, LAYER, view, to_disk=tmp_path / "acts").facts == kept.facts
    turned = {"decoder": view.decoder.flip(0), "tensors": view.tensors}
    other = View("rotated", "resid_post", view.parts, read_rotated, **turned)
    with pytest.raises(CheckpointError, match="views"):
        interp.collect_activations(model, texts, LAYER, other, to_disk=tmp_path / "acts")


def gradients(hooked: Hooked, ids: Sequence[int], pair: int, toward: Sequence[int], alpha: float) -> Tensor:
    """d metric / d block's output `[position, d_model]`, at embeddings a fraction of the way to another prompt's."""
    embed, kept = hooked.hf.get_input_embeddings(), []

    def mix(_: Any, __: Any, out: Tensor) -> Tensor:
        other = torch.nn.functional.embedding(torch.tensor([list(toward)]), embed.weight)
        scale = getattr(embed, "embed_scale", None)  # Gemma's
        other = other if scale is None else other * scale.to(other.dtype)
        return (out + alpha * (other - out)).detach().requires_grad_(True)

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    handle = embed.register_forward_hook(mix)
    try:
        with torch.enable_grad():
            metric = difference(hooked.run(ids, keep)[0], pair)
            return torch.autograd.grad(metric, kept[0])[0][0]
    finally:
        handle.remove()


@both
@every
@ways
@pytest.mark.parametrize(("method", "alphas"), [("atp", (0.0,)), ("ig", (0.25, 0.75))])
def test_parts_are_attributed(name: str, family: str, direction: str, method: str, alphas: tuple[float, ...]) -> None:
    view, units = VIEWS[name](family), (2, 11)
    plan = interp.features(view, units=units, layers=[LAYER], positions=[-2])
    options = {"points": alphas} if method == "ig" else {}
    found = interp.attribute(loaded(family), pairs(), plan, method=method, direction=direction, **options)
    hooked = Hooked(family, view)
    for pair, (base, source) in enumerate(runs(direction)):
        with torch.no_grad():
            logits, x = hooked.run(base)
            change = hooked.coordinates(hooked.run(source)[1])[0, -2] - hooked.coordinates(x)[0, -2]
        slope = torch.stack([gradients(hooked, base, pair, source, alpha) for alpha in alphas]).mean(0)[-2]
        by_part = hooked.tensors["decoder"] @ slope
        want = [float(difference(logits, pair) + change[unit] * by_part[unit]) for unit in units]
        check(found.values.values[0, 0, :, 0, pair], want)


@both
@every
def test_a_path_of_their_own_is_followed(name: str, family: str) -> None:
    """`ig-activations` moves all parts of the view; on a basis of the whole stream that is the stream itself."""
    view, model = VIEWS[name](family), loaded(family)
    plan, options = interp.grid([view], layers=[LAYER], positions=[-1]), {"method": "ig-activations", "steps": 3}
    found = interp.attribute(model, pairs(), plan, **options).values
    assert np.isfinite(found.values).all()
    if name == "rotated":
        stream = interp.attribute(model, pairs(), interp.grid("resid_post", [LAYER], [-1]), **options).values
        np.testing.assert_allclose(found.values, stream.values, atol=1e-4)


@both
@every
@torch.no_grad()
def test_parts_stand_in_sets(name: str, family: str) -> None:
    """Two parts of a view and a head of a later layer, all patched together; the parts are read before either is written."""
    view, model = VIEWS[name](family), loaded(family)
    members = [view.site(LAYER, 3), view.site(LAYER, 8), "L2.H1.z"]
    found = interp.patch(model, pairs(), interp.sets({"all": members, "parts": members[:2]}))
    hooked = Hooked(family, view)
    for pair, (base, source) in enumerate(runs("noising")):
        new = hooked.coordinates(hooked.run(source)[1])
        want = difference(hooked.run(base, hooked.moved([3, 8], new))[0], pair)
        check(found.values.values[1, pair], [float(want)])
    assert float(abs(found.values[0] - found.values[1]).max()) > 1e-4


@both
@every
def test_views_pass_their_audit(name: str, family: str) -> None:
    report = loaded(family).audit(layers=[], views=[VIEWS[name](family)])
    own = [finding for finding in report.findings if finding.kind == name]
    assert report.ok and len(own) == 5 * loaded(family).n_layers and f"\n{name}" in str(report)
    assert any(finding.note for finding in own) == (name == "dictionary")


@both
@every
def test_views_run_on_a_server(name: str, family: str) -> None:
    """A process without `interp` gives the same numbers; of a dictionary only the rows in use travel."""
    view, here = VIEWS[name](family), loaded(family)
    there = interp.load_model(tiny(family)[0], tokenizer=here.tokenizer, backend="simulated")
    plan = interp.features(view, units=[4, 6], layers=[LAYER])
    for method in (
        lambda model: interp.patch(model, pairs(), plan).values.values,
        lambda model: interp.ablate(model, pairs(), plan, "mean").values.values,
        lambda model: interp.attribute(model, pairs(), plan).values.values,
        lambda model: interp.collect_activations(model, pairs(), LAYER, view).numpy(),
    ):
        np.testing.assert_allclose(method(there), method(here), atol=1e-5)
    interp.patch(there, pairs(), plan)
    few = there.backend.sent
    interp.patch(there, pairs(), interp.features(view, layers=[LAYER]))
    assert few < 60_000 and there.backend.sent > few + 2 * view.parts


def write_wrongly(x: Tensor, old: Tensor, new: Tensor, t: dict[str, Tensor]) -> Tensor:
    return x + new @ t["decoder"]


def pull_wrongly(gradient: Tensor, t: dict[str, Tensor]) -> Tensor:
    return 2 * gradient @ t["decoder"].T


def read_all_parts(x: Tensor, t: dict[str, Tensor]) -> Tensor:
    return x @ t["basis"].T


def test_views_that_break_a_law_are_refused_from_then_on() -> None:
    model, d = loaded("gpt2"), width("gpt2")
    basis = torch.linalg.qr(draw(d, d, seed=1))[0]
    common: dict[str, Any] = {"read": read_rotated, "decoder": basis, "tensors": {"shift": torch.full((d,), SHIFT)}}
    wrong = {
        "writes_more": View("writes_more", "resid_post", d, **common, write=write_wrongly),
        "pulls_twice": View("pulls_twice", "resid_post", d, **common, pull=pull_wrongly),
        "overlaps": View(
            "overlaps", "resid_post", d, read_rotated, decoder=draw(d, d, seed=8), tensors=common["tensors"], exact=True
        ),
    }
    try:
        for name, view in wrong.items():
            report = model.audit(layers=[], views=[view])
            assert set(report.failed) == {name}
            with pytest.raises(AuditError, match=rf"{name} is refused on .*the audit says: law at layer"):
                interp.patch(model, pairs(), interp.features(view, units=[0], layers=[1]))
        crowd = View("crowd", "resid_post", d, read_all_parts, decoder=basis, tensors={"basis": basis})
        with pytest.raises(AuditError, match="view 'crowd'"):
            model.audit(layers=[], views=[crowd])
    finally:
        model.refused.clear()


def test_what_is_no_view_says_so() -> None:
    model, view, basis = loaded("gpt2"), rotated("gpt2"), torch.eye(width("gpt2"))
    for options, message in (
        ({"name": "resid_post"}, "cannot be named 'resid_post'"),
        ({"at": "pattern"}, "has no tensor of its own; take e.g. 'resid_post'"),
        ({"at": "L1.H0.z"}, "a part of a tensor"),
        ({"decoder": None}, r"needs a decoder \[part, feature\], or write= and pull="),
        ({"parts": 3}, r"decoder must have 3 rows, one for each part, not \[32, 32\]"),
        ({"by_part": ["missing"]}, "missing must have 32 rows"),
        ({"tensors": {"part": basis}}, "the names 'part' and 'decoder' are taken"),
    ):
        asked: dict[str, Any] = {"name": "own", "at": "resid_post", "parts": 32, "read": read_rotated, "decoder": basis}
        with pytest.raises(PlanError, match=message):
            View(**{**asked, **options})
    with pytest.raises(SiteError, match="unit 32, but view 'rotated' has units 0 to 31"):
        interp.patch(model, pairs(), interp.features(view, units=[32]))
    with pytest.raises(PlanError, match="is one of layer 1, not of layer 0"):
        View("own", "L1.resid_post", 32, read_rotated, decoder=basis).site(0)
    with pytest.raises(SiteUnavailableError, match="no resid_mid"):
        interp.patch(
            loaded("gpt_neox"),
            pairs(),
            interp.grid(
                [View("own", "resid_mid", width("gpt_neox"), read_rotated, decoder=torch.eye(width("gpt_neox")))]
            ),
        )
    other = View("rotated", "resid_post", 32, read_rotated, decoder=basis, tensors=view.tensors)
    with pytest.raises(PlanError, match="two views of one plan are named 'rotated'"):
        interp.patch(model, pairs(), interp.sets({"a": [view.site(0, 1)], "b": [other.site(1, 2)]}))
    with pytest.raises(PlanError, match="features was given a str"):
        interp.features("neuron")  # type: ignore[arg-type]
