"""Gradients inside a forward pass: what attribution needs, reduced to small tensors where the model runs.

A gradient program has rows of both runs of each pair and no growth before layer 0; its fields stand in
`interp.engine.program`. Standard library and torch only: these functions also travel to a remote server.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..models.layout import Envoy, Taps, at, attention_pattern, attention_scores, output_matrix, part_index
from ..sites import KIND
from .views import by_part, parts_of, pulled, there

if TYPE_CHECKING:
    from .program import Place, Program

Gradients = dict["Place", Tensor]
#: Which of (query, key) is the source run's where the softmax is done exactly.
EXCHANGED = {"pattern": (True, True), "q": (True, False), "k": (False, True)}


class Tape:
    """Activations by site: the live tensor whose gradient is taken, and a copy of its value."""

    def __init__(self, wanted: set[Place]) -> None:
        self.wanted = wanted
        self.live: dict[Place, Tensor] = {}
        self.value: dict[Place, Tensor] = {}
        self.core: dict[int, dict[str, Any]] = {}
        self.logits: Tensor | None = None  # of the scored rows, before the metric

    def take(self, layer: int, kind: str, x: Tensor, live: Tensor | None = None) -> Tensor:
        """Keep an activation if it is wanted, and give what goes on in its place.

        That is a copy: what a block then changes in place (Falcon adds to it, OLMo clips it) is no longer the activation
        whose gradient is taken. `live` is the tensor in the graph where another cannot take its place.
        """
        if (layer, kind) not in self.wanted:
            return x
        self.live[layer, kind] = x if live is None else live
        self.value[layer, kind] = x.detach() if live is None else x.detach().clone()
        return x.clone() if live is None else x


def backward(tape: Tape, total: Tensor, sites: list[Place], retain: bool) -> dict[Place, Tensor]:
    """d total / d activation of every site; zero where the total does not depend on it."""
    live = [tape.live[site] for site in sites]
    by_site = torch.autograd.grad(total, live, allow_unused=True, retain_graph=retain)
    return {
        site: torch.zeros_like(tape.value[site]) if gradient is None else gradient.reshape(tape.value[site].shape)
        for site, gradient in zip(sites, by_site, strict=True)
    }


def with_drops(tape: Tape, total: Tensor, sites: list[Place], drop: list[int]) -> Iterator[dict[Place, Tensor]]:
    """The plain gradient, then one for every dropped layer: no gradient flows back through what that layer adds."""
    yield backward(tape, total, sites, retain=bool(drop))
    dropped: list[int] = []
    hooks = []
    for (layer, kind), x in tape.live.items():
        if drop and KIND[kind].branch:

            def cut(gradient: Tensor, layer: int = layer) -> Tensor:
                return torch.zeros_like(gradient) if dropped and dropped[-1] == layer else gradient

            hooks.append(x.register_hook(cut))
    for number, layer in enumerate(drop):
        dropped.append(layer)
        yield backward(tape, total, sites, retain=number + 1 < len(drop))
    for hook in hooks:
        hook.remove()


def difference(program: Program, x: Tensor) -> Tensor:
    """Source minus base activation `[pair, position, …]`, each base position against its own source position."""
    base, source = program["base"].to(x.device), program["source"].to(x.device)
    columns = program["columns"]
    other = x[source] if columns is None else x[source[:, None], columns.to(x.device)]
    return other - x[base]


def averaged(program: Program, gradient: Tensor, steps: Tensor | None = None) -> Tensor:
    """Gradients `[pair, position, …]`, averaged over the rows that belong to each pair."""
    rows = (program["gradient"] if steps is None else steps).to(gradient.device)
    return gradient[rows].mean(1)


def products(model: Envoy, taps: Taps, program: Program, tape: Tape, gradients: Gradients) -> Gradients:
    """(source − base) · gradient of every wanted site, summed over features.

    `[pair, position]`, with a head axis for kinds by head and a unit axis for hidden units and the parts of views.
    """
    sites = [(layer, kind) for layer, kind in program["tape"]]
    with torch.no_grad():  # weights and a view's functions may want gradients of their own
        return {site: product(model, taps, program, tape, gradients, site) for site in sites}


def product(model: Envoy, taps: Taps, program: Program, tape: Tape, gradients: Gradients, site: Place) -> Tensor:
    """`products` of one site: what its view reads, times what its view makes of the gradient at its tap."""
    layer, kind = site
    steps = program["steps"].get(site)
    seen = (program.get("views") or {}).get(kind)
    if seen is not None:
        tap = (layer, seen.tap)
        seen = there(seen, tape.value[tap].device)
        change = difference(program, parts_of(seen, tape.value[tap]))
        return (change * pulled(seen, averaged(program, gradients[tap], steps))).sum(-1)
    facts = KIND[kind]
    if facts.view == "mixture" and taps["pattern"] != "interface":
        change = difference(program, tape.value[site]) * averaged(program, gradients[site], steps)
        return change.sum(-1).transpose(1, 2)
    if facts.view == "mixture" or (kind in EXCHANGED and program["exact_qk"]):
        return through_softmax(taps, program, tape, gradients, layer, kind)
    if facts.view == "decoder":
        module = at(at(model, taps["layers"])[layer], taps["o"])
        whole = tape.value[layer, facts.through]
        by_head = output_matrix(module, part_index(taps, kind), whole)
        change = difference(program, by_part(taps, facts.through, whole))
        return torch.einsum("pthd,hdm,ptm->pth", change, by_head, averaged(program, gradients[site], steps))
    change = difference(program, by_part(taps, kind, tape.value[site]))
    made = change * averaged(program, by_part(taps, kind, gradients[site]), steps)
    return made if facts.axis == "unit" else made.sum(-1)


def through_softmax(taps: Taps, program: Program, tape: Tape, gradients: Gradients, layer: int, kind: str) -> Tensor:
    """Attribution of pattern rows, and of q and k with the softmax done exactly (AtP*, Kramár et al. 2024).

    The gradient of the pattern is that of z times v. A patched query changes its own row of the pattern; a patched key
    changes one logit of every later row, for which the new softmax has a closed form.
    """
    core, base, source = tape.core[layer], program["base"], program["source"]
    through = KIND["pattern"].through
    gz, value = by_part(taps, through, gradients[layer, through]), core["value"]
    rows = program["gradient"].to(gz.device)  # each row's own values: mixed runs have others than the base
    v = value[rows]
    if program["rule"] == "secant":  # a product: the mean of both ends
        v = (v + value[program["until"].to(v.device)]) / 2
    v = v.repeat_interleave(taps["n_heads"] // v.shape[2], dim=2)  # [pair, step, head, key, d_head]
    g = torch.einsum("psqhd,pshkd->phqk", gz[rows], v) / rows.shape[1]
    options, query, key = core["options"], core["query"], core["key"]

    def mask_of(rows: Tensor) -> Tensor | None:
        mask = core["mask"]
        return mask if mask is None or mask.shape[0] == 1 else mask[rows.to(mask.device)]

    new_query, new_key = EXCHANGED[kind]
    if new_query:
        p = attention_pattern(query[base], key[base], mask_of(base), options)
        rows = source if new_key else base
        new = attention_pattern(query[source], key[rows], mask_of(rows), options)
        return ((new - p) * g).sum(-1).transpose(1, 2)
    old, changed = (dot_products(query[base], key[rows], options) for rows in (base, source))
    change = one_key_changed(attention_scores(query[base], key[base], mask_of(base), options), changed - old, g)
    by_key = change.sum(2).unflatten(1, (taps["n_kv_heads"], -1)).sum(2)  # over queries, then over the group's heads
    return by_key.transpose(1, 2).to(g.dtype)


def one_key_changed(scores: Tensor, change: Tensor, g: Tensor) -> Tensor:
    """How much Σ g·softmax(scores) changes when one score alone changes: `[row, head, query, key]`, for each score.

    In double precision and from log-odds, so that it is right where the softmax is saturated. The key of the largest
    score has its own sums over the others: what is left beside it may be less than rounding.
    """
    floor = torch.finfo(scores.dtype).min / 2
    allowed, scores, g = scores > floor, scores.double(), g.double()
    g = torch.nn.functional.pad(g, (0, scores.shape[-1] - g.shape[-1]))  # a sink has no value
    keys = change.shape[-1]
    top = torch.zeros_like(allowed).scatter(-1, scores.argmax(-1, keepdim=True), True)
    beside = scores.masked_fill(top, float("-inf"))
    total = scores.logsumexp(-1, keepdim=True)
    p = (scores - total).exp()
    rest = beside.logsumexp(-1, keepdim=True) - total  # log(1 - p)
    rest = torch.where(top, rest, torch.log1p(-p.masked_fill(top, 0)))
    mean = (p * g).sum(-1, keepdim=True)
    among = (beside.softmax(-1).nan_to_num() * g).sum(-1, keepdim=True)
    others = torch.where(top, among, (mean - p * g) / (1 - p.masked_fill(top, 0)))  # mean of g over the other keys
    new = torch.sigmoid((scores - total - rest)[..., :keys] + change.double())
    moved = new * g[..., :keys] + (1 - new) * others[..., :keys] - mean
    return moved.masked_fill(~allowed[..., :keys], 0)


def dot_products(query: Tensor, key: Tensor, options: dict[str, Any]) -> Tensor:
    """Attention logits before the mask `[row, head, query, key]`."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scaling = options.get("scaling")
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    cap = options.get("softcap")
    return scores if cap is None else torch.tanh(scores / cap) * cap


