"""What comes of making tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Generation:
    """Tokens that were made, by prompt: `tokens` (an end included), `text`, and `logits` `[prompt, step, d_vocab]` if asked for;
    NaN behind a prompt's end."""

    prompts: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    text: tuple[str, ...]
    logits: Tensor | None = None

    def __str__(self) -> str:
        return "\n".join(self.text)
