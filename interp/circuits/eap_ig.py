"""The graph JSON of EAP-IG (Hanna et al. 2024, `Graph.to_json` and `Graph.from_json`), read and written.

Its nodes are `input`, `a0.h1`, `m0` and `logits`; an edge is `a0.h1->a2.h3<q>` or `a0.h1->m0`.
"""

from __future__ import annotations

import json
import math
import re

from ..errors import CircuitError
from ..sites import Site
from .circuit import Circuit
from .files import Item, Items, Parts, Place, add, field, read_json, refuse, typed, write_text
from .nodes import EMBED, LOGITS, Described, Facts, is_head, is_input

_NODE = re.compile(r"^(?:a(\d+)\.h(\d+)|m(\d+)|input|logits)(?:<([qkv])>)?$")


def to_eap_ig(circuit: Circuit, path: Place, facts: Described = None, *, d_model: int | None = None) -> None:
    """Write the graph JSON that EAP-IG's `Graph.from_json` reads: every edge of the model, kept or not.

    EAP-IG has a k and a v for every query head. The edge of a grouped k or v is written once for each head of
    its group, with an equal share of the score. Edges not in the circuit, or without a score, have score 0.

    Args:
        circuit, path: what to write, and where.
        facts: of the model, where the circuit does not know them.
        d_model: width of the residual stream, which the format wants; by default `meta["d_model"]`.

    Raises:
        CircuitError: no facts or d_model, an edge that the model lacks, or a place that cannot be written.
    """
    known = Facts.of(facts) if facts is not None else circuit.facts
    width = circuit.meta.get("d_model") if d_model is None else d_model
    if known is None or width is None:
        missing = "the facts of its model" if known is None else "d_model"
        raise CircuitError(f"EAP-IG's format needs {missing}: pass {'facts' if known is None else 'd_model'}=")
    kept, scores = circuit.matrix(known), circuit.scores()
    cfg = {
        "n_layers": known.n_layers, "n_heads": known.n_heads, "parallel_attn_mlp": known.parallel,
        "d_model": int(width),
    }  # fmt: skip
    nodes: dict[str, object] = {}
    for site in (*known.senders, LOGITS):
        within = site in (EMBED, LOGITS) or (circuit.level == "node" and site in circuit.graph)
        within |= bool(site in known.sender_index and kept[known.sender_index[site]].any())
        score = scores.get(site.node) if circuit.level == "node" else None
        nodes[_eap(site)] = {"in_graph": within, **({} if score is None else {"score": score})}
    edges: dict[str, object] = {}
    for r, receiver in enumerate(known.receivers):
        heads = known.heads_behind(receiver) or (receiver,)
        slot = f"<{receiver.kind}>" if is_input(receiver) else ""
        for s, sender in enumerate(known.senders[: known.upstream_count(receiver)]):
            share = scores.get((sender.node, receiver.node), 0.0) / len(heads)
            for head in heads:
                name = f"{_eap(sender)}->{_eap(head)}{slot}"
                edges[name] = {"score": share, "in_graph": bool(kept[s, r])}
    write_text(path, json.dumps({"cfg": cfg, "nodes": nodes, "edges": edges}))


def from_eap_ig(path: Place, *, n_kv_heads: int | None = None, only_kept: bool = True) -> Circuit:
    """Read a graph JSON of EAP-IG (`Graph.to_json`).

    The circuit is one of nodes where nodes have scores and no edge has one, else one of edges.

    Args:
        path: the file.
        n_kv_heads: of the model, where it has fewer than query heads: the edges of a group's k (or v) become
            one, with the sum of their scores, kept where one of them is.
        only_kept: read what is `in_graph`; False: everything, with its scores.

    Raises:
        CircuitError: no such file, no JSON, or a field that is missing or wrong.
    """
    data = read_json(path)
    for name in ("cfg", "nodes", "edges"):
        if name not in data:
            refuse(path, name, "is missing")
        typed(path, name, data[name], dict)
    cfg, names = data["cfg"], {"n_layers": "n_layers", "n_heads": "n_heads", "parallel_attn_mlp": "parallel"}
    for name in names:
        if name not in cfg:
            refuse(path, f"cfg.{name}", "is missing")
    known = {ours: cfg[name] for name, ours in names.items()}
    with field(path, "cfg"):
        facts = Facts.of({**known, "n_kv_heads": n_kv_heads or cfg["n_heads"]})
        full = Facts.of({**known, "n_kv_heads": cfg["n_heads"]})
    nodes: Items = {}
    for name, entry in data["nodes"].items():
        with field(path, f"nodes[{json.dumps(name)}]"):
            entry = entry if isinstance(entry, dict) else {"in_graph": entry}
            site, score = _from_eap(name), entry.get("score")
            if not isinstance(entry.get("in_graph"), bool):
                raise CircuitError(f"in_graph must be true or false, not {entry.get('in_graph')!r}")
            unscored = score is None or (isinstance(score, float) and math.isnan(score))  # NaN: never scored
            if site != LOGITS and (entry["in_graph"] or not only_kept) and not (site == EMBED and unscored):
                add(nodes, (site,), None if unscored else score, full)
    edges: Items = {}
    kept: set[Item] = set()
    group = full.n_heads // facts.n_kv_heads
    for name, entry in data["edges"].items():
        with field(path, f"edges[{json.dumps(name)}]"):
            start, arrow, end = name.partition("->")
            one: Items = {}
            if not arrow or not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), bool):
                raise CircuitError('an edge is "a->b": {"score": number, "in_graph": true or false}')
            add(one, (_from_eap(start), _from_eap(end)), entry.get("score"), full, required=True)
            (((sender, receiver), score),) = one.items()
            if receiver.axis == "kv head":
                receiver = receiver.at(head=receiver.head // group)
            edges[sender, receiver] = (edges.get((sender, receiver)) or 0.0) + (score or 0.0)
            kept |= {(sender, receiver)} if entry["in_graph"] or not only_kept else set()
    meta = {key: cfg[key] for key in ("d_model",) if key in cfg}
    if any(score is not None for score in nodes.values()) and not any(edges.values()):
        return Circuit.of(Parts("node", nodes, facts, meta), path)
    return Circuit.of(Parts("edge", {edge: score for edge, score in edges.items() if edge in kept}, facts, meta), path)


def _eap(site: Site) -> str:
    if site.layer is None:
        return "input" if site == EMBED else site.kind
    return f"a{site.layer}.h{site.head}" if is_head(site) else f"m{site.layer}"


def _from_eap(name: str) -> Site:
    match = _NODE.match(name)
    if not match:
        raise CircuitError(f"{name!r} is no node of EAP-IG: they are input, a0.h1, a0.h1<q>, m0 and logits")
    layer, head, mlp, slot = match.groups()
    if layer is not None:
        return Site(slot or "head_out", int(layer), int(head))
    return Site("mlp_out", int(mlp)) if mlp is not None else {"input": EMBED, "logits": LOGITS}[name]