def wanted_tapes(taps: Taps, program: Program) -> set[Place]:
    """Every site that must be taped for the wanted ones."""
    views = program.get("views") or {}
    needed: set[Place] = set()
    for layer, kind in program["tape"]:
        if kind in views:
            needed.add((layer, views[kind].tap))
            continue
        facts = [KIND[kind]]
        if kind in EXCHANGED and program["exact_qk"]:
            facts.append(KIND["pattern"])
        for one in facts:
            needed.add((layer, one.name))
            if one.through and (one.view != "mixture" or taps["pattern"] == "interface"):
                needed.add((layer, one.through))
    if program["drop"]:
        needed.update((layer, kind.name) for layer in range(taps["n_layers"]) for kind in KIND.values() if kind.branch)
    return needed


def total_of(program: Program, scores: Tensor) -> Tensor:
    """The sum of the metric over the rows whose gradients are wanted."""
    rows = program["gradient"].unique()
    if program["steps"]:
        rows = torch.cat([steps.flatten() for steps in program["steps"].values()])
    return scores[rows.to(scores.device)].sum()


def slope(program: Program, tape: Tape, scores: Tensor) -> float:
    """The largest |d metric / d logit| where gradients are taken: nothing can be estimated where this is zero."""
    assert tape.logits is not None
    (gradient,) = torch.autograd.grad(total_of(program, scores), tape.logits, retain_graph=True)
    return float(gradient.abs().max())


def attributions(model: Envoy, taps: Taps, program: Program, tape: Tape, scores: Tensor) -> Gradients:
    """Estimated change of the metric at every site if it alone took the source run's activation.

    `[1 + dropped, pair, position, …]`: the plain estimate, then one for every dropped layer.
    """
    total = total_of(program, scores)
    sites = [site for site in tape.live if site in tape.wanted]
    every = with_drops(tape, total, sites, list(program["drop"]))
    made = [products(model, taps, program, tape, gradients) for gradients in every]
    return {site: torch.stack([one[site] for one in made]) for site in made[0]}
