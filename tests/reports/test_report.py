"""Reports: their sentences say what the records hold, their code runs and gives the same numbers, every reader can use them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import interp
from interp import Model, PromptPairs
from interp.errors import PlotError
from interp.plots import plot_tokens
from interp.reports import section_of
from tests.families import loaded, words
from tests.plots.browser import Page
from tests.plots.look import Seen, assert_pleasant
from tests.saes.made import random_dictionary

FAMILY = "llama_gqa"


@pytest.fixture(scope="module")
def model() -> Model:
    return loaded(FAMILY)


@pytest.fixture(scope="module")
def pairs() -> PromptPairs:
    clean, corrupted = words(6, 6, seed=1), words(6, 6, seed=2)
    places = {"subject": [1, [2, 3]]}
    return PromptPairs(clean, corrupted, [[7], [8, 9]], [10, 11], positions=places, name="toy")


def verified(model: Model, pairs: PromptPairs) -> interp.Effects:
    return interp.attribute(model, pairs, interp.heads("z"), method="ig", steps=2, verify=2)


MADE: dict[str, Callable[[Model, PromptPairs], interp.Effects]] = {
    "grid": lambda m, p: interp.patch(m, p, interp.grid(["resid_pre", "mlp_out"], layers=[0, 2], positions=[1, -1])),
    "named": lambda m, p: interp.patch(m, p, interp.grid("resid_pre", positions=["subject"])),
    "heads": lambda m, p: interp.patch(m, p, interp.heads(["z", "q"], heads=[0, 3]), interp.prob, "denoising"),
    "neurons": lambda m, p: interp.patch(m, p, interp.neurons(layer=[1], units=[2, 5])),
    "sets": lambda m, p: interp.patch(m, p, interp.sets({"both": ["L0.H1.z", "L1.mlp@-1"]})),
    "paths": lambda m, p: interp.path_patch(m, p, senders=["L0.H1"], receivers=["L1.H2.q", "logits"]),
    "mean": lambda m, p: interp.ablate(m, p, interp.heads("z", layers=[1]), mode="mean"),
    "counterfactual": lambda m, p: interp.ablate(m, p, interp.heads("z"), mode="counterfactual"),
    "atp": lambda m, p: interp.attribute(m, p, interp.heads("z")),
    "ig": verified,
    "trace": lambda m, p: interp.causal_trace(m, p.alone(), samples=2, components=["mlp_out"], layers=[1], window=1),
    "direct": lambda m, p: interp.direct_effects(m, p, by="head"),
}


def run(code: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code of a record leaves behind, with the model at hand where it loads one that was in memory."""
    load = interp.load_model
    monkeypatch.setattr(interp, "load_model", lambda given, **more: model if given == "here" else load(given, **more))
    names: dict[str, Any] = {"module": "here"}
    exec(compile(code, "reproduce", "exec"), names)
    return names


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MADE)
def test_the_code_of_a_record_gives_it_again(
    name: str, model: Model, pairs: PromptPairs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    effects = interp.Effects.load(MADE[name](model, pairs).save(tmp_path / "one.nc"))
    section = section_of(effects)
    again = run(section.code, model, monkeypatch)["effects"]
    np.testing.assert_allclose(again.values, effects.values, atol=1e-5, rtol=1e-5)
    assert again.values.dims == effects.values.dims
    assert again.provenance["plan"] == effects.provenance["plan"]


@pytest.mark.parametrize("name", MADE)
def test_sentences_say_the_numbers_of_the_record(name: str, model: Model, pairs: PromptPairs) -> None:
    effects = MADE[name](model, pairs)
    said = " ".join(section_of(effects).words)
    assert "2 pairs of toy" in said
    assert f"{float(effects.clean.mean()):.2f}".replace("-", "−") in said
    base = 0.0 if name == "direct" else float(effects.base.mean())
    change = effects.values.mean("pair") - base
    most = float(change.values.flat[int(np.nanargmax(np.abs(change.values)))])
    assert f"{most:.2f}".replace("-", "−") in said
    (table,) = section_of(effects).tables
    first = dict(zip(table.columns, table.rows[0], strict=True))
    if name != "direct":
        assert first["change"] == pytest.approx(most, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_code_of_circuits_gives_them_again(
    model: Model, pairs: PromptPairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for circuit in (
        interp.discover(model, pairs, "eap-ig", steps=2, progress=False).top(n_edges=12, connected=True),
        interp.discover(model, pairs, "exact", level="node", progress=False).threshold(0.01),
        interp.iterative_pruning(model, pairs=pairs, threshold=0.2, progress=False),
    ):
        again = run(section_of(circuit).code, model, monkeypatch)["circuit"]
        assert set(again.nodes()) == set(circuit.nodes()) and again.n_edges == circuit.n_edges
        for item, score in circuit.ranking():
            assert dict(again.ranking())[item] == pytest.approx(score, abs=1e-4)
    found = interp.discover(model, pairs, progress=False)
    evaluation = interp.evaluate_circuit(model, pairs, found, fractions=[0.1, 0.5], progress=False)
    again = run(section_of(evaluation).code, model, monkeypatch)["evaluation"]
    pd.testing.assert_frame_equal(again.curve, evaluation.curve, atol=1e-4)


def test_what_cannot_be_written_is_said(model: Model, pairs: PromptPairs) -> None:
    def mine(logits: Any, batch: Any) -> Any:
        return logits[:, 3]

    code = section_of(interp.patch(model, pairs, interp.heads("z"), metric=mine)).code
    assert "# metric: your own function" in code and "mine" in code
    assert "the LlamaForCausalLM that was in memory" in code
    edited = interp.heads("z").with_edit("scale", 0.5)
    assert ".with_edit(...)" in section_of(interp.patch(model, pairs, edited)).code


@pytest.fixture(scope="module")
def everything(model: Model, pairs: PromptPairs) -> list[object]:
    circuit = interp.discover(model, pairs, progress=False)
    prompt = words(6)[0]
    vector = interp.steering_vector(model, [words(5)[0]], [words(4)[0]], "L1.resid_post")
    return [
        "What is said\nin two lines, with <b>no</b> markup.",
        ("The grid", MADE["grid"](model, pairs)),
        MADE["heads"](model, pairs),
        circuit,
        interp.evaluate_circuit(model, pairs, circuit, fractions=[0.1, 1.0], progress=False),
        interp.direct_effects(model, pairs),
        interp.logit_lens(model, [prompt]),
        interp.lens.attention_patterns(model, prompt),
        plot_tokens(model.tokens(prompt).labels, range(6)),
        interp.steer(model, prompt, vector, 2.0, site="L1.resid_post", steps=3),
        model.generate(prompt, steps=3),
        model.audit(layers=[0]),
        random_dictionary("TopK", model.d_model),
        pd.DataFrame({"name": ["b", "a", "c"], "value": [2.0, -10.0, 1.0]}),
    ]


@pytest.fixture(scope="module")
def page(everything: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return interp.report(everything, tmp_path_factory.mktemp("report") / "all.html", title="Everything & <more>")


def test_a_report_of_everything_is_pleasant_to_every_reader(page: Path, chromium: str) -> None:
    assert page.stat().st_size <= 5_000_000
    assert page.read_text().count("* @license") <= 2 or page.stat().st_size < 3_000_000  # BokehJS stands in it once
    assert_pleasant(page)


def test_contents_lead_to_every_section(page: Path, everything: list[object], chromium: str) -> None:
    with Page(page) as opened:
        links = opened.evaluate(
            "[...document.querySelectorAll('nav a')].map((a) => [a.textContent, a.getAttribute('href')])"
        )
        assert len(links) == len(everything) - 1 and len({name for name, _ in links}) == len(links)
        for name, target in links:
            assert opened.evaluate(f"document.querySelector({target!r}).textContent") == name
        assert opened.evaluate("document.title") == "Everything & <more>"
        assert "with <b>no</b> markup" in opened.evaluate("document.body.innerText")
        assert opened.evaluate("Bokeh.documents.length") == 1


def test_tables_are_sorted_from_the_keyboard(page: Path, chromium: str) -> None:
    with Page(page) as opened:
        table = "[...document.querySelectorAll('table')].find((t) => t.tHead && t.tHead.innerText.startsWith('name'))"
        column = f"[...{table}.tBodies[0].rows].map((row) => row.cells[%d].textContent)"
        opened.evaluate(f"{table}.tHead.rows[0].cells[1].querySelector('button').focus()")
        for state, wanted in (("descending", ["2", "1", "−10"]), ("ascending", ["−10", "1", "2"])):
            opened.call(
                "Input.dispatchKeyEvent", type="keyDown", key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )
            opened.call("Input.dispatchKeyEvent", type="keyUp", key="Enter", code="Enter", windowsVirtualKeyCode=13)
            assert opened.evaluate(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == state
            assert opened.evaluate(column % 1) == wanted
        opened.evaluate(f"{table}.tHead.rows[0].cells[0].querySelector('button').click()")
        assert opened.evaluate(column % 0) == ["c", "b", "a"]
        assert opened.evaluate(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") is None


def test_on_paper_nothing_is_folded_or_cut(page: Path, chromium: str) -> None:
    with Seen(page) as opened:
        assert not opened.evaluate("[...document.querySelectorAll('details')].every((d) => d.open)")
        opened.print_it()
        opened.wait("[...document.querySelectorAll('details')].every((d) => d.open)", 5)
        wide = opened.evaluate("[...document.querySelectorAll('.picture')].map((p) => p.getBoundingClientRect().width)")
        assert max(wide) <= 1280


def test_a_tracked_run_in_a_report(model: Model, pairs: PromptPairs, tmp_path: Path) -> None:
    with interp.track_experiment(experiment_name="one", config={"n": 2}, root=tmp_path) as tracker:
        tracker.log({"loss": 0.125}, step=3)
        tracker.log_effects("heads", interp.patch(model, pairs, interp.heads("z")))
    run = interp.runs(tmp_path)[0]
    text = interp.report([run, ("Its effects", run.effects("heads"))], tmp_path / "run.html").read_text()
    assert "0.125" in text and "Its effects" in text


def test_what_a_report_cannot_be_made_of(tmp_path: Path, model: Model, pairs: PromptPairs) -> None:
    with pytest.raises(PlotError, match="given nothing"):
        interp.report([], tmp_path / "a.html")
    with pytest.raises(PlotError, match=r"must end in \.html"):
        interp.report("text", tmp_path / "a.pdf")
    with pytest.raises(PlotError, match=r"cannot show a builtin_function"):
        interp.report([len, print], tmp_path / "a.html")
    with pytest.raises(PlotError, match="cannot write"):
        (tmp_path / "file").write_text("")
        interp.report("text", tmp_path / "file" / "a.html")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_views_circuits_by_hand_and_what_notebooks_show(model: Model, pairs: PromptPairs, tmp_path: Path) -> None:
    sae = random_dictionary("TopK", model.d_model)
    code = section_of(interp.patch(model, pairs, interp.features(sae, units=[1, 2]))).code
    assert "plan = interp.features(view, units=[1, 2])  # view: sae1, which you gave" in code
    assert "written by hand" in section_of(interp.Circuit.from_edges({("embed", "logits"): None})).words[0]
    tokens = model.tokens(words(5)[0])
    page = interp.report([pairs, tokens, model.run(words(5)[0], "L1.z")], tmp_path / "a.html").read_text()
    assert tokens.labels[0] in page and "distractors" in page and "1 × 5 ×" in page


def test_one_thing_and_a_page_without_a_drawing(tmp_path: Path, chromium: str) -> None:
    path = interp.report("Only words.", tmp_path / "words.html", title="Short")
    assert path.stat().st_size < 30_000 and not re.search("bokeh", path.read_text().split("<script>")[0])
    with Page(path) as page:
        assert page.errors == [] and page.evaluate("document.querySelector('h1').textContent") == "Short"
