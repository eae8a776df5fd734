"""What an audit allows is what rounding moves on the model at hand: no more where little moves, enough where much does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from interp import Model
from interp.audit import _prompt
from interp.audit.parts import compare
from interp.audit.plain import TIMES, plain_run
from interp.audit.runs import check_padding
from interp.models.steady import steady
from tests.families import loaded


def test_rounding_of_the_run_covers_a_forward_in_double_precision(bundled: Model) -> None:
    """The stream of layer 11 reaches 20,000 at the first token; elsewhere it stays near 100, and so does what is allowed."""
    prompt = _prompt(bundled, 6, 0)
    with steady(bundled):
        plain = plain_run(bundled, prompt)
    exact: list[Tensor] = []
    double = type(bundled.hf)(bundled.hf.config)
    double.load_state_dict(bundled.hf.state_dict())
    double.eval().double()
    handles = [
        block.register_forward_pre_hook(lambda _, args: exact.append(args[0].clone())) for block in double.model.layers
    ]
    with torch.no_grad():
        double(input_ids=torch.tensor([prompt]))
    for handle in handles:
        handle.remove()
    for layer, want in enumerate(exact):
        error = (plain.stream[layer, "attention"].double() - want).abs().amax((0, 2))
        noise = plain.noise[layer, "attention"].double()
        assert (error <= TIMES / 2 * noise.clamp(min=1e-6)).all(), layer  # measured: 5 times at most, over all kernels
    massive = plain.stream[12, "attention"].abs().amax((0, 2))
    assert massive[0] > 10_000 and massive[1:].max() < 1_000
    assert TIMES * plain.noise[12, "attention"][1:].max() < 0.01  # 1e-5 of the largest value would be 0.2


@contextmanager
def disturbed(model: Model, layer: int, position: int, size: float) -> Iterator[None]:
    """A model whose rows depend on what else is in the batch: something is added where there is a second row."""

    def add(_: torch.nn.Module, args: tuple) -> tuple:
        if len(args[0]) == 2:
            x = args[0].clone()
            x[1, position] += size
            return (x, *args[1:])
        return args

    handle = model.hf.model.layers[layer].register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize(("size", "fails"), [(0.0, False), (0.02, True)])
def test_a_row_that_depends_on_its_neighbour_fails_beside_an_activation_of_ten_thousands(
    bundled: Model, size: float, fails: bool
) -> None:
    """0.02 was a tenth of what a share of the largest activation allowed."""
    with steady(bundled), disturbed(bundled, 12, -1, size):
        found = list(check_padding(bundled, _prompt(bundled, 9, 0)))
    failed = {finding.layer for finding in found if not finding.ok and finding.kind == "resid_post"}
    assert (11 in failed) == fails and all(layer >= 11 for layer in failed)  # what enters block 12


def test_a_position_is_held_to_its_own_size() -> None:
    want = torch.ones(1, 4, 8)
    want[0, 0] = 20_000.0
    got = want.clone()
    got[0, 2, 3] += 1e-3
    finding = compare("resid_post", "read", 0, got, want)
    assert not finding.ok and finding.error == pytest.approx(1e-3, rel=1e-2)
    got = want.clone()
    got[0, 0] += 0.1
    assert compare("resid_post", "read", 0, got, want).ok
    noise = torch.tensor([0.0, 0.0, 1e-4, 0.0])
    got[0, 2, 3] += 1e-3
    assert compare("resid_post", "read", 0, got, want, noise=noise).ok
    got[0, 2] += 1.0
    assert not compare(
        "resid_post", "read", 0, got, want, noise=noise * 1e6
    ).ok  # whatever rounding does, no more than MOST


def test_nan_and_infinity_are_never_within_what_is_allowed() -> None:
    want = torch.ones(1, 2, 3)
    for bad in (float("nan"), float("inf")):
        got = want.clone()
        got[0, 1, 1] = bad
        assert not compare("z", "read", 0, got, want, noise=torch.full((2,), 1e9)).ok


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gpt_neox", "llama_gqa"])
def test_rounding_is_of_the_model_and_not_of_the_run(family: str) -> None:
    """Measured twice it is the same, and in double precision there is less of it."""
    model = loaded(family)
    prompt = _prompt(model, 9, 0)
    with steady(model):
        one, two = plain_run(model, prompt), plain_run(model, prompt)
    assert all(torch.equal(one.noise[place], two.noise[place]) for place in one.noise)
    assert 0 < float(one.logits_noise) < 1e-3
    double = loaded(family, dtype=torch.float64)
    with steady(double):
        assert float(plain_run(double, prompt).logits_noise) < float(one.logits_noise) / 1e4
