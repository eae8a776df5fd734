"""The audit from afar: right rows pass with few requests, wrong ones are caught, each by the kinds that it is wrong about."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import interp
from interp.audit import _prompt
from interp.audit.afar import audit_from_afar
from interp.errors import InterpError
from interp.findings import AuditReport
from interp.models import loading as loader
from interp.models.families import Family, find_family
from tests.families import EAGER, SUPPORTED, has
from tests.oracle.configs import tiny


def afar(model: interp.Model) -> AuditReport:
    prompts = _prompt(model, 9, 0), _prompt(model, 9, 1)
    return AuditReport(model.name, model.family.name, tuple(audit_from_afar(model, *prompts)))


@pytest.mark.parametrize("family", SUPPORTED)
def test_every_family_passes_from_afar(family: str) -> None:
    hf, tokenizer = tiny(family)
    report = afar(interp.load_model(hf, tokenizer=tokenizer, backend="simulated"))
    assert report.ok, str(report)
    found = {(finding.kind, finding.what) for finding in report.findings}
    for kind in has(family):
        if kind == "pattern" and family in EAGER:  # not with the attention that this one is loaded with
            continue
        assert {(kind, "read"), (kind, "write")} & found, kind
        assert kind in ("embed", "head_out") or {(kind, "read"), (kind, "write"), (kind, "self-patch")} <= found, kind
    proved = {finding.kind for finding in report.findings if finding.what == "write" and not finding.note}
    assert {"resid_pre", "attn_out", "z", "v"} <= proved, "writes that move nothing prove nothing"


def test_a_handful_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    hf, tokenizer = tiny("llama_gqa")
    model = interp.load_model(hf, tokenizer=tokenizer, backend="simulated")
    count = 0
    fetch = type(model.backend).fetch

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return fetch(*args)

    monkeypatch.setattr(type(model.backend), "fetch", counted)
    assert afar(model).ok and count <= 8


def moved(row: Family, **kinds: tuple[str, str]) -> Family:
    """A row whose kinds are found at other places."""
    block = [(path, side, tuple(kind for kind in there if kind not in kinds)) for path, side, there in row.block]
    for kind, (path, side) in kinds.items():
        at = next(place for place, tap in enumerate(block) if tap[:2] == (path, side))
        block[at] = (path, side, (*block[at][2], kind))
    return replace(row, block=tuple(tap for tap in block if tap[2]))


def swapped(row: Family, one: str, other: str) -> Family:
    names = {one: other, other: one}
    taps = ((path, side, tuple(names.get(kind, kind) for kind in there)) for path, side, there in row.block)
    return replace(row, block=tuple(taps))


WRONG: dict[str, tuple[str, Callable[[Family], Family], set[str]]] = {
    "q and k exchanged": ("llama", lambda row: swapped(row, "q", "k"), {"q", "k"}),
    "k and v exchanged": ("llama_gqa", lambda row: swapped(row, "k", "v"), {"k", "v"}),
    "attention and MLP exchanged": ("llama", lambda row: swapped(row, "attn_out", "mlp_out"), {"attn_out", "mlp_out"}),
    "z behind the projection": ("llama", lambda row: moved(row, z=("self_attn.o_proj", "output")), {"z"}),
    "another layout of a fused projection": (
        "gpt2",
        lambda row: replace(row, qkv_layout="interleaved"),
        {"q", "k", "v"},
    ),
    "units before their activation": ("gpt2", lambda row: moved(row, neuron=("mlp.c_fc", "output")), {"neuron"}),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, spoil, kinds = WRONG[name]
    hf, tokenizer = tiny(family)
    row = find_family(hf.config.model_type)
    assert row is not None
    try:
        wrong = spoil(row)
    except StopIteration:
        pytest.fail("the row has no such tap")
    monkeypatch.setattr(loader, "find_family", lambda _: wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = interp.load_model(hf, tokenizer=tokenizer, backend="simulated", check=False)
    try:
        failed = set(afar(model).failed)
    except InterpError:
        return  # no forward pass could follow it
    assert failed & kinds, failed
