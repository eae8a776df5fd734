"""Training dictionaries: SAELens's trainer makes each step; the loop, its place, the scale of the inputs and what is counted at
the end are here.

1. Batches come from a stream that can be gone on with; the first of them say how inputs are scaled and where their mean is.
2. Each dictionary has a trainer, and all take the same batches; a checkpoint is one file, whole or not at all.
3. At the end the scale is folded into the weights, thresholds are set on data, and features that never fire are counted.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..errors import CheckpointError, PlanError
from ..files import path_of
from ..journal import experiment
from ..options import refuse_unknown
from .calibrate import Held, calibrate, measured
from .data import ESTIMATE, Data, data_of
from .library import Dictionary, checked, is_training, is_transcoder, sae_lens
from .make import SCALED
from .state import load, store
from .streams import finite
from .views import describe

#: The recipe that trained a topk dictionary of 2,304 features with under 1 % dead on 400,000 tokens.
LEARNING_RATE, BATCH, WARM_UP, WINDOW = 2e-3, 512, 100, 200
#: Seconds between two checkpoints, and how many rows of history a run has.
SECONDS, ROWS = 20.0, 200


class Tracker(Protocol):
    """What a tracker does with rows of training."""

    def log(self, values: Mapping[str, float], *, step: int) -> None: ...


@dataclass(frozen=True)
class Trained:
    """What `train_sae` did: `history` has a row for every so many steps, `summary` one for each dictionary."""

    history: pd.DataFrame
    summary: list[dict[str, float]]

    def __str__(self) -> str:
        return "\n".join(
            ", ".join(f"{name} {value:.4g}" for name, value in summary.items()) for summary in self.summary
        )


@dataclass(frozen=True)
class Schedule:
    """How steps are made; the defaults are a recipe that was measured, of the architectures with k.

    Args:
        lr, lr_end, warm_up, decay: the learning rate, what it falls to (a tenth), and over how many steps it rises and falls.
        dead_after: steps after which a feature that has not fired is trained to (SAELens's `dead_feature_window`).
    """

    lr: float = LEARNING_RATE
    lr_end: float | None = None
    warm_up: int | None = None
    decay: int | None = None
    dead_after: int | None = None

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise PlanError(f"lr={self.lr}: it is a number above 0")

    def config(self, steps: int, size: int, device: str) -> Any:
        """SAELens's configuration of a trainer."""
        sae_lens()
        from sae_lens.config import SAETrainerConfig

        return SAETrainerConfig(
            total_training_samples=steps * size,
            train_batch_size_samples=size,
            lr=self.lr,
            lr_end=self.lr / 10 if self.lr_end is None else self.lr_end,
            lr_warm_up_steps=min(WARM_UP, steps // 10) if self.warm_up is None else self.warm_up,
            lr_decay_steps=int(0.3 * steps) if self.decay is None else self.decay,
            dead_feature_window=max(1, min(WINDOW, steps // 4)) if self.dead_after is None else self.dead_after,
            device=device,
        )


@dataclass
class Training:
    """A run in progress: one trainer for each dictionary, how many steps are done, and the rows of its history."""

    trainers: list[Any]
    data: Data
    steps: int
    done: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@experiment
def train_sae(
    sae: Dictionary | Sequence[Dictionary],
    activations: Any,
    tokens: int | None = None,
    *,
    n_epochs: int | None = None,
    lr: float = LEARNING_RATE,
    batch_size: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Trained:
    """Train one dictionary, or several on one stream of activations; they are changed in place.

    Args:
        sae: what `SparseAutoencoder` made; of a list each takes the columns of its own site.
        activations: `StoredActivations`, a tensor `[row, width]`, a dictionary of them by site, a DataLoader, or an iterator of
            batches. Stored rows and tensors come in a seeded order without repetition, epoch after epoch; the last 16,384 of
            many are held out, to count dead features on.
        tokens: rows to train on; by default `n_epochs` (1) of all there are. An iterator needs it.
        batch_size: rows of a step, 512 or as many as there are; a loader's batches are its own.
        checkpoint: a folder; a later call with the same arguments goes on where this one was stopped, to the same bits.
        progress: show a bar with loss, L0 and dead share; by default on a terminal.
        options: `lr_end`, `warm_up`, `decay`, `dead_after` (`interp.saes.train.Schedule`); `tracker`, whose `log(row, step=)`
            is called with every row of the history.

    Returns:
        Trained, with its history and of each dictionary L0, explained variance and the share of dead features, on rows that
        it was not trained on where there are any.

    Raises:
        PlanError: before work, data that does not fit; and a batch with NaN or infinity, or a loss that is none.
        CheckpointError: the folder holds another run.

    Examples:
        >>> sae = interp.SparseAutoencoder(model, "L8.resid_post", d_sae=128, k=8)
        >>> trained = interp.train_sae(sae, acts, n_epochs=20, batch_size=16)
        >>> bool((trained.history["l0"] <= 8).all())
        True
    """
    saes = [checked(one) for one in (sae if isinstance(sae, list | tuple) else [sae])]
    tracker: Tracker | None = options.pop("tracker", None)
    refuse_unknown(options, ("lr_end", "warm_up", "decay", "dead_after", "tracker"))
    schedule = Schedule(lr, **options)
    for one in saes:
        if not is_training(one):
            raise PlanError(f"{describe(one)} is in the form that is used; SparseAutoencoder makes one to train")
    size = batch_size or (min(BATCH, len(activations)) if isinstance(activations, Tensor) else BATCH)
    data = data_of(saes, activations, tokens, n_epochs, size, seed)
    steps = data.stream.length
    if not steps:
        raise PlanError("tokens= says how long to train on what has no end")
    trainers = [trainer_of(one, schedule.config(steps, data.stream.size, str(one.device))) for one in saes]
    training = Training(trainers, data, steps)
    folder = None if checkpoint is None else path_of(checkpoint, CheckpointError, "checkpoint")
    facts = {} if folder is None else facts_of(saes, data, steps, schedule, seed)
    saved = None if folder is None else load(folder, facts)
    place: Mapping[str, Tensor] = {}
    first = first_batches(data)  # also of a run that goes on: an iterator is looked at before it is taken from
    if saved is None:
        begin(training, first)
    else:
        place = saved.restore(training)
    keep = None if folder is None else (lambda: store(folder, facts, training))
    if training.done < steps:
        loop(training, place, keep, tracker, progress)
    return finish(training, Held(data.held_out or [first], bool(data.held_out)))


def trainer_of(sae: Dictionary, config: Any) -> Any:
    """SAELens's trainer of a dictionary; it is handed its batches, so it has no provider."""
    from sae_lens.training.sae_trainer import SAETrainer

    return SAETrainer(config, sae, data_provider=iter(()))


def facts_of(saes: Sequence[Dictionary], data: Data, steps: int, schedule: Schedule, seed: int) -> dict[str, Any]:
    """What a run is known by: all that its numbers depend on."""
    configs = []
    for sae in saes:
        config = sae.cfg.to_dict()
        config.pop("metadata")
        config.pop("normalize_activations")  # becomes "none" as training ends
        configs.append(config)
    return {"saes": configs, "data": data.known_by(), "steps": steps, "batch": data.stream.size, "seed": seed,
            "schedule": {key: value for key, value in vars(schedule).items()}}  # fmt: skip


def begin(training: Training, first: Tensor) -> None:
    """Scale of the inputs, and the bias of the decoder at their mean, from the first batches."""
    for trainer in training.trainers:
        sae = trainer.sae
        rows = training.data.of(sae, first)
        inputs, targets = rows[:, : sae.cfg.d_in], rows[:, -sae.b_dec.shape[0] :]
        scale = 1.0
        if sae.cfg.normalize_activations == SCALED:
            scale = sae.cfg.d_in**0.5 / float(inputs.norm(dim=-1).mean().clamp(min=1e-9))
            trainer.activation_scaler.scaling_factor = scale
        if bool(sae.b_dec.any()):  # it was trained before
            continue
        with torch.no_grad():
            sae.b_dec.copy_(targets.mean(0).to(sae.b_dec) * scale)
            if is_transcoder(sae):  # its inputs are not centred by the decoder's bias
                sae.b_enc.copy_(-(inputs.mean(0).to(sae.b_dec) * scale) @ sae.W_enc)


def first_batches(data: Data) -> Tensor:
    """The first batches of a stream, without taking them from it."""
    peek = getattr(data.stream, "peek", None)
    batches: Iterator[Tensor] = peek(ESTIMATE) if peek else islice(data.stream.batches(0, {}), ESTIMATE)
    return torch.cat([finite(batch.float()) for batch in batches])


def loop(
    training: Training, place: Mapping[str, Tensor], keep: Any, tracker: Tracker | None, progress: bool | None
) -> None:
    """Every step that is left; rows of history on the way, and checkpoints."""
    shown = sys.stderr.isatty() if progress is None else progress
    every, saved = max(1, training.steps // ROWS), time.monotonic()
    size = training.data.stream.size
    batches = training.data.stream.batches(training.done, place)
    with tqdm(total=training.steps * size, initial=training.done * size, unit="token", disable=not shown) as bar:
        for batch in islice(batches, training.steps - training.done):
            batch = finite(batch.float())
            note = training.done % every == 0 or training.done + 1 == training.steps
            rows = [step(trainer, training.data.of(trainer.sae, batch), note) for trainer in training.trainers]
            training.done += 1
            if note:
                row = {"step": float(training.done), "tokens": float(training.done * size)}
                for number, found in enumerate(rows):
                    ending = f"_{number}" if len(rows) > 1 else ""
                    row |= {f"{name}{ending}": value for name, value in found.items()}
                training.history.append(row)
                bar.set_postfix({name: f"{row[name]:.3g}" for name in list(row)[2:5]})
                if tracker is not None:
                    tracker.log(row, step=training.done)
            bar.update(size)
            if keep is not None and (time.monotonic() - saved > SECONDS or training.done == training.steps):
                keep()
                saved = time.monotonic()


def step(trainer: Any, batch: Tensor, note: bool) -> dict[str, float]:
    """One step of one dictionary; its loss, L0 and share of features that have not fired of late, where they are asked for.

    Raises:
        PlanError: the loss is no number.
    """
    out = trainer.step(batch)
    trainer.n_training_steps += 1
    loss = float(out.loss.detach())
    if not math.isfinite(loss):
        raise PlanError(
            f"the loss is {loss} after {trainer.n_training_steps} steps: take a smaller lr (now {trainer.cfg.lr})"
        )
    if not note:
        return {}
    active = float((out.feature_acts != 0).float().sum(-1).mean())
    return {"loss": loss, "l0": active, "dead": float(trainer.dead_neurons.float().mean())}


def finish(training: Training, held: Held) -> Trained:
    """Fold the scale into the weights, set thresholds, count what fires on rows that were held out."""
    summary = []
    for trainer in training.trainers:
        sae, scaler = trainer.sae, trainer.activation_scaler
        if scaler.scaling_factor is not None:
            sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
            scaler.scaling_factor = None
        rows = Held([training.data.of(sae, part.float()) for part in held.parts], held.held_out)
        calibrate(sae, rows)
        found = measured(sae, rows)
        metadata = sae.cfg.metadata
        metadata["l0"], metadata["num_dead_features"] = found["l0"], round(found["dead"] * sae.cfg.d_sae)
        metadata["tokens_trained"] = training.done * training.data.stream.size
        if texts := training.data.facts.get("shards"):
            metadata["corpus"] = corpus_digest(texts)
        summary.append(found)
    return Trained(pd.DataFrame(training.history), summary)


def corpus_digest(shards: Sequence[Mapping[str, Any]]) -> str:
    """One digest of the texts of all shards."""
    from ..engine.identity import text_digest

    return text_digest("".join(str(shard["texts"]) for shard in shards))
