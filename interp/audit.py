"""Proof that a model's taps are what they say (being written)."""

from typing import Any


def check_reads(model: Any) -> None:
    """Placeholder until the audit lands."""
