"""The checkpoint of a training run: one file that is there whole or not at all, and says which run it is of."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import write_atomically

FILE = "training.pt"
#: What SAELens's trainer knows beside its dictionary, its optimiser and its schedules.
COUNTS = (
    "n_training_samples",
    "n_training_steps",
    "act_freq_scores",
    "n_forward_passes_since_fired",
    "n_frac_active_samples",
)


class InProgress(Protocol):
    """`train.Training`."""

    trainers: list[Any]
    done: int
    history: list[dict[str, float]]

    @property
    def data(self) -> Any: ...


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds."""

    state: Mapping[str, Any]

    def restore(self, training: InProgress) -> dict[str, Tensor]:
        """Put a run where it was; what its stream needs to go on there."""
        for trainer, state in zip(training.trainers, self.state["trainers"], strict=True):
            trainer.sae.load_state_dict(state["sae"])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
            for name, coefficient in state["coefficients"].items():
                trainer.coefficient_schedulers[name].load_state_dict(coefficient)
            for name in COUNTS:
                setattr(trainer, name, state[name])
            trainer.activation_scaler.scaling_factor = state["scale"]
        training.done = int(self.state["done"])
        training.history.extend(self.state["history"])
        return dict(self.state["place"])


def digest(facts: Mapping[str, Any]) -> str:
    """Which run it is."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def store(folder: Path, facts: Mapping[str, Any], training: InProgress) -> None:
    """Write a checkpoint. CheckpointError: it cannot be written; the one before stays."""
    trainers = []
    for trainer in training.trainers:
        coefficients = {name: one.state_dict() for name, one in trainer.coefficient_schedulers.items()}
        trainers.append(
            {
                "sae": trainer.sae.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "lr_scheduler": trainer.lr_scheduler.state_dict(),
                "coefficients": coefficients,
                "scale": trainer.activation_scaler.scaling_factor,
                **{name: getattr(trainer, name) for name in COUNTS},
            }
        )
    state = {
        "facts": json.dumps(facts, default=str),
        "digest": digest(facts),
        "trainers": trainers,
        "done": training.done,
        "history": training.history,
        "place": training.data.stream.place(),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        write_atomically(folder / FILE, buffer.getvalue())
    except OSError as error:
        raise CheckpointError(
            f"cannot write the checkpoint to {folder}: {error.strerror or error}; the one before stays whole"
        ) from error


def load(folder: Path, facts: Mapping[str, Any]) -> Saved | None:
    """The checkpoint of a run, if there is one. CheckpointError: one that cannot be read, or of another run."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = json.loads(state["facts"])
    except Exception as error:  # torch has no class of its own for damage
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to begin anew") from error
    if state["digest"] != digest(facts):
        now = json.loads(json.dumps(facts, default=str))
        differs = [key for key in now if now[key] != before.get(key)] or ["something"]
        raise CheckpointError(
            f"{folder} holds the training of another run: its {differs[0]} is {before.get(differs[0])!r:.200}, this run's is "
            f"{now[differs[0]]!r:.200}; give another folder, or delete this one"
        )
    return Saved(state)
