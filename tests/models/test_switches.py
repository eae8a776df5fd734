"""A config may ask the forward for other outputs, or for them in another form: experiments give the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import interp
from interp import PromptPairs
from tests.families import oracle_of, words
from tests.oracle.configs import tiny

(BASE,), (SOURCE,) = words(7), words(7, seed=1)
PAIRS = PromptPairs([BASE, BASE[:4]], [SOURCE, SOURCE[:4]], [20, 21], [30, 31])

SWITCHES: dict[str, tuple[str, Any]] = {
    "tuples": ("return_dict", False),
    "hidden states": ("output_hidden_states", True),
    "attentions": ("output_attentions", True),
    "no cache": ("use_cache", False),
    "router logits": ("output_router_logits", True),
}
#: Both ways in which transformers writes a forward, and experts with a loss of their own.
CASES = [
    (family, switch)
    for family, switches in {
        "gpt2": ("tuples", "hidden states", "no cache"),
        "gpt_neo": ("tuples", "hidden states", "attentions", "no cache"),
        "bloom": ("tuples", "hidden states", "attentions", "no cache"),
        "gemma2": ("tuples", "hidden states", "attentions", "no cache"),
        "mixtral": ("tuples", "hidden states", "no cache", "router logits"),
        "qwen3_moe": ("router logits",),
        "gpt_oss": ("attentions", "router logits"),
    }.items()
    for switch in switches
]


def switched(family: str, switch: str, backend: str = "local") -> interp.Model:
    hf, tokenizer = tiny(family)
    setattr(hf.config, *SWITCHES[switch])
    return interp.load_model(hf, tokenizer=tokenizer, backend=backend)


@pytest.mark.parametrize(("family", "switch"), CASES)
def test_a_switch_of_the_config_changes_no_number(family: str, switch: str) -> None:
    model, oracle = switched(family, switch), oracle_of(family)
    assert not model.refused
    effects = interp.patch(model, PAIRS, interp.heads("z", layers=[1]))
    for pair, length in enumerate((7, 4)):
        for head in range(2):
            logits = oracle.patched(BASE[:length], SOURCE[:length], "z", 1, head=head)[-1]
            want = float(logits[20 + pair] - logits[30 + pair])
            assert float(effects.values[0, 0, head, pair]) == pytest.approx(want, abs=1e-4)
    name, value = SWITCHES[switch]
    assert getattr(model.hf.config, name) == value, "the module is as it was"


@pytest.mark.parametrize(("family", "switch"), [("llama", "tuples"), ("mixtral", "router logits")])
def test_a_switch_after_loading_and_in_another_process(family: str, switch: str) -> None:
    hf, tokenizer = tiny(family)
    model = interp.load_model(hf, tokenizer=tokenizer)
    plan, methods = interp.heads("z", layers=[1]), (interp.patch, interp.attribute)
    want = [method(model, PAIRS, plan).values for method in methods]
    setattr(hf.config, *SWITCHES[switch])
    for one in (model, switched(family, switch, "simulated")):
        for method, right in zip(methods, want, strict=True):
            np.testing.assert_allclose(method(one, PAIRS, plan).values, right, atol=1e-4)
    assert model.audit().ok


def test_a_run_that_fails_leaves_the_config_as_it_was() -> None:
    model = switched("llama", "tuples")

    def broken(logits: torch.Tensor, batch: Any) -> torch.Tensor:
        if len(logits) > 2:
            raise RuntimeError("of my own")
        return logits[:, 0]

    with pytest.raises(Exception, match="of my own"):
        interp.patch(model, PAIRS, interp.heads("z"), metric=broken)
    assert model.hf.config.return_dict is False
