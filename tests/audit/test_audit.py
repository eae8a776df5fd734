"""The audit passes on every family, fails on every wrong row, and what it fails is refused afterwards."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

import interp
from interp import Model, PromptPairs, Site
from interp.audit.__main__ import main
from interp.errors import ArchitectureError, AuditError, InterpError
from interp.models import loading as loader
from interp.models.families import FAMILIES, Family, find_family
from interp.sites import HEAD_KINDS, UNIT_KINDS
from tests.families import EAGER, SUPPORTED, count_forwards, has, loaded
from tests.oracle.configs import tiny

PAIRS = PromptPairs([[5, 17, 40, 9, 33, 21]], [[5, 52, 40, 9, 12, 21]], [20], [30])


# --- right rows --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "attention"), [(f, None) for f in SUPPORTED] + [(f, "sdpa") for f in EAGER] + [("gpt2", "eager")]
)
def test_every_family_passes_with_every_site_read_and_written_at_every_layer(
    family: str, attention: str | None
) -> None:
    model = loaded(family, attention)
    report = model.audit()
    assert report.ok and not report.failed and not model.refused, str(report)
    found = {(finding.kind, finding.what, finding.layer) for finding in report.findings}
    kinds = [kind for kind in has(family) if not (attention == "sdpa" and kind == "pattern")]
    for kind in kinds:
        for layer in [0] if kind == "embed" else range(model.n_layers):
            assert {(kind, "read", layer), (kind, "write", layer)} <= found, (kind, layer)
        assert kind == "embed" or (kind, "self-patch", model.n_layers) in found
    assert ("logits", "read", model.n_layers) in found and ("logits", "padding", model.n_layers) in found
    assert str(report).splitlines()[0] == f"audit of {model.name} ({model.family.name})"
    assert str(report).endswith("all passed")


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.bfloat16) for family in ("gpt2", "llama_gqa", "gemma2", "bloom", "gpt_oss")]
    + [(family, torch.float64) for family in ("gpt2", "llama_gqa")],
)
def test_other_float_types_pass_too(family: str, dtype: torch.dtype) -> None:
    model = loaded(family, dtype=dtype)
    report = model.audit()
    assert report.ok, str(report)
    assert {finding.tolerance for finding in report.findings if finding.kind == "z"} != {0.0}


def test_every_row_is_of_a_family_that_is_tested() -> None:
    tested = {loaded(family).family.name for family in SUPPORTED}
    assert tested == {family.name for family in FAMILIES}


@pytest.mark.slow
def test_the_real_model_passes_at_every_layer(bundled: Model) -> None:
    report = bundled.audit()
    assert report.ok, str(report)
    assert {finding.layer for finding in report.findings if finding.what == "write"} == set(range(30))


def test_the_real_model_passes_at_its_ends(bundled: Model) -> None:
    """All reads, and the writes of the first and the last layer."""
    report = bundled.audit(layers=[0, 29], length=6)
    assert report.ok and not bundled.refused, str(report)
    assert {finding.layer for finding in report.findings if finding.what == "read"} >= set(range(30))


# --- wrong rows --------------------------------------------------------------------------------------------


def retap(row: Family, kind: str, path: str | None = None, side: str | None = None) -> Family:
    """The row with one kind of site looked for elsewhere."""
    taps = []
    for where, at, kinds in row.block:
        others = tuple(one for one in kinds if one != kind)
        taps += [(where, at, others)] if others else []
        taps += [(path or where, side or at, (kind,))] if kind in kinds else []
    return replace(row, block=tuple(taps))


def swap(row: Family, a: str, b: str) -> Family:
    """The row with two kinds of sites mistaken for one another, in its taps and in its projections."""
    other = {a: b, b: a}
    taps = tuple((path, side, tuple(other.get(kind, kind) for kind in kinds)) for path, side, kinds in row.block)
    return replace(row, block=taps, qkv=tuple(row.qkv["qkv".index(other.get(kind, kind))] for kind in "qkv"))


def swap_taps(row: Family, a: str, b: str) -> Family:
    return replace(swap(row, a, b), qkv=row.qkv)


def as_row(name: str) -> Callable[[Family], Family]:
    row = find_family(name)
    assert row is not None
    return lambda _: replace(row, variants=())


Change = Callable[[Family], Family]
#: What is wrong: (family, the wrong row, kinds of sites that the full audit must refuse, those that loading must).
WRONG: dict[str, tuple[str, Change, set[str], set[str]]] = {
    "k and v tapped crosswise": ("llama_gqa", lambda r: swap_taps(r, "k", "v"), {"k", "v"}, {"k", "v"}),
    "k taken for v": ("llama", lambda r: swap(r, "k", "v"), {"k", "v"}, {"v"}),
    "q taken for k": ("llama", lambda r: swap(r, "q", "k"), {"q", "k"}, set()),
    "q taken for k, no rotation": ("opt", lambda r: swap(r, "q", "k"), {"q", "k"}, set()),
    "q taken for k, windows": ("gpt_neo", lambda r: swap(r, "q", "k"), {"q", "k"}, set()),
    "q of another module": ("llama", lambda r: retap(r, "q", "input_layernorm"), {"q"}, {"q"}),
    "fused and split, not by head": ("gpt_neox", lambda r: replace(r, qkv_layout="split"), {"q", "k", "v"}, {"v"}),
    "fused by head, not split": ("gpt2", lambda r: replace(r, qkv_layout="interleaved"), {"q", "k", "v"}, {"v"}),
    "fused by group, not split": ("phi3", lambda r: replace(r, qkv_layout="grouped"), {"q", "k", "v"}, {"v"}),
    "split, not by group": ("falcon_new", lambda r: replace(r, qkv_layout="split"), {"q", "k", "v"}, {"v"}),
    "split, not by head, alibi": ("bloom", lambda r: replace(r, qkv_layout="split"), {"q", "k", "v"}, {"v"}),
    "split, no pattern to see it": ("falcon_new:sdpa", lambda r: replace(r, qkv_layout="split"), {"q", "k"}, set()),
    "q and k at the dot product, one late": ("gptj", lambda r: replace(r, core_first=1), {"q_rot", "k_rot"}, set()),
    "norm before attention": (
        "llama",
        lambda r: replace(r, norm1="post_attention_layernorm"),
        {"resid_pre"},
        {"q", "k"},
    ),
    "no norm before attention": ("llama", lambda r: replace(r, norm1=None), {"resid_pre", "q"}, {"q", "k", "v"}),
    "norm before the MLP": ("llama", lambda r: replace(r, norm2="input_layernorm"), {"resid_mid"}, set()),
    "attn_out before its norm": (
        "gemma2",
        lambda r: retap(r, "attn_out", "self_attn.o_proj"),
        {"attn_out"},
        {"attn_out"},
    ),
    "mlp_out before its norm": ("gemma2", lambda r: retap(r, "mlp_out", "mlp"), {"mlp_out"}, {"mlp_out"}),
    "attn_out before its norm, no pre-norm": (
        "olmo2",
        lambda r: retap(r, "attn_out", "self_attn.o_proj"),
        {"attn_out"},
        {"attn_out"},
    ),
    "no norms behind": ("gemma3", as_row("llama"), {"attn_out", "mlp_out"}, {"attn_out", "mlp_out"}),
    "no norm behind attention": ("gemma2", lambda r: replace(r, post_attn=None), {"z", "head_out"}, {"z", "head_out"}),
    "no norm behind the MLP": ("gemma2", lambda r: replace(r, post_mlp=None), {"neuron"}, {"neuron"}),
    "an MLP that adds the residual itself": ("bloom", lambda r: retap(r, "mlp_out", "mlp"), {"mlp_out"}, {"mlp_out"}),
    "attention that adds the residual itself": (
        "bloom",
        lambda r: retap(r, "attn_out", "self_attention"),
        {"attn_out"},
        {"attn_out"},
    ),
    "resid_mid behind the norm": ("llama", lambda r: retap(r, "resid_mid", "mlp"), {"resid_mid"}, {"resid_mid"}),
    "a stream between parallel parts": ("gpt_neox", as_row("gpt_neox"), {"resid_mid", "attn_out"}, {"resid_mid"}),
    "parts in sequence taken for parallel": (
        "gpt_neox_sequential",
        lambda r: loaded("gpt_neox").family,
        {"attn_out"},
        set(),
    ),
    "hidden units before the activation": (
        "gpt2",
        lambda r: retap(r, "neuron", "mlp.c_fc", "output"),
        {"neuron"},
        {"neuron"},
    ),
    "one factor of the hidden units": (
        "llama",
        lambda r: retap(r, "neuron", "mlp.gate_proj", "output"),
        {"neuron"},
        {"neuron"},
    ),
    "the other factor as mlp_pre": (
        "llama",
        lambda r: replace(retap(r, "mlp_pre", "mlp.up_proj"), mlp_pre="mlp.up_proj"),
        {"mlp_pre"},
        set(),
    ),
    "mlp_pre behind the activation": ("gpt2", lambda r: retap(r, "mlp_pre", "mlp.act"), {"mlp_pre"}, set()),
    "z behind the output projection": ("llama", lambda r: retap(r, "z", side="output"), {"z"}, {"z"}),
    "positions for tokens": ("gpt2", lambda r: replace(r, embed="transformer.wpe"), {"embed"}, {"embed"}),
}
#: Rows that no forward pass can follow: refused whole, when they are loaded.
HOPELESS: dict[str, tuple[str, Change, type[InterpError]]] = {
    "a path that is not there": ("llama", lambda r: retap(r, "mlp_out", "mlp.nothing"), AuditError),
    "blocks that are not there": ("llama", lambda r: replace(r, layers="model.layer"), ArchitectureError),
    "the norm of another family": ("olmo2", as_row("llama"), ArchitectureError),
    "mlp_out before the MLP": ("llama", lambda r: retap(r, "mlp_out", "post_attention_layernorm"), AuditError),
    "mlp_out of another width": ("llama", lambda r: retap(r, "mlp_out", "mlp.up_proj"), AuditError),
    "attn_out before attention": ("llama", lambda r: retap(r, "attn_out", "input_layernorm"), AuditError),
    "taps out of order": ("llama", lambda r: retap(r, "resid_mid", "input_layernorm"), AuditError),
    "heads' outputs before they are written": ("llama", lambda r: retap(r, "head_out", side="input"), AuditError),
    "q where the module is": ("llama", lambda r: replace(r, core_first=0), AuditError),
    "q where k is, fewer heads": ("llama_gqa", lambda r: replace(r, core_first=2), AuditError),
    "an embedding without weights": ("gpt2", lambda r: replace(r, embed="transformer.drop"), ArchitectureError),
    "a final norm before the blocks": ("gpt2", lambda r: replace(r, norm="transformer.drop"), AuditError),
    "a head that is a norm": ("gpt2", lambda r: replace(r, head="transformer.ln_f"), AuditError),
    "another output projection": ("gpt2", lambda r: replace(r, o="mlp.c_proj"), AuditError),
    "another down projection": ("llama", lambda r: replace(r, down="mlp.up_proj"), AuditError),
}


def load_with(monkeypatch: pytest.MonkeyPatch, family: str, change: Change, check: bool = True) -> Model:
    """A tiny model of a family, loaded as if its row were another."""
    family, _, attention = family.partition(":")
    hf, tokenizer = tiny(family)
    attention = attention or ("eager" if family in EAGER else "")
    if attention:
        hf.config._attn_implementation = attention
    right = find_family(hf.config.model_type)
    assert right is not None
    wrong = replace(change(right.for_config(hf.config)), variants=())
    monkeypatch.setattr(loader, "find_family", lambda model_type: wrong)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return interp.load_model(hf, tokenizer=tokenizer, check=check)


def plan_for(kind: str) -> interp.Plan:
    return interp.heads(kind) if kind in HEAD_KINDS else interp.neurons(0) if kind in UNIT_KINDS else interp.grid(kind)


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_row_is_caught_and_its_sites_are_refused(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, change, kinds, at_load = WRONG[wrong]
    model = load_with(monkeypatch, family, change)
    assert at_load <= set(model.refused), "at load"
    report = model.audit()
    assert kinds <= set(report.failed) == set(model.refused), str(report)
    assert not report.ok and "FAILED" in str(report)
    forwards, stop = count_forwards(model)
    for kind in kinds - {"mlp_pre"}:
        with pytest.raises(AuditError, match=f"{kind} is refused on .*: the audit says: .* at layer .* is off by"):
            interp.patch(model, PAIRS, plan_for(kind))
    with pytest.raises(AuditError):
        model.require(Site(next(iter(kinds)), None if "embed" in kinds else 0))
    stop()
    assert not forwards


@pytest.mark.parametrize("wrong", HOPELESS)
def test_a_row_that_no_forward_can_follow_is_refused_at_load(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    family, change, error = HOPELESS[wrong]
    with pytest.raises(error, match=r"interp/models/families\.py"):
        load_with(monkeypatch, family, change)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bloom"])
def test_a_wrong_number_of_heads_is_caught(family: str) -> None:
    model = interp.load_model(tiny(family)[0], check=False)
    model.taps.update(n_heads=2, n_kv_heads=2, d_head=16)
    with pytest.raises(AuditError):
        model.audit()


def test_a_wrong_number_of_heads_is_caught_where_no_pattern_shows_it() -> None:
    model = interp.load_model(tiny("falcon_alibi")[0], check=False)
    model.taps.update(n_heads=2, n_kv_heads=2, d_head=16)
    assert {"q", "k"} <= set(model.audit().failed)


def test_loading_warns_of_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "find_family", lambda model_type: None)  # as if Granite had no row
    hf, tokenizer = tiny("granite")
    with pytest.warns(UserWarning, match=r"these sites are not what the row 'llama \(inferred for granite\)' says"):
        model = interp.load_model(hf, tokenizer=tokenizer)
    assert {"attn_out", "mlp_out"} <= set(model.refused)
    assert {"attn_out", "mlp_out"} <= set(model.audit().failed)


def test_a_traced_run_that_differs_from_the_plain_one_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever makes the logits differ: nothing on such a model can be trusted."""
    from interp.engine import forward

    honest = forward.answer_logits
    monkeypatch.setattr(forward, "answer_logits", lambda model, run: honest(model, run) * 1.01)
    with pytest.raises(AuditError, match="a traced run does not give the plain model's logits"):
        interp.load_model(tiny("gpt2")[0])


