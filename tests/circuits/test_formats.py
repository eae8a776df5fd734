"""Circuits as files: round trips, and bad files refused with the line or the field at fault."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest

from interp.circuits import (
    Circuit,
    Facts,
    from_eap_ig,
    from_graphml,
    to_eap_ig,
    to_graphml,
)  # fmt: skip
from interp.errors import CircuitError

SMALL, GROUPED = Facts(2, 2, 2), Facts(2, 4, 2)
META = {"method": "eap-ig", "model": "toy “ü”", "provenance": {"seed": 0, "pairs": [1, 2]}, "d_model": 16}


def circuits() -> dict[str, Circuit]:
    scores = np.random.default_rng(0).standard_normal(GROUPED.mask.shape).astype(np.float32) / 3
    whole = Circuit.from_matrix(scores, None, GROUPED, META)
    return {
        "whole": whole,
        "top": whole.top(n_edges=9, connected=True),
        "empty": Circuit.from_edges({}, GROUPED),
        "unscored": Circuit.from_edges([("embed", "L0.H0.v"), ("L0.H0", "logits")]),
        "nodes": Circuit.from_nodes({"L0.H3": 0.1, "L1.mlp": -1e-9, "embed": 2.0}, GROUPED, META),
        "heads": Circuit.from_nodes([(0, 1), (1, 1)], meta={"trajectory": [{"dropped": "L0.H0"}]}),
    }


FORMATS: dict[str, tuple[Callable[..., None], Callable[..., Circuit]]] = {
    "json": (Circuit.to_json, Circuit.from_json),
    "graphml": (to_graphml, from_graphml),
}


def same(a: Circuit, b: Circuit) -> bool:
    graphs = dict(a.graph.nodes(data=True)) == dict(b.graph.nodes(data=True))
    edges = {e[:2]: e[2] for e in a.graph.edges(data=True)} == {e[:2]: e[2] for e in b.graph.edges(data=True)}
    return graphs and edges and a.meta == b.meta


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("name", circuits())
def test_round_trip(form: str, name: str, tmp_path: Path) -> None:
    write, read = FORMATS[form]
    circuit = circuits()[name]
    write(circuit, tmp_path / "deeper" / "file")
    found = read(tmp_path / "deeper" / "file")
    assert same(found, circuit) and list(found.scores()) == list(circuit.scores())
    assert not list(tmp_path.rglob("*.tmp"))


def test_graphml_opens_in_other_tools(tmp_path: Path) -> None:
    circuit = circuits()["top"]
    to_graphml(circuit, tmp_path / "c.graphml")
    graph = nx.read_graphml(tmp_path / "c.graphml")
    assert set(graph) == set(circuit.nodes("edge"))
    assert {e: graph.edges[e]["score"] for e in circuit.edges} == circuit.scores()
    bare = nx.DiGraph()
    bare.add_edge("embed", "L0.H1.q", score=0.5)
    nx.write_graphml(bare, tmp_path / "bare.graphml")
    assert from_graphml(tmp_path / "bare.graphml").scores() == {("embed", "L0.H1.q"): 0.5}


def document(**changes: Any) -> dict[str, Any]:
    rows = [["embed", "L0.H0.q", 1.0], ["L0.H0", "logits", -2.0]]
    start = {"schema": "interp.circuit", "version": 1, "level": "edge", "facts": SMALL.to_dict(), "meta": {}}
    return {**start, "nodes": [], "edges": rows, **changes}


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("", "line 1, column 1"),
        ('{"schema": "interp.circuit",\n"version" 1}', "line 2, column 11"),
        ("[]", "must be an object"),
        ("{}", "field schema"),
        ("[" * 200_000, "no JSON that can be read"),
        (document(schema="other"), "field schema must be 'interp.circuit', not 'other'"),
        (document(version=2), "field version is 2, newer than 1: upgrade"),
        (document(version=True), "field version must be a positive integer"),
        (document(level="head"), "field level must be one of"),
        (document(facts=[1]), "field facts must be an object"),
        (document(facts={"n_layers": 2, "n_heads": 2}), "field facts.*'n_kv_heads' is missing"),
        (document(facts={**SMALL.to_dict(), "n_heads": "2"}), "field facts.*n_heads must be an integer"),
        (document(meta=None), "field meta must be an object, not null"),
        (document(extra=1), "field extra is unknown"),
        (document(edges={}), "field edges must be a list"),
        (document(nodes=[["L0.H0", 1.0]]), "field nodes must be an empty list"),
        (document(edges=[["embed", "logits", 1.0], ["embed", "L0.H0.q"]]), r"edges\[1\] must be a list of 3"),
        (
            document(edges=[["embed", "L0.H9.q", 1.0]]),
            r"edges\[0\]: no edge embed -> L0.H9.q in a model with 2",
        ),
        (document(edges=[["logits", "embed", 1.0]]), r"edges\[0\]: no edge"),
        (document(edges=[["embed", "L0.z", 1.0]]), r"edges\[0\]: 'L0.z'|L0.z is no node"),
        (document(edges=[["embed", ["x"], 1.0]]), r"edges\[0\]"),
        (
            document(edges=[["embed", "logits", "1"]]),
            r"edges\[0\]: the score must be a finite number or null",
        ),
        (document(edges=[["embed", "logits", 10**400]]), r"edges\[0\]"),
        (document(edges=[["embed", "logits", 1], ["embed", "logits", 1]]), r"edges\[1\].*a second time"),
        (document(edges=[["embed", "logits", math.nan]]), r"edges\[0\]: the score must be"),
        (document(facts=None, edges=[["L99999999.H0", "logits", 1.0]]), "no model that exists"),
    ],
)
def test_bad_json_is_refused(text: str | dict[str, Any], at: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    with pytest.raises(CircuitError, match=at) as refused:
        Circuit.from_json(file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("missing", document())
def test_each_field_is_needed(missing: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({key: value for key, value in document().items() if key != missing}))
    with pytest.raises(CircuitError, match=f"field {missing}"):
        Circuit.from_json(file)
    file.write_text(json.dumps(document()))
    assert Circuit.from_json(file).n_edges == 2


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    for read in (Circuit.from_json, from_graphml, from_eap_ig):
        with pytest.raises(CircuitError, match=r"cannot read a circuit from .*none"):
            read(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(CircuitError, match="cannot write a circuit to"):
        circuits()["top"].to_json(tmp_path / "file" / "below.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CircuitError, match="byte 0 is not UTF-8"):
        Circuit.from_json(tmp_path / "binary")
    unwritable = Circuit.from_edges({}, meta={"provenance": {"when": object()}})
    with pytest.raises(CircuitError, match=r"meta\['provenance'\] cannot be written as JSON"):
        unwritable.to_json(tmp_path / "c.json")
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(
    ("change", "at"),
    [
        (lambda t: t[: len(t) // 2], r"line \d+, column \d+"),
        (lambda t: "not xml", "line 1, column 1"),
        (lambda t: "<a/>", "not GraphML"),
        (
            lambda t: t.replace('target="logits"', 'target="L0.H1.q"', 1),
            "field edge L1.H2 -> L0.H1.q: no edge",
        ),
        (lambda t: t.replace('"directed"', '"undirected"'), "must be 'directed'"),
        (lambda t: t.replace(">interp.circuit<", ">other<"), "field schema"),
        (
            lambda t: t.replace('{"n_layers"', '{"layers"', 1).replace("&quot;n_layers", "&quot;layers"),
            "field facts",
        ),
        (lambda t: t.replace("L1.H2", "L1.what"), "field edge .*L1.what"),
    ],
)
def test_bad_graphml_is_refused(change: Callable[[str], str], at: str, tmp_path: Path) -> None:
    file = tmp_path / "c.graphml"
    scores = {("embed", "L1.H2.q"): 1.0, ("L1.H2", "logits"): 2.0}
    to_graphml(Circuit.from_edges(scores, GROUPED), file)
    file.write_text(change(file.read_text()))
    with pytest.raises(CircuitError, match=at) as refused:
        from_graphml(file)
    assert str(file) in str(refused.value)


def eap_ig_file(layers: int = 2, heads: int = 2, parallel: bool = False) -> dict[str, Any]:
    """What EAP-IG's Graph.to_json writes, spelled out on its own: scores 1, 2, 3, ...; a third is kept."""
    order, edges = ["input"], {}
    nodes: dict[str, Any] = {"input": {"in_graph": True}}

    def add(end: str) -> None:
        for start in order:
            edges[f"{start}->{end}"] = {"score": float(len(edges) + 1), "in_graph": len(edges) % 3 == 0}

    for layer in range(layers):
        block = [f"a{layer}.h{head}" for head in range(heads)]
        for head in block:
            for slot in "qkv":
                add(f"{head}<{slot}>")
        if parallel:
            add(f"m{layer}")
            order += [*block, f"m{layer}"]
        else:
            order += block
            add(f"m{layer}")
            order.append(f"m{layer}")
        nodes |= {name: {"in_graph": True} for name in (*block, f"m{layer}")}
    add("logits")
    nodes["logits"] = {"in_graph": True}
    cfg = {"n_layers": layers, "n_heads": heads, "parallel_attn_mlp": parallel, "d_model": 16}
    return {"cfg": cfg, "nodes": nodes, "edges": edges}


