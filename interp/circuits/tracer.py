"""Attribution graphs in the JSON that circuit-tracer's viewer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import networkx as nx
from torch import Tensor


class PromptGraph(Protocol):
    """What is written of a graph: `AttributionGraph` fulfils it."""

    @property
    def nodes(self) -> Sequence[str]: ...
    @property
    def tokens(self) -> Sequence[str]: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def logits(self) -> dict[str, float]: ...
    @property
    def meta(self) -> dict[str, Any]: ...
    @property
    def activations(self) -> Tensor: ...
    @property
    def influence(self) -> Tensor: ...
    @property
    def graph(self) -> nx.DiGraph: ...


def parsed(name: str) -> tuple[int, str, int]:
    """Layer (-1 for an embedding), label and position of a node that is no logit."""
    body, position = name.rsplit("@", 1)
    if body == "emb":
        return -1, "emb", int(position)
    layer, what = body[1:].split(".", 1)
    return int(layer), what.removeprefix("f"), int(position)


def as_tracer(graph: PromptGraph, slug: str) -> dict[str, object]:
    """`metadata`, `nodes` and `links` of a graph; its names of nodes are `layer_feature_position`."""
    last, layers = len(graph.tokens) - 1, graph.meta.get("n_layers", 0)
    ids: dict[str, str] = {}
    nodes = []
    for number, name in enumerate(graph.nodes):
        if name.startswith("logit:"):
            place = len([one for one in ids if one.startswith("logit:")])
            layer, feature, position, kind, clerp = str(layers), place, last, "logit", f'Output "{name[6:]}"'
        else:
            at, label, position = parsed(name)
            layer = "E" if at < 0 else str(at)
            feature = int(label) if label.isdigit() else (graph.prompt[position] if at < 0 else -1)
            kind = "embedding" if at < 0 else "mlp reconstruction error" if feature < 0 else "cross layer transcoder"
            clerp = f'Emb: "{graph.tokens[position]}"' if at < 0 else ""
        ids[name] = f"{layer}_{feature}_{position}" if feature >= 0 else f"0_{layer}_{position}_error"
        nodes.append({
            **node(ids[name], layer, feature, position, kind, clerp),
            "token_prob": graph.logits.get(name, 0.0), "is_target_logit": number == len(graph.nodes) - len(graph.logits),
            "influence": float(graph.influence[number]),
            "activation": float(graph.activations[number]) or None,
        })  # fmt: skip
    links = [(ids[a], ids[b], weight) for a, b, weight in graph.graph.edges(data="weight")]
    return document(slug, graph.meta.get("model"), graph.tokens, nodes, links)


def node(name: str, layer: str, feature: int, position: int, kind: str, said: str) -> dict[str, object]:
    """What every node has in the viewer's form."""
    return {
        "node_id": name, "feature": feature, "layer": layer, "ctx_idx": position, "feature_type": kind, "run_idx": 0,
        "reverse_ctx_idx": 0, "jsNodeId": f"{layer}_{feature}-{position}", "clerp": said,
    }  # fmt: skip


def document(
    slug: str,
    model: object,
    tokens: Sequence[str],
    nodes: list[dict[str, object]],
    links: Sequence[tuple[str, str, float]],
) -> dict[str, object]:
    """The whole file, links as source, target and weight; without tokens all stand at one place."""
    metadata = {
        "slug": slug, "scan": model, "prompt_tokens": list(tokens) or ["·"], "prompt": "".join(tokens), "node_threshold": None,
        "schema_version": 1,
    }  # fmt: skip
    parts = [{"source": source, "target": target, "weight": weight} for source, target, weight in links]
    return {"metadata": metadata, "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both"},
            "nodes": nodes, "links": parts}  # fmt: skip


#: Heads have no number among a layer's features: theirs begin here.
FIRST_HEAD = 1_000_000


def of_neurons(
    nodes: Mapping[str, float], edges: Mapping[tuple[str, str], float], meta: Mapping[str, object], slug: str
) -> dict[str, object]:
    """The same three parts of a graph of neurons and heads; effects are its activations, and all stand at one position."""
    top = sum(map(abs, nodes.values())) or 1.0
    ends = {"embed": ("E", "embedding"), "logits": (str(meta.get("n_layers", 0)), "logit")}
    made, ids = [], {}
    for name in [*nodes, "logits"]:
        layer, kind = ends.get(name, ("", ""))
        number = 0
        if not kind:
            layer, what = name[1:].split(".", 1)
            number = FIRST_HEAD + int(what[1:]) if what[0] == "H" else int(what.split("[")[1].rstrip("]"))
            kind = "cross layer transcoder"
        ids[name] = f"{layer}_{number}_0"
        last = kind == "logit"
        said = str(meta.get("metric")) if last else name
        made.append({
            **node(ids[name], layer, number, 0, kind, said), "token_prob": 0.0, "is_target_logit": last,
            "influence": abs(nodes.get(name, 0.0)) / top, "activation": nodes.get(name),
        })  # fmt: skip
    links = [(ids[a], ids[b], weight) for (a, b), weight in edges.items()]
    return document(slug, meta.get("model"), (), made, links)
