"""Indirect object identification."""

from __future__ import annotations

from random import Random

from ..pairs import PromptPairs
from ..tokens import Tokenizer
from .build import Row, collect, contrast, fitting, load, one_of, pick, to_pairs

CORRUPTIONS = ("flip", "random-names")
ORDERS = ("both", "ABBA", "BABA")


def ioi(
    tokenizer: Tokenizer,
    n: int = 32,
    seed: int = 0,
    *,
    corruption: str = "flip",
    order: str = "both",
    template: int | None = None,
) -> PromptPairs:
    """Indirect object identification: "Then, Mary and John went ... John gave a book to" -> " Mary".

    Answers are the indirect object's name (IO), distractors the repeated subject's (S). Names, places and
    things are one token each, so prompts of one template all have the same shape. Named positions: "IO",
    "S1", "S2", "place", "thing", "end".

    Args:
        corruption: "flip" puts IO in the place of the second S, which turns the right answer round;
            "random-names" puts three other names everywhere (the ABC distribution), which leaves no answer.
        order: "ABBA" (IO first), "BABA" (S first), or both.
        template: one template of the data file only; all by default.

    Raises:
        TaskError: too few names, places or things that are one token, or too few distinct pairs.

    Wang et al. 2022, "Interpretability in the Wild: a Circuit for Indirect Object Identification in GPT-2
    small".
    """
    one_of("corruption", corruption, CORRUPTIONS)
    one_of("order", order, ORDERS)
    data, by_gender, rng = load("ioi"), load("names"), Random(seed)
    names = fitting(tokenizer, [*by_gender["female"], *by_gender["male"]], "Then,", 5, "names")
    places = fitting(tokenizer, data["places"], "They went to the", 1, "places")
    things = fitting(tokenizer, data["things"], "They gave a", 1, "things")
    templates = pick("template", data["templates"], template)

    def draw(index: int) -> Row | None:
        io, s, *others = rng.sample(names, 5)
        io_first = order == "ABBA" or (order == "both" and index % 2 == 0)
        scene = {"place": rng.choice(places), "thing": rng.choice(things)}
        clean = {"A": io, "B": s} if io_first else {"A": s, "B": io}
        corrupted = clean | {"S": io} if corruption == "flip" else dict(zip("ABS", others, strict=True))
        return contrast(
            tokenizer,
            rng.choice(templates),
            scene | clean | {"S": s},
            scene | corrupted,
            [f" {io}"],
            [f" {s}"],
            positions={"IO": "A" if io_first else "B", "S1": "B" if io_first else "A", "S2": "S"}
            | {field: field for field in scene},
            single=("A", "B", "S", "place", "thing"),
        )

    return to_pairs("ioi", collect(n, draw, "ioi"))
