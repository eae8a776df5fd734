"""Nodes, edges and the circuit type: counts, order, selection, paths, set operations, the list of heads."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import torch

from interp import Site
from interp.circuits import Circuit, Facts
from interp.circuits.nodes import node
from interp.errors import CircuitError

SMALL, GROUPED = Facts(2, 2, 2), Facts(3, 4, 2)
PARALLEL = Facts(2, 2, 2, parallel=True)


def random_circuit(facts: Facts = GROUPED, seed: int = 0) -> Circuit:
    scores = np.random.default_rng(seed).standard_normal(facts.mask.shape)
    return Circuit.from_matrix(scores, None, facts, {"method": "eap", "model": "toy"})


@pytest.mark.parametrize(
    ("facts", "edges"), [(Facts(12, 12, 12), 32_491), (Facts(30, 9, 3), 70_651), (Facts(1, 1, 1), 8)]
)
def test_edges_are_counted_as_the_literature_does(facts: Facts, edges: int) -> None:
    assert facts.n_edges == edges == int(facts.mask.sum())


@pytest.mark.parametrize("facts", [SMALL, GROUPED, PARALLEL])
def test_a_receiver_reads_what_stands_upstream(facts: Facts) -> None:
    """Against a definition by layers that shares no code with the counts."""
    for r, receiver in enumerate(facts.receivers):
        reads = []
        for sender in facts.senders:
            below = sender.kind == "embed" or receiver.kind == "logits" or sender.layer < receiver.layer
            beside = receiver.kind == "mlp_out" and sender.kind == "head_out" and sender.layer == receiver.layer
            reads.append(below or (beside and not facts.parallel))
        assert facts.mask[:, r].tolist() == reads
        assert facts.upstream_count(receiver.node) == sum(reads)
        assert [facts.has_edge(sender, receiver) for sender in facts.senders] == reads
    assert facts.mask.shape == (len(facts.senders), len(facts.receivers))
    assert not facts.mask.flags.writeable


def test_names_and_groups() -> None:
    names = [site.node for site in GROUPED.senders]
    assert names[:6] == ["embed", "L0.H0", "L0.H1", "L0.H2", "L0.H3", "L0.mlp"]
    inputs = [site.node for site in GROUPED.receivers]
    assert inputs[:9] == [
        *(f"L0.H{h}.q" for h in range(4)),
        "L0.H0.k",
        "L0.H1.k",
        "L0.H0.v",
        "L0.H1.v",
        "L0.mlp",
    ]
    assert inputs[-1] == "logits"
    assert GROUPED.heads_behind(node("L2.H1.k")) == (Site("head_out", 2, 2), Site("head_out", 2, 3))
    assert [site.node for site in GROUPED.inputs_of(node("L2.H3"))] == ["L2.H3.q", "L2.H1.k", "L2.H1.v"]
    for position, site in enumerate(GROUPED.receivers):
        assert GROUPED.receiver_index[site] == position
        assert all(site in GROUPED.inputs_of(head) for head in GROUPED.heads_behind(site))


def test_facts_of_a_model_and_what_is_wrong_with_them() -> None:
    model = SimpleNamespace(n_layers=3, n_heads=4, n_kv_heads=2, parallel=False, d_model=8)
    assert Facts.of(model) == Facts.of(GROUPED.to_dict()) == GROUPED
    with pytest.raises(CircuitError, match="n_heads' is missing"):
        Facts.of({"n_layers": 2, "n_kv_heads": 2})
    with pytest.raises(CircuitError, match="n_layers must be an integer of at least 1, not 0"):
        Facts(0, 2, 2)
    with pytest.raises(CircuitError, match="3 key/value heads do not divide 4"):
        Facts(2, 4, 3)
    with pytest.raises(CircuitError, match="no model that exists"):
        Circuit.from_edges({("L999999999.H0", "logits"): 1.0})


@pytest.mark.parametrize("name", ["L3", "L1.H2.z", "L1.H2@4", "L1.q", "L1.H2.pattern", "resid", ["L1.H2"], None])
def test_what_names_no_node(name: object) -> None:
    with pytest.raises(CircuitError):
        node(name)


def test_the_graph_of_edges() -> None:
    circuit = Circuit.from_edges(
        {
            ("embed", "L1.H0.k"): 2.0,
            ("embed", "L1.H1.q"): -1.0,
            ("L1.H1", "logits"): 3.0,
            ("L1.H1", "L1.mlp"): 0.5,
            ("embed", "L1.H1.v"): 0.25,
        },
        GROUPED,
    )
    graph = circuit.graph
    assert isinstance(graph, nx.DiGraph) and all(isinstance(site, Site) for site in graph)
    assert graph.edges[Site("embed"), Site("k", 1, 0)] == {"kind": "edge", "score": 2.0}
    # k of the first pair leads to the head that is kept, v of the second, of which none is, to both
    assert list(graph.successors(Site("k", 1, 0))) == [Site("head_out", 1, 1)]
    assert list(graph.successors(Site("v", 1, 1))) == [Site("head_out", 1, 2), Site("head_out", 1, 3)]
    assert graph.edges[Site("k", 1, 0), Site("head_out", 1, 1)] == {"kind": "inside"}
    assert circuit.n_edges == 5 and circuit.scores()["L1.H1", "logits"] == 3.0
    assert circuit.edges[0] == ("embed", "L1.H1.q")
    assert circuit.nodes() == ["embed", "L1.H1", "L1.H2", "L1.H3", "L1.mlp", "logits"]
    assert circuit.nodes("edge")[1:4] == ["L1.H1.q", "L1.H0.k", "L1.H1.v"]
    with pytest.raises(nx.NetworkXError, match="Frozen"):
        graph.add_edge(1, 2)


def test_matrices_go_in_and_come_out() -> None:
    scores = torch.randn(GROUPED.mask.shape, generator=torch.Generator().manual_seed(1))
    mask = torch.from_numpy(GROUPED.mask.copy())
    mask[:, ::3] = False
    circuit = Circuit.from_matrix(scores.requires_grad_(), mask, GROUPED)
    assert np.array_equal(circuit.matrix(), mask.numpy())
    found = circuit.score_matrix()
    assert np.array_equal(found[mask.numpy()], scores.detach().numpy()[mask.numpy()].astype(float))
    assert np.isnan(found[~mask.numpy()]).all()
    named = Circuit.from_edges(circuit.scores(), GROUPED)
    assert np.array_equal(named.matrix(), circuit.matrix())


def test_what_a_matrix_must_not_be() -> None:
    scores = np.zeros(GROUPED.mask.shape)
    with pytest.raises(CircuitError, match=r"scores must be \[sender, receiver\] = \(16, 28\)"):
        Circuit.from_matrix(scores[:-1], None, GROUPED)
    with pytest.raises(CircuitError, match="must be boolean"):
        Circuit.from_matrix(scores, scores, GROUPED)
    with pytest.raises(CircuitError, match=r"no edge L0.H0 -> L0.H0.q"):
        Circuit.from_matrix(scores, np.ones(scores.shape, bool), GROUPED)
    scores[0, 3] = np.nan
    with pytest.raises(CircuitError, match=r"score of embed -> L0\.H3\.q must be a finite number"):
        Circuit.from_matrix(scores, None, GROUPED)
    with pytest.raises(CircuitError, match=r"no edge L0.H0 -> L0.mlp"):
        Circuit.from_edges({("L0.H0", "L0.mlp"): 1.0}, PARALLEL)
    with pytest.raises(CircuitError, match=r"no edge L5.H0 -> logits in a model with 3 layers"):
        random_circuit().from_edges({("L5.H0", "logits"): 1.0}).matrix(GROUPED)
    with pytest.raises(CircuitError, match="facts"):
        Circuit.from_edges({("embed", "logits"): 1.0}).matrix()


def test_top_takes_the_largest_by_size_of_score() -> None:
    circuit = random_circuit()
    flat = sorted(circuit.scores().items(), key=lambda item: abs(item[1]), reverse=True)
    top = circuit.top(n_edges=7)
    assert top.scores() == dict(flat[:7]) and top.matrix().sum() == 7
    assert top.meta["selection"] == [{"n_edges": 7, "connected": False, "before": 7, "after": 7}]
    assert top.meta["method"] == "eap" and circuit.n_edges == GROUPED.n_edges
    assert circuit.top(fraction=0.1).n_edges == GROUPED.n_edges // 10
    assert top.top(fraction=0.01).n_edges == int(GROUPED.n_edges * 0.01)  # of the model's, not of the 7
    assert circuit.top(fraction=1).scores() == circuit.scores()
    assert circuit.top(n_edges=0).n_edges == 0 and circuit.top(n_edges=0).nodes() == ["embed", "logits"]
    t = abs(flat[6][1])
    assert circuit.threshold(t).scores() == top.scores()
    tied = Circuit.from_edges({("L0.H1", "logits"): -1.0, ("embed", "logits"): 1.0, ("L0.H0", "logits"): 1.0})
    assert tied.top(n_edges=2).edges == [("embed", "logits"), ("L0.H0", "logits")]


def test_top_connected_drops_loose_ends() -> None:
    edges = {
        ("embed", "L0.H0.v"): 5.0, ("L0.H0", "L1.H1.k"): 4.0, ("L1.H1", "logits"): 3.0,
        ("L0.H1", "logits"): 9.0, ("embed", "L1.mlp"): 8.0, ("embed", "logits"): 0.1,
    }  # fmt: skip
    part = Circuit.from_edges(edges, SMALL).top(n_edges=5, connected=True)
    assert part.edges == [("embed", "L0.H0.v"), ("L0.H0", "L1.H1.k"), ("L1.H1", "logits")]
    assert part.meta["selection"] == [{"n_edges": 5, "connected": True, "before": 5, "after": 3}]
    for seed in range(5):  # every edge left lies on a path, and none that does was dropped
        whole = random_circuit(seed=seed)
        loose, tight = whole.top(n_edges=25), whole.top(n_edges=25, connected=True)
        paths = nx.all_simple_paths(loose.graph, Site("embed"), Site("logits"))
        on_paths = {(a.node, b.node) for path in paths for a, b in pairwise(path)}
        assert set(tight.edges) == on_paths & set(loose.edges)
        assert tight.top(n_edges=25, connected=True).edges == tight.edges


def test_what_top_refuses() -> None:
    circuit, nodes = random_circuit(), Circuit.from_nodes({"L0.H0": 1.0, "L1.mlp": 2.0}, GROUPED)
    for arguments in (
        {},
        {"n_edges": 3, "fraction": 0.1},
        {"n_nodes": 3},
        {"fraction": 1.5},
        {"n_edges": -1},
    ):
        with pytest.raises(CircuitError):
            circuit.top(**arguments)
    with pytest.raises(CircuitError, match="ranks nodes: use n_nodes="):
        nodes.top(n_edges=3)
    with pytest.raises(CircuitError, match="1 edges have no score"):
        Circuit.from_edges({("embed", "logits"): None, ("L0.H0", "logits"): 1.0}).top(n_edges=1)


def test_circuits_of_nodes() -> None:
    scores = {"L0.H1": 0.5, "L1.H0": -2.0, "L1.mlp": 1.0, "embed": 7.0}
    circuit = Circuit.from_nodes(scores, SMALL)
    assert circuit.scores() == scores and circuit.n_nodes == 3 and circuit.level == "node"
    expected = {
        ("embed", f"L{at}.{kind}") for at in ("0.H1", "1.H0") for kind in "qkv"
    } | {("L0.H1", f"L1.H0.{kind}") for kind in "qkv"} | {
        ("embed", "L1.mlp"), ("L0.H1", "L1.mlp"), ("L1.H0", "L1.mlp"),
        *((sender, "logits") for sender in ("embed", "L0.H1", "L1.H0", "L1.mlp")),
    }  # fmt: skip
    assert set(circuit.edges) == expected and circuit.matrix().sum() == len(expected)
    assert circuit.top(n_nodes=2).scores() == {"embed": 7.0, "L1.H0": -2.0, "L1.mlp": 1.0}
    assert circuit.top(fraction=1 / 6).nodes() == [
        "embed",
        "L1.H0",
        "logits",
    ]  # six heads and MLPs in the model
    assert circuit.threshold(0.9).n_nodes == 2
    every = Circuit.from_nodes([site for site in GROUPED.senders[1:]], GROUPED)
    assert np.array_equal(every.matrix(), GROUPED.mask)
    assert ("L0.H0", "L0.mlp") not in Circuit.from_nodes(["L0.H0", "L0.mlp"], PARALLEL).edges
    grouped = Circuit.from_nodes({"L1.H3": 1.0}, GROUPED)
    assert ("embed", "L1.H1.k") in grouped.edges
    assert list(grouped.graph.successors(Site("k", 1, 1))) == [Site("head_out", 1, 3)]
    with pytest.raises(CircuitError, match=r"no sender L1\.H0\.q"):
        Circuit.from_nodes({"L1.H0.q": 1.0}, SMALL)


def test_paths_have_the_strongest_weakest_link() -> None:
    circuit = random_circuit(SMALL, seed=3).top(n_edges=24)
    graph, found = circuit.graph, []
    for path in nx.all_simple_paths(graph, Site("embed"), Site("logits")):
        links = [graph.edges[e].get("score") for e in pairwise(path)]
        found.append(min(abs(score) for score in links if score is not None))
    found.sort(reverse=True)
    paths = circuit.paths(k=6)
    assert [width for _, width in paths] == found[:6] and len(found) > 6
    for names, width in paths:
        scores = [s for e in pairwise(names) if (s := circuit.scores().get(e)) is not None]
        assert names[0] == "embed" and names[-1] == "logits" and min(map(abs, scores)) == width
    nodes = Circuit.from_nodes({"L0.H0": 3.0, "L1.H0": -1.0}, SMALL)
    assert nodes.paths("L0.H0", k=1)[0][1] == 3.0
    assert sorted(w for _, w in nodes.paths(k=99) if w < 3) == [1.0] * 12  # through L1.H0: 3 inputs × (1 + 3)
    with pytest.raises(CircuitError, match=r"L1\.H1 is not in the circuit"):
        nodes.paths("L1.H1")


def test_set_operations() -> None:
    a = Circuit.from_edges({("embed", "logits"): 1.0, ("L0.H0", "logits"): 2.0}, SMALL, {"model": "m", "n": 1})
    b = Circuit.from_edges({("embed", "logits"): 5.0, ("L0.H1", "logits"): 3.0}, SMALL, {"model": "m"})
    assert (a & b).scores() == {("embed", "logits"): 1.0}
    assert (a | b).scores() == {("embed", "logits"): 1.0, ("L0.H0", "logits"): 2.0, ("L0.H1", "logits"): 3.0}
    assert (a | b).meta["model"] == "m" and "n" not in (a | b).meta and (a | b).facts == SMALL
    assert a.jaccard(b) == 1 / 3 and a.jaccard(a) == 1 and a.top(n_edges=0).jaccard(b.top(n_edges=0)) == 1
    n, m = Circuit.from_nodes({"L0.H0": 1.0, "embed": 2.0}), Circuit.from_nodes({"L0.H0": 1.0, "L0.mlp": 1.0})
    assert n.jaccard(m) == 0.5 and (n & m).scores() == {"L0.H0": 1.0, "embed": 2.0}
    with pytest.raises(CircuitError, match="circuit of edges"):
        a & n
    with pytest.raises(CircuitError, match="two models"):
        a.jaccard(Circuit.from_edges({}, GROUPED))


def test_a_circuit_reads_as_a_list_of_heads() -> None:
    circuit = Circuit.from_nodes([(2, 3), (0, 1), "L1.mlp", (0, 0)], GROUPED, {"trajectory": [{"dropped": "L2.H0"}]})
    assert list(circuit) == [(0, 0), (0, 1), (2, 3)] and len(circuit) == 3
    assert circuit[0] == (0, 0) and circuit[-1] == (2, 3) and circuit[1:] == [(0, 1), (2, 3)]
    assert (0, 1) in circuit and (1, 1) not in circuit
    assert circuit.trajectory == [{"dropped": "L2.H0"}] and random_circuit().trajectory == []
    assert bool(Circuit.from_nodes(["L0.mlp"])) and not Circuit.from_edges({})
    assert not Circuit.from_nodes([])
    assert repr(random_circuit()) == "Circuit(eap, toy, 15 heads and MLPs, 190 edges)"
    shown = Circuit.from_edges({("embed", "logits"): 1.0}, SMALL, {"model": "<b>"})._repr_html_()
    assert "embed → logits" in shown and "&lt;b&gt;" in shown
