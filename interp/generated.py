"""What comes of making tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .markup import table


@dataclass(frozen=True)
class Generation:
    """Tokens that were made, by prompt: `tokens` (an end included), `text`, and `logits` `[prompt, step, d_vocab]` if asked for;
    NaN behind a prompt's end."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    text: tuple[str, ...]
    logits: Tensor | None = None

    def __repr__(self) -> str:
        made, n = sum(map(len, self.tokens)), len(self.prompts)
        logits = "" if self.logits is None else f", logits {list(self.logits.shape)}"
        return f"Generation({n} prompt{'s' * (n != 1)}, {made} tokens made{logits}: {self.text[0]!r}{', …' * (n > 1)})"

    def _repr_html_(self) -> str:
        return table(
            ["prompt", "tokens made", "text"], [(n, len(self.tokens[n]), text) for n, text in enumerate(self.text)]
        )

    def __str__(self) -> str:
        return "\n".join(self.text)
