"""What a configuration decides within an architecture: every combination loads and passes its audit, or is refused."""

from __future__ import annotations

import warnings
from itertools import product
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import interp
from interp.errors import ArchitectureError, AuditError
from tests.families import words
from tests.oracle.configs import FAMILIES, tiny, widen

_FALCON = {**FAMILIES["falcon"][1], "num_hidden_layers": 1}


def falcon(**options: Any) -> Any:
    config = AutoConfig.for_model("falcon", **{**_FALCON, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    widen(model)
    return model.eval()


def runs(model: Any) -> bool:
    """Whether transformers' own forward can run it."""
    try:
        model(torch.tensor(words(5)))
    except (AttributeError, RuntimeError, UnboundLocalError):
        return False
    return True


@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("new", [False, True])
def test_every_falcon_that_runs_is_right_and_the_others_are_told_why(new: bool, alibi: bool) -> None:
    seen = {True: 0, False: 0}
    for parallel, multi_query, norms, kv in product((True, False), (True, False), (None, 1, 2), (None, 2)):
        options = {"parallel_attn": parallel, "multi_query": multi_query, "num_ln_in_parallel_attn": norms}
        options |= {"num_kv_heads": kv, "new_decoder_architecture": new, "alibi": alibi, "bias": bool(kv)}
        model = falcon(**options)
        works = runs(model)
        seen[works] += 1
        if not works:
            with pytest.raises((ArchitectureError, AuditError)) as caught:
                interp.load_model(model)
            unbuilt = not parallel if new else parallel and norms == 2
            assert ("cannot be used: the forward of this variant asks for modules" in str(caught.value)) == unbuilt
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = interp.load_model(model)
        report = loaded.audit()
        assert report.ok, (options, str(report))
        assert loaded.n_kv_heads == ((kv or 4) if new else 1 if multi_query else 4), options
        assert loaded.parallel == (new or parallel) and "pattern" not in loaded.family.missing
    assert all(seen.values())


@pytest.mark.parametrize(
    ("family", "named", "joint"),
    [
        ("olmoe", "olmoe", True),
        ("olmo2", "olmo2", True),
        ("olmo2", "olmo_new", True),
        ("exaone4", "exaone_new", False),
        ("qwen3", "qwen_new", False),
    ],
)
def test_queries_that_are_normalised_over_all_heads_are_known(family: str, named: str, joint: bool) -> None:
    """A write to one head's q or k then moves the others' through the norm, and no head's where each has its own."""
    model, _ = tiny(family)
    model.config.model_type = named
    loaded = interp.load_model(model)
    assert loaded.family.joint_qk_norm == joint
    report = loaded.audit()
    assert report.ok, str(report)