@pytest.mark.parametrize("parallel", [False, True])
def test_eap_ig_is_read_and_written_as_it_writes(parallel: bool, tmp_path: Path) -> None:
    theirs, file = eap_ig_file(parallel=parallel), tmp_path / "graph.json"
    file.write_text(json.dumps(theirs))
    everything = from_eap_ig(file, only_kept=False)
    assert everything.n_edges == len(theirs["edges"]) == Facts(2, 2, 2, parallel).n_edges
    assert everything.scores()["L0.H1", "L1.H0.q"] == theirs["edges"]["a0.h1->a1.h0<q>"]["score"]
    assert everything.scores()["embed", "L1.mlp"] == theirs["edges"]["input->m1"]["score"]
    kept = from_eap_ig(file)
    assert kept.n_edges == sum(edge["in_graph"] for edge in theirs["edges"].values())
    to_eap_ig(kept, tmp_path / "ours.json")  # d_model came with the file
    ours = json.loads((tmp_path / "ours.json").read_text())
    assert ours["cfg"] == theirs["cfg"] and set(ours["nodes"]) == set(theirs["nodes"])
    assert {n: e["in_graph"] for n, e in ours["edges"].items()} == {
        n: e["in_graph"] for n, e in theirs["edges"].items()
    }
    assert all(e["score"] == theirs["edges"][n]["score"] for n, e in ours["edges"].items() if e["in_graph"])


