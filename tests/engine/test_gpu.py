"""On a CUDA device: every schedule agrees with the naive one in fp32 and bf16, and the CPU's numbers come out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import interp
from tests.oracle.configs import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PAIRS = interp.PromptPairs(
    [[5, 9, 31, 42, 17, 23], [6, 8, 30, 41, 12]],
    [[5, 9, 33, 40, 17, 22], [6, 8, 35, 41, 13]],
    [20, 21],
    [25, 26],
)
#: bf16 has 8 bits of mantissa: an error of a few units in the last place of the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_neox"])
def test_schedules_agree_on_the_device(family: str, dtype: torch.dtype) -> None:
    """The naive schedule is the reference; the model is not moved and stays in its dtype."""
    hf, tokenizer = tiny(family)
    model = interp.load_model(hf.to("cuda", dtype), tokenizer=tokenizer)
    assert (model.device.type, model.dtype) == ("cuda", dtype)
    plan = interp.grid(["resid_pre", "attn_out", "mlp_out"])
    naive = interp.patch(model, PAIRS, plan, schedule="naive")
    scale = max(1.0, float(np.nanmax(np.abs(naive.values))))
    for schedule in ("rows", "growing", "prefix"):
        other = interp.patch(model, PAIRS, plan, schedule=schedule, max_tokens=64)
        assert float(np.nanmax(np.abs(other.values - naive.values))) <= TOLERANCE[dtype] * scale, schedule
    assert float(np.nanmax(np.abs(naive.values - naive.clean))) > 0.1


def test_the_device_gives_the_numbers_of_the_cpu() -> None:
    """Patching and attribution, fp32."""
    hf, tokenizer = tiny("llama_gqa")
    here = interp.load_model(copy.deepcopy(hf), tokenizer=tokenizer)
    there = interp.load_model(hf.cuda(), tokenizer=tokenizer)
    assert (here.device.type, there.device.type) == ("cpu", "cuda"), "a module stays where it is"
    for run in (interp.patch, interp.attribute):
        one, other = (run(model, PAIRS, interp.heads("z")).values.values for model in (here, there))
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-3)