# --- nothing to prove --------------------------------------------------------------------------------------


def test_zero_weights_are_notes_not_failures() -> None:
    hf, tokenizer = tiny("gpt2")
    with torch.no_grad():
        block = hf.transformer.h[1]
        for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
            weight.zero_()
        hf.transformer.h[2].attn.c_attn.weight[:, :64] = 0
        hf.transformer.h[2].attn.c_attn.bias[:64] = 0
    model = interp.load_model(hf, tokenizer=tokenizer)
    report = model.audit()
    assert report.ok and not model.refused, str(report)
    notes = {(finding.kind, finding.layer) for finding in report.findings if finding.note == "weights are zero"}
    assert {("z", 1), ("head_out", 1), ("neuron", 1), ("q", 2), ("k", 2)} <= notes
    assert ("z", 0) not in notes and ("q", 1) not in notes
    assert "note: weights are zero" in str(report)


def test_attention_that_looks_at_one_token_only_is_a_note() -> None:
    """Programs compiled into weights attend so sharply that a step of a query moves nothing."""
    hf, tokenizer = tiny("gpt2")
    with torch.no_grad():
        hf.transformer.h[0].attn.c_attn.weight[:, :64] *= 30
    report = interp.load_model(hf, tokenizer=tokenizer).audit()
    assert report.ok, str(report)
    assert "attention is saturated" in {finding.note for finding in report.findings}


def test_a_model_of_few_positions_is_audited_on_as_many() -> None:
    hf, tokenizer = tiny("gpt2")
    config = type(hf.config)(**{**hf.config.to_dict(), "n_positions": 4})
    model = interp.load_model(type(hf)(config).eval(), tokenizer=tokenizer)
    assert not model.refused and model.audit().ok


# --- the command -------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_says_by_its_status(
    tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = loader.find_family
    monkeypatch.setattr(loader, "find_family", lambda name: None if name == "granite" else find(name))
    for family, status in (("qwen3", 0), ("granite", 1)):
        hf, tokenizer = tiny(family)
        folder = tmp_path / family
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            assert main([str(folder)]) == status
        shown = capsys.readouterr().out
        assert ("all passed" in shown) == (status == 0) and ("FAILED" in shown) == (status == 1)
        assert "resid_pre" in shown and "write" in shown


def test_weights_that_live_elsewhere_cannot_be_audited() -> None:
    hf, tokenizer = tiny("gpt2")
    with pytest.raises(AuditError, match="needs its weights here"):
        replace(interp.load_model(hf, tokenizer=tokenizer, check=False), hf=tiny("gpt2")[0].to("meta")).audit()
