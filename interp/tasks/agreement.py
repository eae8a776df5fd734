"""Subject-verb agreement in number."""

from __future__ import annotations

from random import Random

from ..errors import TaskError
from ..pairs import PromptPairs
from ..tokens import Tokenizer
from .build import Row, collect, contrast, load, next_token, one_of, pick, to_pairs


def agreement(
    tokenizer: Tokenizer,
    n: int = 32,
    seed: int = 0,
    *,
    attractor: bool = False,
    verb: str | None = None,
    template: int | None = None,
) -> PromptPairs:
    """Subject-verb agreement: "The keys that you mentioned" -> " are", not " is".

    The corrupted prompt has the subject in the other number and nothing else changed. Half of the clean
    subjects are singular, half plural. Named positions: "subject", "end", and "attractor" where there is one.

    Args:
        attractor: put a noun of the clean subject's opposite number between subject and verb ("The key near
            the trees"), the same in both prompts.
        verb: "is", "was" or "has" only; all three by default.
        template: one template of the data file only; all by default.

    Raises:
        TaskError: too few nouns that are one token in both numbers, or too few distinct pairs.

    Linzen et al. 2016, "Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies"; Finlayson et
    al. 2021, "Causal Analysis of Syntactic Agreement Mechanisms in Neural Language Models".
    """
    data, rng = load("agreement"), Random(seed)
    verbs = [pair for pair in data["verbs"] if verb in (None, pair[0])]
    if not verbs:
        one_of("verb", verb, [pair[0] for pair in data["verbs"]])
    templates = pick("template", data["attractor_templates" if attractor else "templates"], template)
    nouns = [n for n in data["nouns"] if None not in [next_token(tokenizer, "The", f" {form}") for form in n]]
    if len(nouns) < 2:
        raise TaskError(
            f"only {len(nouns)} of {len(data['nouns'])} nouns are one token of this tokenizer in both "
            "numbers, and 2 are needed; use another task, or write PromptPairs with nouns it knows"
        )

    def draw(index: int) -> Row | None:
        number = index % 2  # 0 singular, 1 plural
        noun, between = rng.sample(nouns, 2)
        forms, chosen = rng.choice(verbs), rng.choice(templates)
        shared = {"attractor": between[1 - number]} if attractor else {}
        return contrast(
            tokenizer,
            chosen,
            shared | {"subject": noun[number]},
            shared | {"subject": noun[1 - number]},
            [f" {forms[number]}"],
            [f" {forms[1 - number]}"],
            positions={"subject": "subject"} | {field: field for field in shared},
            single=("subject", *shared),
        )

    return to_pairs("agreement", collect(n, draw, "agreement"))
