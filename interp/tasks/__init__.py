"""Tasks with known behaviour: aligned prompt pairs, built and checked for the tokenizer at hand.

Each is `task(tokenizer, n=32, seed=0, **options) -> PromptPairs`, deterministic by seed. `facts_table` shows the facts.

Examples:
    >>> interp.tasks.greater_than(model.tokenizer, n=1).clean[0]
    'The invasion started in the year 1243 and ended in the year 12'
"""

from .agreement import agreement
from .facts import facts, facts_table
from .greater_than import greater_than
from .induction import induction
from .ioi import ioi
from .pronouns import pronouns

__all__ = ["agreement", "facts", "facts_table", "greater_than", "induction", "ioi", "pronouns"]