def test_eap_ig_with_grouped_keys(tmp_path: Path) -> None:
    file = tmp_path / "graph.json"
    theirs = eap_ig_file(heads=4)
    file.write_text(json.dumps(theirs))
    circuit = from_eap_ig(file, n_kv_heads=2, only_kept=False)
    assert circuit.facts == GROUPED and circuit.n_edges == GROUPED.n_edges
    pair = [theirs["edges"][f"m0->a1.h{head}<k>"]["score"] for head in (2, 3)]
    assert circuit.scores()["L0.mlp", "L1.H1.k"] == sum(pair)
    to_eap_ig(circuit, file)
    assert json.loads(file.read_text())["edges"]["m0->a1.h3<k>"] == {"score": sum(pair) / 2, "in_graph": True}
    assert from_eap_ig(file, n_kv_heads=2).scores() == circuit.scores()


def test_eap_ig_at_the_level_of_nodes(tmp_path: Path) -> None:
    file, circuit = tmp_path / "graph.json", Circuit.from_nodes({"L0.H1": 0.5, "L1.mlp": -1.0}, SMALL)
    to_eap_ig(circuit, file, d_model=16)
    written = json.loads(file.read_text())
    assert written["nodes"]["a0.h1"] == {"in_graph": True, "score": 0.5}
    assert written["nodes"]["a1.h0"] == {"in_graph": False} and written["edges"]["a0.h1->m1"]["in_graph"]
    assert not written["edges"]["a0.h1->a1.h0<q>"]["in_graph"]
    found = from_eap_ig(file)
    assert found.level == "node" and found.scores() == circuit.scores() and found.edges == circuit.edges
    written["nodes"]["m0"] = {"in_graph": True, "score": math.nan}  # never scored, as EAP-IG writes it
    file.write_text(json.dumps(written))
    assert from_eap_ig(file).nodes() == ["embed", "L0.H1", "L0.mlp", "L1.mlp", "logits"]


@pytest.mark.parametrize(
    ("change", "at"),
    [
        (lambda d: d.pop("cfg"), "field cfg is missing"),
        (lambda d: d["cfg"].pop("n_heads"), r"field cfg\.n_heads is missing"),
        (lambda d: d["cfg"].update(n_layers=1.5), "field cfg.*n_layers must be an integer"),
        (lambda d: d.update(edges=[]), "field edges must be an object"),
        (lambda d: d["nodes"].update(x0={"in_graph": True}), r'nodes\["x0"\].*no node of EAP-IG'),
        (lambda d: d["nodes"].update(m0={"in_graph": 1}), r'nodes\["m0"\]: in_graph must be true or false'),
        (
            lambda d: d["edges"].update({"m1->m0": {"score": 1.0, "in_graph": True}}),
            r'edges\["m1->m0"\].*no edge',
        ),
        (lambda d: d["edges"].update({"m0": {"score": 1.0, "in_graph": True}}), r'edges\["m0"\]'),
        (lambda d: d["edges"]["input->m0"].pop("score"), r'edges\["input->m0"\].*finite number'),
        (lambda d: d["edges"]["input->m0"].update(score=math.nan), r'edges\["input->m0"\].*finite number'),
        (lambda d: d["edges"].update({"input->a0.h9<q>": {"score": 1.0, "in_graph": True}}), "a0.h9<q>"),
    ],
)
def test_bad_eap_ig_files_are_refused(change: Callable[[Any], Any], at: str, tmp_path: Path) -> None:
    data = eap_ig_file()
    change(data)
    (tmp_path / "bad.json").write_text(json.dumps(data))
    with pytest.raises(CircuitError, match=at):
        from_eap_ig(tmp_path / "bad.json")
    with pytest.raises(CircuitError, match="d_model"):
        to_eap_ig(Circuit.from_edges({}, SMALL), tmp_path / "out.json")
    with pytest.raises(CircuitError, match="facts"):
        to_eap_ig(Circuit.from_edges({}), tmp_path / "out.json", d_model=4)
