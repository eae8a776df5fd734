"""Running prompts once: their logits, and the activations of any site, under edits where there are some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .cached import Cache, ForwardPass, Name, site_named
from .edits import Edit
from .encoded import EncodedPairs
from .engine.program import Place, Program
from .engine.reading import Reading, grouped, last_layer, read_program, run_readings
from .engine.schedule import token_budget
from .engine.trace import Found
from .errors import SiteError
from .generation import Asked, check_edits, encode_given
from .models.model import Model
from .prompts import Given
from .sites import KIND, Site
from .views import Seen, View

#: Numbers of logits that one forward pass gives at most: every position of a prompt has a vocabulary of them.
LOGITS = 2**27


def run(
    model: Model,
    prompt: Given,
    sites: Name | View | Iterable[Name | View] | None = None,
    *,
    edits: Edit | Sequence[Edit] = (),
    logits: bool = True,
    max_tokens: int | None = None,
) -> ForwardPass:
    """One forward pass: logits, and a labelled cache of the sites asked for.

    Args:
        prompt: a string or token ids, or several of them.
        sites: `"L5.resid_post"`, `"L9.H6.z@-1"`, `"blocks.9.attn.hook_z"`, a `Site` (also of a view), `("z", 9)`, or a kind
            alone, `"resid_post"`, for every layer; one or several.
        edits: `interp.Edit`s that set, add or scale while it runs.
        logits: False leaves them out, and with them what runs above the last site.
        max_tokens: tokens in one forward pass, padding included; by default what the device takes.

    Returns:
        `ForwardPass(logits, cache)`: logits `[prompt, position, d_vocab]` fp32, and a `Cache` of xarray.DataArrays. Positions
        count from each prompt's own first token (a prefix that the model puts before strings is the first), NaN behind its end.

    Raises:
        SiteError: a site that this model does not have, or nothing asked for. AuditError: one that the audit refused.
        PairsError: a prompt that is none. PlanError: an edit that takes its value from another run.

    Examples:
        >>> logits, cache = model.run("The Eiffel Tower is in", sites=["L5.resid_post", "blocks.9.attn.hook_z"])
        >>> cache["L9.z"].dims
        ('prompt', 'position', 'head', 'd_head')
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    check_edits(edits, max_tokens)
    wanted = asked_sites(model, sites)
    if not wanted and not logits:
        raise SiteError("nothing is asked for: give sites, or leave logits=True")
    encoded = encode_given(model, prompt)
    asked = Asked.of(model, encoded, edits, "all")
    reads = {site.place: read_at(site) for sites in wanted.values() for site in sites}
    views = {
        read_at(site)[1]: site.view.seen() for sites in wanted.values() for site in sites if isinstance(site.view, View)
    }
    lengths = [len(ids) for ids in encoded.clean]
    budget = max_tokens or token_budget(model)
    if logits:
        budget = max(1, min(budget, LOGITS // model.vocab_size))
    make = partial(program_of, asked, list(reads.values()), views, logits)
    said: dict[int, Tensor] = {}
    found: dict[int, dict[Place, Tensor]] = {}

    def put(piece: Reading, result: Found) -> None:
        ends = np.cumsum([lengths[number] for number in piece.asked])
        for row, number in enumerate(piece.asked):
            if logits:
                said[number] = result["logits"][ends[row] - lengths[number] : ends[row]].float().cpu()
            found[number] = {
                place: own_part(place, result["reads"][at][row], lengths[number]) for place, at in reads.items()
            }

    run_readings(model, [Reading.of(group, make) for group in grouped(model, lengths, budget)], put)
    rows = [found[number] for number in range(len(lengths))]
    arrays = {key: array_of(sites, rows, encoded) for key, sites in wanted.items()}
    made = padded([said[number] for number in range(len(lengths))]) if logits else None
    return ForwardPass(made, Cache(arrays, model.n_layers))


def asked_sites(model: Model, sites: Name | View | Iterable[Name | View] | None) -> dict[str, list[Site]]:
    """What was asked for by its name in the cache: one site, or that of every layer.

    Raises:
        SiteError, AuditError: one that this model does not have, or that holds no numbers of its own.
    """
    single = isinstance(sites, str | Site | View) or (isinstance(sites, tuple) and isinstance(sites[-1], int))
    given: Given = () if sites is None else [sites] if single else sites
    made: dict[str, list[Site]] = {}
    for name in given:
        site = name.site(name.tap.layer) if isinstance(name, View) else site_named(name, model.n_layers)
        if not site.facts.width and not site.facts.layered:
            raise SiteError("the logits are what a run gives beside its cache: leave logits=True")
        every = site.facts.layered and site.layer is None
        at = (
            [model.require(site.at(layer=layer)) for layer in range(model.n_layers)] if every else [model.require(site)]
        )
        made[str(site)] = at
    return made


def read_at(site: Site) -> Place:
    """Where a program reads a site. A view has a name of its own there: the one that edits may be of some parts alone."""
    layer, kind = site.place
    return (layer, kind) if site.view is None else (layer, f"{kind} read")


def program_of(
    asked: Asked, reads: list[Place], views: dict[str, Seen], logits: bool, chosen: Sequence[int]
) -> Program:
    """The program over these prompts: edits at their own tokens, and logits of every token."""
    prompts, context = asked.prompts(chosen), asked.context
    every = context.views | views
    last = None if logits else last_layer(reads, every)
    edits = asked.tables(chosen)["prompt"]
    program = read_program(asked.model, prompts, reads, edits=edits, values=context.values, views=every, last=last)
    width = max(map(len, prompts))
    tokens = [(row, column) for row, ids in enumerate(prompts) for column in range(width - len(ids), width)]
    program["scored"], program["at"] = torch.tensor(tokens).unbind(1)
    program["want_logits"] = logits
    return program


def own_part(site: Place, value: Tensor, tokens: int) -> Tensor:
    """What a row `[position, …]` holds of its own tokens, without the padding before them; `[head, query, key]` of a pattern."""
    kind = KIND.get(site[1])
    value = value.float().cpu()
    return value[:, -tokens:, -tokens:] if kind is not None and kind.view == "mixture" else value[-tokens:]


def padded(values: Sequence[Tensor]) -> Tensor:
    """Tensors below one another, each filled up with NaN at its ends."""
    shape = [max(sizes) for sizes in zip(*(value.shape for value in values), strict=True)]
    out = torch.full((len(values), *shape), float("nan"))
    for row, value in enumerate(values):
        out[row][tuple(map(slice, value.shape))] = value
    return out


def array_of(sites: Sequence[Site], rows: Sequence[dict[Place, Tensor]], encoded: EncodedPairs) -> xr.DataArray:
    """One site of every prompt, or that of every layer, with its dims named."""
    site, many = sites[0], len(sites) > 1
    facts = site.facts
    mixture = facts.view == "mixture"
    axis = facts.axis.replace(" ", "_")
    values = padded([torch.stack([row[one.place] for one in sites]) for row in rows]).numpy()
    inner = (
        ("head", "query", "key")
        if mixture
        else ("position", *filter(None, (axis, "" if axis == "unit" else facts.width)))
    )
    spots = "query" if mixture else "position"
    labels = [[*own, *[""] * (max(map(len, encoded.labels)) - len(own))] for own in encoded.labels]
    array = xr.DataArray(values, dims=("prompt", "layer", *inner)).assign_coords(
        layer=[one.layer for one in sites], token=(("prompt", spots), np.array(labels))
    )
    for name in {*inner, "prompt"} - {"d_model", "d_head", "d_mlp"}:
        array = array.assign_coords({name: np.arange(array.sizes[name])})
    array = array if many else array.isel(layer=0)
    if site.part is not None:
        array = array.sel({axis: site.part})
    if site.position is not None:
        array = at_position(array, site, [len(ids) for ids in encoded.clean])
    return array.rename(str(site if not many else site.at(layer=None)))


def at_position(array: xr.DataArray, site: Site, lengths: Sequence[int]) -> xr.DataArray:
    """The values at one position of each prompt, counted from its own tokens.

    Raises:
        SiteError: a position that one of the prompts does not have.
    """
    position = site.position or 0
    dim = "position" if "position" in array.dims else "query"
    for number, length in enumerate(lengths):
        if not -length <= position < length:
            raise SiteError(f"site {site}: prompt {number} has {length} tokens, positions 0 to {length - 1}")
    own = xr.DataArray([position % length for length in lengths], dims="prompt")
    return array.isel({dim: own})
