"""What a model knows: how high it ranks the right answer of a fact among all tokens, or among its rivals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TaskError
from ..metrics import Batch, Metric, rank
from ..tokens import Tokenizer
from .build import next_token

if TYPE_CHECKING:  # what runs models is imported when it is used
    from torch import Tensor

    from ..models.model import Model


class Fact(NamedTuple):
    """A fact, and the template that asks for it."""

    relation: str
    wikidata: str  # the property
    template: str
    subject: str
    answer: str

    @property
    def prompt(self) -> str:
        """The text that the answer follows."""
        return self.template.format(subject=self.subject)

    def token(self, tokenizer: Tokenizer) -> int | None:
        """The id of the answer behind its prompt; None if it is not one token there."""
        return next_token(tokenizer, self.prompt, f" {self.answer}")


def rank_among(logits: Tensor, batch: Batch) -> Tensor:
    """How many of the distractors score above the answer: 0 when it is the best of them. `[row]`."""
    rivals = batch["distractors"].reshape(len(logits), -1)
    above = logits.gather(1, rivals.clamp(min=0)) > logits.gather(1, batch["answers"][:, None])
    return (above & (rivals >= 0)).sum(1).float()


#: What counts as knowing a fact: the metric that is 0 then.
KNOWN: dict[str, Metric] = {"argmax": rank, "choice": rank_among}


def ranks(model: Model, facts: Sequence[Fact], known: str) -> list[int | None]:
    """How many tokens the model scores above each fact's answer; None where its tokenizer makes it several tokens.

    One number per prompt comes back from where the model runs; prompts are those that every experiment makes of them,
    with the model's own prefix.

    Args:
        known: "argmax" counts among all tokens, "choice" among the one-token answers of the given facts of the same relation.

    Raises:
        TaskError: what is no model of `interp.load_model`, or one without a tokenizer.
    """
    from ..models.model import Model as Loaded

    if not isinstance(model, Loaded) or model.tokenizer is None:
        said = "a model without a tokenizer" if isinstance(model, Loaded) else repr(model)
        raise TaskError(f"known_by needs what interp.load_model gives, with a tokenizer; got {said}")
    tokens = [fact.token(model.tokenizer) for fact in facts]
    asked = [(fact, token) for fact, token in zip(facts, tokens, strict=True) if token is not None]
    rivals: dict[str, set[int]] = {}
    for fact, token in asked:
        rivals.setdefault(fact.relation, set()).add(token)
    found = iter(
        scored(
            model,
            [fact.prompt for fact, _ in asked],
            [(token,) for _, token in asked],
            [sorted(rivals[fact.relation]) for fact, _ in asked],
            KNOWN[known],
        )
        if asked
        else ()
    )
    return [None if token is None else int(next(found)) for token in tokens]


def scored(
    model: Model,
    prompts: Sequence[str],
    answers: Sequence[Sequence[int]],
    distractors: Sequence[Sequence[int]],
    metric: Metric,
) -> list[float]:
    """A metric at the last token of each prompt, in as few forward passes as hold them."""
    from ..engine.compile import token_sets
    from ..engine.program import Program
    from ..engine.reading import Reading, encode_prompts, grouped, read_program, run_readings
    from ..engine.schedule import token_budget
    from ..engine.trace import scores

    encoded = encode_prompts(model, prompts)
    lengths = [len(ids) for ids in encoded.clean]
    values = [0.0] * len(lengths)

    def program(group: Sequence[int]) -> Program:
        made = read_program(model, [encoded.clean[number] for number in group])
        right, wrong = token_sets(answers, group), token_sets(distractors, group)
        made.update({"want_logits": False, "answers": right, "distractors": wrong})
        return made

    def put(piece: Reading, result: Any) -> None:
        for number, value in zip(piece.asked, result.tolist(), strict=True):
            values[number] = value

    groups = grouped(model, lengths, token_budget(model))
    run_readings(model, [Reading.of(group, program) for group in groups], put, scores, metric)
    return values
