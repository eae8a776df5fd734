"""What people see when they end a cell with a result: what it is, how large, the main number; never a dump of a tensor."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import interp
from interp import Edit, Model, PromptPairs, Site
from interp.saes.views import view_of
from tests.families import loaded, words
from tests.saes.made import random_dictionary

FAMILY = "gpt2"


class Balanced(HTMLParser):
    """Whether every element that is opened is closed, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, _: object) -> None:
        if tag not in ("br", "img", "input", "meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    model: Model = loaded(FAMILY)
    clean, corrupted = words(6, 6), words(6, 6, seed=3)
    pairs = PromptPairs(clean, corrupted, [7, 8], [9, 10], name="<toy>")
    sae = random_dictionary("TopK", model.d_model)
    circuit = interp.discover(model, pairs, progress=False)
    zero = torch.zeros(model.d_model)
    return {
        "model": model,
        "pairs": pairs,
        "grid": interp.grid(["resid_pre"], layers=[1]),
        "sets": interp.sets({"both": ["L1.mlp", "L0.H1.z"]}),
        "edit": Edit(Site.parse("L1.resid_post"), "add", zero),
        "view": view_of(sae),
        "effects": interp.patch(model, pairs, interp.heads("z")),
        "circuit": circuit,
        "evaluation": interp.evaluate_circuit(model, pairs, circuit, fractions=[0.1, 1.0], progress=False),
        "audit": model.audit(layers=[0]),
        "tokens": model.tokens(clean[0]),
        "run": model.run(clean, "L1.z"),
        "cache": model.run(clean, "L1.z").cache,
        "generation": model.generate(clean, steps=3, logits=True),
        "steering": interp.steer(model, clean[0], zero, 1.0, site="L1.resid_post", steps=2),
        "stored": interp.collect_activations(model, clean, 1, to_disk=tmp_path_factory.mktemp("acts") / "a"),
        "sae": interp.evaluate_sae(model, sae, words(30, 30)),
        "figure": interp.plot_tokens(["a"], [1]),
    }


SAID = {
    "model": "3 layers, d_model 32",
    "pairs": "PromptPairs(<toy>, 2 pairs",
    "grid": "Plan(resid_pre by position; layers [1])",
    "sets": "Plan(1 sets: both: L1.mlp_out, L0.H1.z)",
    "edit": "Edit(L1.resid_post, add, [32])",
    "view": "View('sae1', at='L1.resid_post', parts=64)",
    "effects": "component 1 × layer 3 × head 4 × pair 2",
    "circuit": "262 edges",
    "evaluation": "Evaluation(cpr=",
    "audit": "checks, all passed); print it for the table",
    "tokens": "0:",
    "run": "ForwardPass(logits [2, 6, 122]",
    "cache": "L1.z: prompt 2 × position 6 × head 4 × d_head 8",
    "generation": "Generation(2 prompts, 6 tokens made, logits [2, 3, 122]",
    "steering": "1 × a vector at L1.resid_post",
    "stored": "12 tokens of L1.resid_post",
    "sae": "explained variance",
    "figure": "Figure('Tokens')",
}
#: Things whose one line is all there is to see; a cache is shown by xarray.
PLAIN = ("cache", "model", "grid", "sets", "edit", "view", "stored")


@pytest.mark.parametrize("name", SAID)
def test_one_line_says_what_it_is(name: str, results: dict[str, object]) -> None:
    said = repr(results[name])
    assert SAID[name] in said
    assert "tensor(" not in said and len(said.splitlines()[0]) <= 400
    assert len(said) <= 1000


@pytest.mark.parametrize("name", [name for name in SAID if name not in PLAIN])
def test_notebooks_get_a_table(name: str, results: dict[str, object]) -> None:
    shown = results[name]._repr_html_()  # type: ignore[attr-defined]
    parser = Balanced()
    parser.feed(shown)
    assert parser.open == [] and "<toy>" not in shown
    assert name == "figure" or "<table" in shown


def test_the_table_of_an_audit_is_what_is_printed(results: dict[str, object]) -> None:
    report = loaded(FAMILY).audit(layers=[0])
    lines = str(report).splitlines()
    assert len(lines) == len(report.rows()) + 3
    for line, (kind, what, layers, _, _) in zip(lines[2:], report.rows(), strict=False):
        assert line.split()[0] == kind.split()[0] and what in line and f" {layers} " in line


def test_a_file_is_not_needed(tmp_path: Path) -> None:
    assert repr(PromptPairs(["a"] * 30)).startswith("PromptPairs(unnamed, 30 pairs")
    assert "the first 10" in PromptPairs(["a"] * 30)._repr_html_()
