"""Tasks with known behaviour: aligned prompt pairs, built and checked for the tokenizer at hand.

Each is `task(tokenizer, n=32, seed=0, **options) -> PromptPairs`, deterministic by seed.
"""

from .agreement import agreement
from .facts import facts
from .greater_than import greater_than
from .induction import induction
from .ioi import ioi
from .pronouns import pronouns

__all__ = ["agreement", "facts", "greater_than", "induction", "ioi", "pronouns"]
