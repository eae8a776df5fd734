"""Activations on disk: a folder of safetensors shards and an index, written one by one, so that a run can go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import CheckpointError, PlanError
from .files import path_of, write_atomically

INDEX = "index.json"
SCHEMA = 1
#: Digest of a shard's texts, how messages call them, and what computes its tensors.
Step = tuple[str, str, Callable[[], dict[str, Tensor]]]


@dataclass(frozen=True)
class StoredActivations:
    """Activations in a folder: `shards()` gives one shard after another, `load()` all of them; `len` is tokens."""

    folder: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path) -> StoredActivations:
        """A folder that `collect_activations(to_disk=…)` wrote.

        Raises:
            CheckpointError: no such folder, or one whose index cannot be read.
        """
        place = path_of(folder, CheckpointError, "folder")
        path = place / INDEX
        try:
            facts = json.loads(path.read_text())
            return cls(place, {**facts, "sites": list(facts["sites"]), "shards": list(facts["shards"])})
        except OSError as error:
            raise CheckpointError(f"no activations in {folder}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is not an index of activations: {error}") from error

    def __repr__(self) -> str:
        count = len(self.facts["shards"])
        return (
            f"StoredActivations({self.folder}: {len(self):,} tokens of {', '.join(self.names)}, {self.facts.get('model')}, "
            f"{count} shard{'s' * (count != 1)})"
        )

    def __len__(self) -> int:
        return sum(int(shard["tokens"]) for shard in self.facts["shards"])

    @property
    def names(self) -> tuple[str, ...]:
        """Sites that were collected, as text."""
        return tuple(self.facts["sites"])

    def width(self, name: str) -> int:
        """Numbers of a row of one site, over all of its heads. CheckpointError: a shard that is missing or damaged."""
        path = self.folder / self.facts["shards"][0]["file"]
        try:
            with safe_open(path, framework="pt") as file:
                return math.prod(file.get_slice(name).get_shape()[1:])
        except Exception as error:  # safetensors has its own class for damage, and OSError for the rest
            raise CheckpointError(f"cannot read {path}: {error}") from error

    def shards(self, name: str | None = None) -> Iterator[Tensor]:
        """Activations `[token, …]` of one shard after another; `name` may be left out where there is one site.

        Raises:
            PlanError: no such site. CheckpointError: a shard that is missing or damaged.
        """
        name = name or self.names[0]
        if name.removesuffix(".index") not in (*self.names, "index"):
            raise PlanError(f"{self.folder} holds no {name!r}; it holds {', '.join(self.names)}")
        for shard in self.facts["shards"]:
            try:
                with safe_open(self.folder / shard["file"], framework="pt") as file:
                    tensor = file.get_tensor(name)
            except Exception as error:  # safetensors has its own class for damage, and OSError for the rest
                raise CheckpointError(f"cannot read {self.folder / shard['file']}: {error}") from error
            yield tensor

    def load(self, name: str | None = None) -> Tensor:
        """All activations `[token, …]` of one site; `name="index"` is (text, position) of every row."""
        return torch.cat(list(self.shards(name)))


def begun_sizes(folder: Path) -> tuple[int, int] | None:
    """The tokens in a batch and in a window with which a folder was begun, or None."""
    if not (folder / INDEX).exists():
        return None
    facts = StoredActivations.open(folder).facts
    return int(facts["batch_tokens"]), int(facts["window_tokens"])


def write_shards(folder: Path, facts: dict[str, Any], steps: Iterable[Step]) -> StoredActivations:
    """Write one shard per step; a shard that is there already is held against its texts and not computed again.

    Raises:
        CheckpointError: the folder belongs to another run, or cannot be written: shards before stay whole.
    """
    facts = {"schema": SCHEMA, **facts}
    shards: list[dict[str, Any]] = []
    steps_run = 0
    if (folder / INDEX).exists():
        before = StoredActivations.open(folder).facts
        for key, value in facts.items():
            if before.get(key) != value:
                raise CheckpointError(
                    f"{folder} holds activations of another run: its {key} is {before.get(key)!r}, this run's is "
                    f"{value!r}; give another folder, or delete this one"
                )
        shards = before["shards"]
    for number, (digest, said, compute) in enumerate(steps):
        steps_run = number + 1
        if number < len(shards):
            if shards[number]["texts"] != digest:
                raise CheckpointError(
                    f"{folder} holds activations of other texts: shard {number} is not that of {said}; give the same "
                    "texts, or another folder"
                )
            continue
        tensors = {name: value.contiguous() for name, value in compute().items()}
        shard = {"file": f"activations-{number:05d}.safetensors", "tokens": len(tensors["index"]), "texts": digest}
        shards = [*shards, shard]
        try:
            write_atomically(folder / str(shard["file"]), save(tensors))
            write_atomically(folder / INDEX, json.dumps({**facts, "shards": shards}, indent=1).encode())
        except OSError as error:
            raise CheckpointError(
                f"cannot write activations to {folder}: {error.strerror or error}; the {number} shards before stay "
                "whole, and the same call goes on behind them"
            ) from error
    if not steps_run:
        raise PlanError("there is no text to collect activations of")
    if steps_run < len(shards):
        raise CheckpointError(
            f"{folder} holds activations of more texts: {len(shards)} shards, but these texts make {steps_run}; give "
            "the same texts, or another folder"
        )
    return StoredActivations.open(folder)
