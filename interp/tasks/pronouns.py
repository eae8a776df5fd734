"""Gendered pronouns: a name decides between " she" and " he"."""

from __future__ import annotations

from random import Random

from ..pairs import PromptPairs
from ..tokens import Tokenizer
from .build import Row, collect, contrast, fitting, load, pick, to_pairs


def pronouns(tokenizer: Tokenizer, n: int = 32, seed: int = 0, *, template: int | None = None) -> PromptPairs:
    """Gendered pronouns: "So Mary is a really great friend, isn't" -> " she", not " he".

    Half of the clean prompts name a woman, half a man; the corrupted prompt has a name of the other kind.
    Names are one token each. Named positions: "name", "end".

    Args:
        template: one template of the data file only; all by default.

    Raises:
        TaskError: too few single-token names for this tokenizer, or too few distinct pairs.

    Mathwin et al. 2023, "Identifying a Preliminary Circuit for Predicting Gendered Pronouns in GPT-2 Small".
    """
    data, names, rng = load("pronouns"), load("names"), Random(seed)
    templates = pick("template", data["templates"], template)
    female = fitting(tokenizer, names["female"], "So", 1, "women's names")
    male = fitting(tokenizer, names["male"], "So", 1, "men's names")
    kinds = [(female, male, " she", " he"), (male, female, " he", " she")]

    def draw(index: int) -> Row | None:
        own, other, answer, distractor = kinds[index % 2]
        return contrast(
            tokenizer,
            rng.choice(templates),
            {"name": rng.choice(own)},
            {"name": rng.choice(other)},
            [answer],
            [distractor],
            positions={"name": "name"},
            single=("name",),
        )

    return to_pairs("pronouns", collect(n, draw, "pronouns"))
