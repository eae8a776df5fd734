"""Circuits in other formats: JSON through the circuit itself, and GraphML; `eap_ig` has the format of EAP-IG."""

from __future__ import annotations

import io
import json
from xml.etree import ElementTree

import networkx as nx

from ..errors import CircuitError
from .circuit import Circuit
from .files import SCHEMA, VERSION, Items, Parts, Place, add, field, meta_text, read_bytes, refuse, typed, write_text
from .nodes import EMBED, Facts, node

from_json = Circuit.from_json


def to_json(circuit: Circuit, path: Place) -> None:
    """As `Circuit.to_json`."""
    circuit.to_json(path)


def to_graphml(circuit: Circuit, path: Place) -> None:
    """Write a circuit's graph as GraphML for other tools: ids are names, edges have kind and score.

    Raises:
        CircuitError: meta that JSON cannot hold, or a place that cannot be written.
    """
    facts = json.dumps(circuit.meta["facts"])
    graph = nx.DiGraph(schema=SCHEMA, version=VERSION, level=circuit.level, facts=facts, meta=meta_text(circuit))
    for site, data in circuit.graph.nodes(data=True):
        place = {name: value for name in ("layer", "head") if (value := getattr(site, name)) is not None}
        graph.add_node(site.node, kind=site.kind, **place, **data)
    graph.add_edges_from((a.node, b.node, data) for a, b, data in circuit.graph.edges(data=True))
    write_text(path, "\n".join(nx.generate_graphml(graph, named_key_ids=True)) + "\n")


def from_graphml(path: Place) -> Circuit:
    """Read a circuit from GraphML: one of `to_graphml`, or any directed graph with node names as ids.

    Where a graph does not say its level, it is of edges.

    Raises:
        CircuitError: no such file, no GraphML, a newer version, or a node or edge that no circuit has.
    """
    try:
        graph = nx.read_graphml(io.BytesIO(read_bytes(path)))
    except ElementTree.ParseError as error:
        line, column = error.position
        raise CircuitError(f"{path}: line {line}, column {column + 1}: {error.msg}") from error
    except (nx.NetworkXError, KeyError, ValueError) as error:
        raise CircuitError(f"{path}: not GraphML: {error}") from error
    if not graph.is_directed() or graph.is_multigraph():
        refuse(path, "edgedefault", "must be 'directed', with one edge between two nodes")
    about = graph.graph
    if (about.get("schema", SCHEMA), about.get("version", VERSION)) != (SCHEMA, VERSION):
        written = f"{about.get('schema')} {about.get('version')}"
        refuse(path, "schema", f"and version are {written}, not {SCHEMA} {VERSION}: written by another interp")
    level, parts = about.get("level", "edge"), {}
    for name in ("facts", "meta"):
        with field(path, name):
            parts[name] = json.loads(about.get(name, "null")) or {}
            typed(path, name, parts[name], dict)
    with field(path, "facts"):
        facts = Facts.of(parts["facts"]) if parts["facts"] else None
    items: Items = {}
    for name, data in graph.nodes(data=True) if level == "node" else ():
        with field(path, f"node {name}"):
            site = node(name)
            if site.facts.sends and (site != EMBED or "score" in data):
                add(items, (name,), data.get("score"), facts)
    for a, b, data in graph.edges(data=True) if level != "node" else ():
        with field(path, f"edge {a} -> {b}"):
            if data.get("kind") != "inside":
                add(items, (a, b), data.get("score"), facts)
    return Circuit.of(Parts(level, items, facts, parts["meta"]), path)
