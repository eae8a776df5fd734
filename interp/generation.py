"""Generation under edits: tokens made one after another, with activations changed at every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cells import Cell, Resolved
from .edits import Edit
from .encoded import EncodedPairs
from .engine.context import Context, Runs, context_of
from .engine.program import Program
from .engine.reading import Reading, encode_prompts, entry, grouped, read_program, run_readings
from .engine.schedule import rows_are_apart, token_budget
from .engine.trace import Found, generated
from .errors import PlanError, SiteError
from .generated import Generation
from .journal import experiment
from .models.model import Model
from .options import Options
from .plan import sets
from .prompts import Given, is_ids
from .tokens import Text, Tokens

#: Where edits without a position of their own hold.
WHERE = ("all", "prompt", "generated")


@experiment
def generate(
    model: Model,
    prompt: Given,
    edits: Sequence[Edit] = (),
    steps: int = 20,
    *,
    positions: str = "all",
    logits: bool = False,
    stop: bool = True,
    cache: bool = True,
    max_tokens: int | None = None,
) -> Generation:
    """The most likely next token, `steps` times, with edits that hold while tokens are made.

    Args:
        prompt: a string or token ids, or several of them.
        edits: `interp.Edit`s that set, add or scale; of a feature in the delta form x + D(f′ − f). One whose site has a position
            holds at that token of the prompt alone (from each prompt's own first token, or negative from its end).
        positions: where edits without a position hold: "all", at the "prompt"'s tokens, or at "generated" ones as they are read
            again (the first of them is chosen before any is).
        logits: return them, too.
        stop: a prompt ends with the model's own end token.
        cache: keys and values of earlier tokens are kept; the numbers are the same, and faster. Whatever is asked for, they are
            not kept where the numbers would differ: rotary frequencies that depend on the length of the whole, edits of keys
            behind the rotary embedding, activations quantised over the batch (there each prompt also runs alone).

    Raises:
        PlanError: what is no edit; one that takes its value from another run, or that differs by position; a word that is none
            of the three; no step.
        SiteError, AuditError: a site that this model does not have, or a position that a prompt does not have.
        PairsError: a prompt that is none, or too long.
    """
    edits = [edits] if isinstance(edits, Edit) else list(edits)
    check_asked(steps, positions)
    check_edits(edits, max_tokens)
    encoded = encode_given(model, prompt)
    longest = max(map(len, encoded.clean))
    model.check_length(
        "the prompt with what is made", longest + steps - 1, "make fewer tokens, or give a shorter prompt"
    )
    asked, apart = Asked.of(model, encoded, edits, positions), rows_are_apart(model)
    changes = bool(model.taps["rotary"]) or not apart or any(edit.site.facts.behind_cache for edit in edits)
    spec: dict[str, Any] = {
        "steps": steps,
        "end": ends_of(model) if stop else [],
        "cache": asked.context.cache_class if cache and not changes else None,
        "keep": logits,
    }
    found: dict[int, Found] = {}

    def put(piece: Reading, result: Found) -> None:
        for row, number in enumerate(piece.asked):
            found[number] = {key: None if value is None else value[row] for key, value in result.items()}

    lengths = [len(one) + steps for one in encoded.clean]
    groups = grouped(model, lengths, max_tokens or token_budget(model))
    pieces = [Reading.of(group, lambda chosen: asked.program(chosen, spec)) for group in groups]
    run_readings(model, pieces, put, generated, None, ("tokens", False))
    return made_of(model, encoded, [found[number] for number in range(len(encoded))], spec["end"])


def check_asked(steps: int, positions: str) -> None:
    """PlanError: what no prompt could be continued with."""
    if positions not in WHERE:
        raise PlanError(f"positions={positions!r}; it is one of {', '.join(WHERE)}")
    if not hasattr(steps, "__index__") or steps < 1:
        raise PlanError(f"steps={steps!r}: make 1 token or more, a whole number of them")


def check_edits(edits: Sequence[Edit], max_tokens: int | None) -> None:
    """PlanError: what is no edit, or one that a run by itself has no value for."""
    Options(max_tokens=max_tokens)
    for edit in edits:
        if not isinstance(edit, Edit):
            raise PlanError(f"edits holds {edit!r}; write interp.Edit(interp.Site.parse('L8.resid_post'), 'add', …)")
        if edit.op == "replace":
            raise PlanError(f"{edit.site} is to be replaced, and there is no second run: set it, add to it or scale it")


def check_places(cell: Cell, encoded: EncodedPairs) -> None:
    """SiteError: a position that one of the prompts does not have; there the edit would be left out, and nobody see it."""
    for edit, place in cell.edits:
        for number, ids in enumerate(encoded.clean):
            if edit.site.position is not None and place.columns(encoded, number) is None:
                raise SiteError(
                    f"site {edit.site}: prompt {number} has {len(ids)} tokens, positions 0 to {len(ids) - 1}; give prompts "
                    "that have it together, and the others without this edit"
                )


def encode_given(model: Model, prompt: Given) -> EncodedPairs:
    """One prompt or several as tokens. PairsError: what is none."""
    return encode_prompts(model, [prompt] if is_ids(prompt) else prompt)


def ends_of(model: Model) -> list[int]:
    """The tokens with which the model ends a text."""
    holders = (getattr(model.hf, "generation_config", None), model.hf.config.get_text_config(), model.tokenizer)
    known = [ends for holder in holders if (ends := getattr(holder, "eos_token_id", None)) is not None]  # it may be 0
    ends = known[0] if known else []
    return [ends] if isinstance(ends, int) else list(ends)


@dataclass(frozen=True)
class Asked:
    """Edits of some prompts, as programs over any of them."""

    model: Model
    encoded: EncodedPairs
    context: Context
    cell: Cell
    positions: str

    @classmethod
    def of(cls, model: Model, encoded: EncodedPairs, edits: Sequence[Edit], positions: str) -> Asked:
        """Edits checked against the model and the prompts. PlanError, SiteError: see `generate`."""
        resolved = sets({"edits": list(edits)}).resolve(model, encoded) if edits else Resolved((), (), {})
        cell = resolved.cells[0] if resolved.cells else Cell((0,))
        check_places(cell, encoded)
        context = context_of(model, Runs(encoded), resolved, "prefix")
        if moving := [site for site, values in context.values.items() if values.shape[1] > 1]:
            raise PlanError(
                f"the value of the edit at layer {moving[0][0]}, {moving[0][1]} differs by position; give [feature]"
            )
        return cls(model, encoded, context, cell, positions)

    def prompts(self, chosen: Sequence[int]) -> list[Tokens]:
        """The token ids of these prompts."""
        return [self.encoded.clean[number] for number in chosen]

    def tables(self, chosen: Sequence[int]) -> dict[str, list[tuple[int, ...]]]:
        """The edits of these prompts at their own tokens, while the "prompt" is read and "later"."""
        prompts = self.prompts(chosen)
        width = max(map(len, prompts))
        tables: dict[str, list[tuple[int, ...]]] = {"prompt": [], "later": []}
        for row, number in enumerate(chosen):
            shift = width - len(prompts[row])
            for edit, place in self.cell.edits:
                found = place.columns(self.encoded, number) if edit.site.position is not None else None
                for at in found[0] if found else ():
                    tables["prompt"].append(self.entry(edit, row, at + shift))
                for name, word in (("prompt", "prompt"), ("later", "generated")):
                    if edit.site.position is None and self.positions in ("all", word):
                        tables[name].append(self.entry(edit, row))
        return tables

    def program(self, chosen: Sequence[int], spec: dict[str, Any]) -> Program:
        """The program over these prompts, whose edits are those at their own tokens."""
        prompts, tables = self.prompts(chosen), self.tables(chosen)
        values, views = self.context.values, self.context.views
        program = read_program(self.model, prompts, edits=tables["prompt"], values=values, views=views)
        later = read_program(self.model, prompts, edits=tables["later"])["edits"]
        program["generation"] = {**spec, "later": later}
        return program

    def entry(self, edit: Edit, row: int, column: int = -1) -> tuple[int, ...]:
        """An edit of one row as tables have it; column -1 is everywhere."""
        part, value = self.context.part(edit.site), self.context.value_index(edit)
        views = list(self.context.views)
        return entry(*edit.site.place, edit.op, row, views, column=column, part=part, value=value)


def made_of(model: Model, encoded: EncodedPairs, found: Sequence[Found], ends: Sequence[int]) -> Generation:
    """What a person gets: each prompt's tokens up to its end."""
    tokens, steps = [], max(len(one["tokens"]) for one in found)
    for one in found:
        ids = one["tokens"].tolist()
        stops = [place for place, token in enumerate(ids) if token in ends]
        tokens.append(tuple(ids[: stops[0] + 1] if stops else ids))
    reader = Text(model.tokenizer)
    decode = getattr(model.tokenizer, "decode", None)
    text = tuple(decode(list(ids)) if decode else "".join(map(reader.label, ids)) for ids in tokens)
    logits = None
    if found[0]["logits"] is not None:
        logits = torch.full((len(found), steps, found[0]["logits"].shape[-1]), float("nan"))
        for row, (one, ids) in enumerate(zip(found, tokens, strict=True)):
            logits[row, : len(ids)] = one["logits"][: len(ids)]
    return Generation(tuple(encoded.clean), tuple(tokens), text, logits)
