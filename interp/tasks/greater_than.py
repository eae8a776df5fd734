"""Greater-than: the end year of an event comes after its start year."""

from __future__ import annotations

from random import Random

from ..errors import TaskError
from ..pairs import PromptPairs
from ..tokens import Tokenizer
from .build import Row, collect, contrast, load, next_token, pick, to_pairs, token_ids

PROBE = "The war lasted from the year 17"


def greater_than(tokenizer: Tokenizer, n: int = 32, seed: int = 0, *, template: int | None = None) -> PromptPairs:
    """Greater-than: "The war lasted from the year 1732 to the year 17" -> any later year's next token.

    Answers are the set of tokens that make the end year later than the start year, distractors the set of
    those that do not. Where two digits are one token (GPT-2) these are "33".."99" and "00".."32", less those
    that merge with the century into another token. Where every digit is a token (SmolLM2) they are tens
    digits, above the start's and below it; the start's own tens digit is in neither set unless no year with
    it is later. The corrupted prompt starts in the year "01", after which nearly every year is later. Named
    positions: "noun", "XX" (century), "YY" (year in the century), "end".

    Args:
        template: one template of the data file only; all by default.

    Raises:
        TaskError: a tokenizer that splits years in another way, or too few distinct pairs.

    Hanna et al. 2023, "How does GPT-2 compute greater-than?: Interpreting mathematical abilities in a
    pre-trained language model".
    """
    data, rng = load("greater_than"), Random(seed)
    templates = pick("template", data["templates"], template)
    pairs_of_digits = next_token(tokenizer, PROBE, "32") is not None
    single_digits = None not in (next_token(tokenizer, PROBE, "3"), next_token(tokenizer, PROBE + "3", "2"))
    if not pairs_of_digits and not single_digits:
        split = tokenizer.convert_ids_to_tokens(list(token_ids(tokenizer, PROBE + "32")))
        raise TaskError(
            f"greater_than needs years of two-digit or one-digit tokens, but this tokenizer makes {split} of "
            f"{PROBE + '32'!r}; write PromptPairs with answers that suit it"
        )
    endings = [f"{y:02d}" for y in range(100)] if pairs_of_digits else [str(d) for d in range(10)]
    completions: dict[tuple[str, str], list[str]] = {}

    def draw(index: int) -> Row | None:
        chosen, noun, century = (
            rng.choice(templates),
            rng.choice(data["nouns"]),
            rng.choice(data["centuries"]),
        )
        year = rng.randrange(2, 99) if pairs_of_digits else rng.randrange(10, 90)
        start = {"noun": noun, "XX": century, "YY": f"{year:02d}", "end": century}
        if (chosen, century) not in completions:
            text = chosen.format(**start)
            completions[chosen, century] = [e for e in endings if next_token(tokenizer, text, e) is not None]
        allowed = completions[chosen, century]
        greater = [e for e in allowed if int(e.ljust(2, "0")) > year]  # the earliest year that begins so
        not_greater = [e for e in allowed if int(e.ljust(2, "9")) <= year]  # the latest
        if not greater or not not_greater:
            return None
        return contrast(
            tokenizer,
            chosen,
            start,
            start | {"YY": "01"},
            greater,
            not_greater,
            positions={"noun": "noun", "XX": "XX", "YY": "YY"},
        )

    return to_pairs("greater_than", collect(n, draw, "greater_than"))
