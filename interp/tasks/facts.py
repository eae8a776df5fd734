"""Factual recall: which city a country's capital is, or a landmark stands in."""

from __future__ import annotations

from random import Random

from ..errors import TaskError
from ..pairs import PromptPairs
from ..tokens import Tokenizer
from .build import Row, at_least_one, contrast, load, next_token, one_of, to_pairs, too_few

RELATIONS = ("capital", "landmark", "both")


def facts(tokenizer: Tokenizer, n: int = 32, seed: int = 0, *, relation: str = "capital") -> PromptPairs:
    """Factual recall: "The Eiffel Tower is in the city of" -> " Paris", against the Colosseum's " Rome".

    The corrupted prompt is another fact of the same relation whose subject has as many tokens; its answer is
    the distractor. Every subject is the clean one once before any comes again with another partner. Named
    positions: "subject", "end".

    Args:
        relation: "capital" (countries, mostly one token), "landmark" (several tokens), or "both".

    Raises:
        TaskError: too few cities that are one token of this tokenizer, or too few pairs of equal length.

    Meng et al. 2022, "Locating and Editing Factual Associations in GPT".
    """
    one_of("relation", relation, RELATIONS)
    at_least_one(n)
    rng = Random(seed)
    known = []
    every = [(r, subject, city) for r in load("facts")["relations"] for subject, city in r["facts"]]
    every = [fact for fact in every if relation in (fact[0]["name"], "both")]
    for r, subject, city in every:
        if next_token(tokenizer, r["template"].format(subject=subject), f" {city}") is not None:
            known.append((r["template"], subject, city))
    if len({city for _, _, city in known}) < 2:
        raise TaskError(
            f"only {len(known)} of {len(every)} cities are one token of this tokenizer after their prompt, "
            "and 2 different ones are needed; use another task, or write PromptPairs with cities it knows"
        )

    def against(fact: tuple[str, str, str], other: tuple[str, str, str]) -> Row | None:
        (template, subject, city), (other_template, other_subject, other_city) = fact, other
        if template != other_template or city == other_city:
            return None
        return contrast(
            tokenizer,
            template,
            {"subject": subject},
            {"subject": other_subject},
            [f" {city}"],
            [f" {other_city}"],
            positions={"subject": "subject"},
        )

    rng.shuffle(known)
    partners = {fact: iter(rng.sample(known, len(known))) for fact in known}
    rows: list[Row] = []
    while len(rows) < n:
        turn = [next((row for other in partners[fact] if (row := against(fact, other))), None) for fact in known]
        if not any(turn):
            raise too_few("facts", len(rows), n)
        rows += [row for row in turn if row]
    return to_pairs("facts", rows[:n])
