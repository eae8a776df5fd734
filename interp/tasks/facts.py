"""Factual recall: which city a country's capital is, who wrote a book, what a model knows of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from ..errors import TaskError
from ..pairs import PromptPairs
from ..tokens import Tokenizer
from .build import Row, at_least_one, contrast, load, one_of, to_pairs, too_few
from .known import KNOWN, Fact, ranks

if TYPE_CHECKING:  # tasks are imported with interp, which is to cost nothing
    import pandas as pd

    from ..models.model import Model

#: Names that stand for several relations; "all" is every one.
SEVERAL = {"both": ("capital", "landmark")}


def facts(
    tokenizer: Tokenizer,
    n: int = 32,
    seed: int = 0,
    *,
    relation: str | Sequence[str] = "capital",
    template: int = 0,
    known_by: Model | None = None,
    known: str = "argmax",
) -> PromptPairs:
    """Factual recall: "The Eiffel Tower is in the city of" -> " Paris", against the Colosseum's " Rome".

    The corrupted prompt is another fact of the same relation whose subject has as many tokens; its answer is
    the distractor. Every subject is the clean one once before any comes again with another partner. Named
    positions: "subject", "end".

    Args:
        relation: "capital" (countries, mostly one token), "landmark" (several tokens), any other that
            `facts_table().relation` holds, several of them, "both" (those two) or "all".
        template: which of a relation's three wordings, 0 to 2.
        known_by: a model; only facts that it knows are taken, for the clean prompts and the corrupted ones.
        known: what that means: "argmax", no token scores above the answer; "choice", none of the relation's other
            answers does (a small model knows a fact, but would begin with " the").

    Raises:
        TaskError: an unknown relation, too few answers that are one token of this tokenizer, too few facts that the
            model knows, or too few pairs of equal length.

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT".
    """
    one_of("known", known, list(KNOWN))
    at_least_one(n)
    every = facts_of(relation, template)
    fit = [fact for fact in every if fact.token(tokenizer) is not None]
    if not several_answers(fit):
        raise TaskError(
            f"only {len(fit)} of {len(every)} answers are one token of this tokenizer after their prompt, "
            "and 2 different ones of a relation are needed; use another relation, or write PromptPairs with answers it knows"
        )
    said = "facts"
    if known_by is not None:
        count, fit = len(fit), [fact for fact, r in zip(fit, ranks(known_by, fit, known), strict=True) if r == 0]
        said = f"facts, of which {known_by.name} knows {len(fit)} of {count} (known={known!r}),"
        if not several_answers(fit):
            other = "known='choice', " if known == "argmax" else ""
            raise TaskError(
                f"{known_by.name} knows {len(fit)} of {count} facts of relation={relation!r} (known={known!r}), and 2 "
                f"with different answers are needed; use {other}another template= or relation=, or relation='all'"
            )
    return to_pairs("facts", rows_of(tokenizer, fit, n, Random(seed), said))


def rows_of(tokenizer: Tokenizer, fit: list[Fact], n: int, rng: Random, said: str) -> list[Row]:
    """`n` pairs of these facts, each subject once before any comes again. TaskError: there are not so many."""

    def against(fact: Fact, other: Fact) -> Row | None:
        if fact.template != other.template or fact.answer == other.answer:
            return None
        return contrast(
            tokenizer,
            fact.template,
            {"subject": fact.subject},
            {"subject": other.subject},
            [f" {fact.answer}"],
            [f" {other.answer}"],
            positions={"subject": "subject"},
        )

    rng.shuffle(fit)
    partners = {fact: iter(rng.sample(fit, len(fit))) for fact in fit}
    rows: list[Row] = []
    while len(rows) < n:
        turn = [next((row for other in partners[fact] if (row := against(fact, other))), None) for fact in fit]
        if not any(turn):
            raise too_few(said, len(rows), n)
        rows += [row for row in turn if row]
    return rows[:n]


def facts_table(
    relation: str | Sequence[str] = "all",
    *,
    template: int = 0,
    tokenizer: Tokenizer | None = None,
    known_by: Model | None = None,
) -> pd.DataFrame:
    """The facts, one a row: relation, property (of Wikidata), subject, answer, prompt.

    Args:
        relation, template: as in `facts`.
        tokenizer: adds `single`, whether the answer is one token behind the prompt; `known_by`'s own where none is given.
        known_by: a model; adds `rank`, how many tokens it scores above the answer (NaN where its tokenizer makes it several
            tokens), and what it knows as `facts` has it: `argmax` and `choice`.

    Raises:
        TaskError: an unknown relation or template, or what is no model.
    """
    import pandas as pd

    every = facts_of(relation, template)
    columns = ["relation", "property", "subject", "answer", "prompt"]
    rows = [(fact.relation, fact.wikidata, fact.subject, fact.answer, fact.prompt) for fact in every]
    table = pd.DataFrame(rows, columns=columns)
    found = {} if known_by is None else {known: ranks(known_by, every, known) for known in KNOWN}
    tokenizer = tokenizer or getattr(known_by, "tokenizer", None)
    if tokenizer is not None:
        table["single"] = [fact.token(tokenizer) is not None for fact in every]
    if found:
        table["rank"] = pd.array(found["argmax"], dtype="float64")
        for known, values in found.items():
            table[known] = [value == 0 for value in values]
    return table


def facts_of(relation: str | Sequence[str], template: int) -> list[Fact]:
    """The facts of one relation or several, in the order of the file. TaskError: an unknown relation or template."""
    relations = {entry["name"]: entry for entry in load("facts")["relations"]}
    names = list(relation) if isinstance(relation, list | tuple | set) else [relation]
    groups = SEVERAL | {"all": tuple(relations)}
    wanted = [name for given in names for name in (groups.get(given, (given,)) if isinstance(given, str) else (given,))]
    for name in wanted:
        one_of("relation", name, [*relations, *groups])
        one_of("template", template, range(len(relations[name]["templates"])))
    if not wanted or len(set(wanted)) < len(wanted):
        again = [name for name, count in Counter(wanted).items() if count > 1]
        raise TaskError(f"relation={relation!r} holds {again or 'no name'}" + (" twice" if again else "; give one"))
    return [
        Fact(name, entry["property"], entry["templates"][template], subject, answer)
        for name, entry in relations.items()
        if name in wanted
        for subject, answer in entry["facts"]
    ]


def several_answers(facts: Sequence[Fact]) -> bool:
    """Whether one relation at least has facts of two different answers."""
    answers: dict[str, set[str]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, set()).add(fact.answer)
    return any(len(known) > 1 for known in answers.values())
