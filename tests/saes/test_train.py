"""Training: what every kind of data gives, that a broken run goes on to the same bits, and what is refused before work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import interp
import interp.saes.train
from interp.errors import CheckpointError, PlanError
from interp.shards import write_shards
from interp.shuffled import Held, Shuffled, Stored

from .made import AUTOENCODERS, FEATURES, WIDTH, K, pairs_of, rows, trained, untrained


def weights(sae: Any) -> Tensor:
    return torch.cat([value.flatten().double() for value in sae.state_dict().values()])


@pytest.mark.parametrize("architecture", [*AUTOENCODERS, "transcoder"])
def test_every_architecture_learns(architecture: str) -> None:
    """It explains more than half of the variance, in the units of the data; those with k use k features of a token."""
    sae = trained(architecture)
    x = pairs_of(architecture)
    used = interp.saes.inference(sae)
    inputs, targets = x[:, :WIDTH], x[:, -WIDTH:]
    with torch.no_grad():
        out = used.decode(used.encode(inputs))
    unexplained = (out - targets).pow(2).sum() / (targets - targets.mean(0)).pow(2).sum()
    assert unexplained < 0.45, float(unexplained)
    active = float((used.encode(inputs) > 0).float().sum(1).mean())
    if architecture in ("topk", "batchtopk", "matryoshka", "transcoder"):
        assert abs(active - K) < 0.1 * K


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_features_that_are_known_are_found(architecture: str) -> None:
    """128 directions in 64 dimensions, each active on 4 % of tokens."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=-1)
    active = (torch.rand(200_000, 128, generator=generator) < 0.04) * torch.rand(200_000, 128, generator=generator)
    interp.set_seed(0)
    sae = interp.SparseAutoencoder(d_model=64, d_hidden=128, architecture=architecture, k=5)
    interp.train_sae(sae, active @ truth, tokens=2_000_000, progress=False)
    learnt = torch.nn.functional.normalize(sae.W_dec.detach(), dim=-1)
    assert float((truth @ learnt.T).max(1).values.mean()) >= 0.95


def in_shards(folder: Path, x: Tensor, name: str = "L1.resid_post", size: int = 700) -> Any:
    def steps() -> Iterator[Any]:
        for number, part in enumerate(x.split(size)):
            index = torch.zeros(len(part), 2, dtype=torch.int32)
            yield str(number), f"part {number}", lambda part=part, index=index: {name: part, "index": index}

    return write_shards(folder, {"sites": [name]}, steps())


def test_whatever_holds_the_rows_gives_the_same_dictionary(tmp_path: Path) -> None:
    """A tensor, a dictionary by site, an iterator of the same batches."""
    x = rows()
    made = []
    shuffled = Shuffled(Held(x), 128, seed=3)
    for given in (x, {"L1.resid_post": x}, shuffled.batches()):
        sae = untrained("topk")
        interp.train_sae(sae, given, tokens=6400, batch_size=128, seed=3, progress=False)
        made.append(weights(sae))
    assert all(torch.equal(made[0], other) for other in made[1:])


def test_a_loader_is_gone_through_as_often_as_asked() -> None:
    data = TensorDataset(rows(1000))
    sae = untrained("standard")
    done = interp.train_sae(sae, DataLoader(data, batch_size=32, shuffle=True), n_epochs=3, lr=1e-3, progress=False)
    assert done.history["step"].iloc[-1] == 3 * 32
    assert done.history["loss"].iloc[-1] < done.history["loss"].iloc[0]


def test_a_dictionary_that_was_trained_goes_on_from_there() -> None:
    x = rows()
    sae = untrained("topk")
    first = interp.train_sae(sae, x, tokens=12_800, batch_size=128, progress=False)
    again = interp.train_sae(sae, x, tokens=1280, batch_size=128, lr=1e-6, progress=False)
    assert again.summary[0]["explained_variance"] > first.summary[0]["explained_variance"] - 0.02


def test_several_dictionaries_take_one_stream() -> None:
    x = rows()
    alone = untrained("topk")
    interp.train_sae(alone, x, tokens=6400, batch_size=128, progress=False)
    both = [untrained("topk"), untrained("standard")]
    done = interp.train_sae(both, x, tokens=6400, batch_size=128, progress=False)
    assert torch.equal(weights(alone), weights(both[0]))
    assert {"loss_0", "loss_1", "dead_0"} <= set(done.history) and len(done.summary) == 2


def test_shuffled_rows_are_each_there_once_and_from_any_place(tmp_path: Path) -> None:
    x = torch.arange(3000.0)[:, None].repeat(1, 3)
    stored = in_shards(tmp_path / "acts", x)
    for source in (Held(x), Stored(stored, ("L1.resid_post",))):
        shuffled = Shuffled(source, 64, seed=5, count=2900, buffer=4 * 3 * 800)
        taken = [batch for batch, _ in zip(shuffled.batches(), range(100), strict=False)]
        order = torch.cat(taken)[:, 0]
        assert sorted(order[:2900].tolist()) == list(range(2900))
        assert sorted(order[2900:5800].tolist()) == list(range(2900))
        assert order[:2900].tolist() != order[2900:5800].tolist()
        assert torch.cat(list(shuffled.held_out()))[:, 0].tolist() == list(range(2900, 3000))
        for place in (0, 1, 13, 44, 45, 46, 91):
            again = next(shuffled.batches(place))
            assert torch.equal(again, taken[place]), place


@pytest.mark.parametrize("given", ["tensor", "loader", "iterator", "shards"])
def test_a_run_that_was_broken_goes_on_to_the_same_bits(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is taken after each step, and the run ends in the middle of one."""
    monkeypatch.setattr(interp.saes.train, "SECONDS", 0.0)
    x = rows()
    stored = in_shards(tmp_path / "acts", x)

    def data() -> Any:
        if given == "loader":
            interp.set_seed(9)
            return DataLoader(TensorDataset(x), batch_size=128, shuffle=True)
        return {"tensor": x, "shards": stored, "iterator": Shuffled(Held(x), 128).batches()}[given]

    options: dict[str, Any] = {"tokens": 60 * 128, "batch_size": 128}
    options = {"n_epochs": 3} if given == "loader" else options
    whole = untrained("batchtopk")
    interp.train_sae(whole, data(), progress=False, **options)
    step, calls = interp.saes.train.step, []

    def breaks(*args: Any) -> Any:
        calls.append(1)
        if len(calls) in (17, 40):
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(interp.saes.train, "step", breaks)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interp.train_sae(untrained("batchtopk"), data(), checkpoint=tmp_path / "run", progress=False, **options)
    again = untrained("batchtopk")
    interp.train_sae(again, data(), checkpoint=tmp_path / "run", progress=False, **options)
    assert torch.equal(weights(whole), weights(again))
    steps = len(calls)
    finished = untrained("batchtopk")
    interp.train_sae(finished, data(), checkpoint=tmp_path / "run", progress=False, **options)
    assert torch.equal(weights(whole), weights(finished)) and len(calls) == steps, "a finished run is not run again"
    if given == "tensor":
        with pytest.raises(CheckpointError, match="another run: its data"):
            interp.train_sae(untrained("batchtopk"), x * 2, checkpoint=tmp_path / "run", progress=False, **options)
    other = {**options, "lr": 1e-3}
    with pytest.raises(CheckpointError, match="another run: its schedule"):
        interp.train_sae(untrained("batchtopk"), data(), checkpoint=tmp_path / "run", progress=False, **other)


RUN = """
import sys, torch, warnings
warnings.filterwarnings("ignore")
import interp, interp.saes.train
from tests.saes.made import rows, untrained
from tests.saes.test_train import weights
interp.saes.train.SECONDS = 0.0
torch.set_num_threads(1)
sae = untrained("batchtopk")
print("begun", flush=True)
interp.train_sae(sae, rows(), tokens=1500 * 128, batch_size=128, checkpoint=sys.argv[1], progress=False)
torch.save(weights(sae), sys.argv[2])
"""


@pytest.mark.slow
def test_killed_ten_times_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at ten moments of a training; the weights are those of the run that nobody stopped."""
    root = Path(__file__).parents[2]

    def start(folder: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, str(tmp_path / folder), str(tmp_path / f"{folder}.pt")]
        return subprocess.Popen(
            command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True
        )

    assert start("whole").wait() == 0
    for kill in range(10):
        process = start("broken")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.3 + 0.21 * kill)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL or (tmp_path / "broken.pt").exists()
    assert start("broken").wait() == 0
    assert torch.equal(torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "broken.pt"))


def nan_rows() -> Tensor:
    x = rows().clone()
    x[5, 3] = float("nan")
    return x


def test_what_cannot_be_trained_on_says_so(tmp_path: Path) -> None:
    def train(given: Any, **options: Any) -> None:
        interp.train_sae(untrained("topk"), given, progress=False, **options)

    few = iter([rows()[:64], rows()[64:128]])
    for call, message in (
        (lambda: train(nan_rows()), "1 of 3000 rows of activations hold NaN or infinity"),
        (lambda: train(rows() / 0.0), "NaN or infinity"),
        (lambda: train(rows()[:, :10]), "over 16 numbers cannot be trained on rows of 10"),
        (lambda: train(DataLoader(TensorDataset(rows()[:, :10]), batch_size=8)), "cannot be trained on rows of 10"),
        (lambda: train(DataLoader(TensorDataset(nan_rows()), batch_size=8)), "1 of 8 rows of activations hold NaN"),
        (lambda: train(rows()[:100], batch_size=128), "batches of 128 rows from 100"),
        (lambda: train(rows(), tokens=100), "less than one batch of 512"),
        (lambda: train(rows(), tokens=0), "tokens=0: it is 1 or more"),
        (lambda: train(iter([rows()])), "with tokens="),
        (lambda: train(few, tokens=12_800), "ended after 2 batches, and tokens= asks for 200 of 64"),
        (lambda: train(42), "was given a int"),
        (lambda: train(rows(), lr=0.0), "lr=0.0: it is a number above 0"),
        (lambda: train(rows(), lr=1e30, batch_size=64), "the loss is (nan|inf)"),
        (lambda: interp.train_sae(interp.saes.inference(trained("topk")), rows()), "is in the form that is used"),
        (lambda: train({"L1.resid_post": rows(), "L2.resid_post": rows(100)}), "of the same tokens, but their shapes"),
    ):
        with pytest.raises(PlanError, match=message):
            call()
    with pytest.raises(TypeError, match="unexpected option 'epochs'"):
        train(rows(), epochs=3)
    stored = in_shards(tmp_path / "acts", rows(), "L3.mlp_out")
    sae = untrained("topk")
    sae.cfg.metadata["site"] = "L1.resid_post"
    with pytest.raises(PlanError, match=r"holds no L1\.resid_post; it holds L3\.mlp_out"):
        interp.train_sae(sae, stored)


def test_what_cannot_be_made_says_so() -> None:
    for options, message in (
        ({"architecture": "topkk", "d_model": 8}, "unknown architecture 'topkk'"),
        ({}, "needs a model and a site, or d_model="),
        ({"d_model": 8, "architecture": "topk", "k": 33, "d_sae": 32}, "k=33 active features of d_sae=32"),
        ({"d_model": 8, "architecture": "topk", "k": 0}, "k=0"),
        ({"d_model": 8, "architecture": "topk", "sparsity_coef": 1.0}, "of no use to 'topk'"),
        ({"d_model": 8, "architecture": "standard", "k": 4}, "of no use to 'standard'"),
        ({"d_model": 8, "d_sae": 16, "d_hidden": 17}, "are the same number"),
        ({"d_model": 8, "architecture": "topk", "k": 2, "normalize_activations": "layer_norm"}, "is not defined then"),
        ({"d_model": 8, "sparsity_coef": float("nan")}, "0 or more"),
        ({"d_model": 8, "normalize_activations": "covariance_whitening"}, "is SAELens's own trainer's"),
    ):
        with pytest.raises(PlanError, match=message):
            interp.SparseAutoencoder(**options)  # type: ignore[arg-type]
    for options, message in (
        ({"d_model": 4.5}, "d_model=4.5: it is a whole number"),
        ({"d_model": 4, "d_sae": "8"}, "d_sae='8': it is a whole number"),
        ({"d_model": 4, "architecture": "topk", "k": 2.5}, "k=2.5: it is a whole number"),
    ):
        with pytest.raises(PlanError, match=message):
            interp.SparseAutoencoder(**options)  # type: ignore[arg-type]
    for call in (
        lambda: interp.train_sae(None, rows()),  # type: ignore[arg-type]
        lambda: interp.save_sae(None, "nowhere"),  # type: ignore[arg-type]
        lambda: interp.saes.view_of(3),  # type: ignore[arg-type]
    ):
        with pytest.raises(PlanError, match="is no dictionary of SAELens"):
            call()
    with pytest.raises(TypeError, match="no option 'l1'"):
        interp.SparseAutoencoder(d_model=8, l1=3)


def test_dead_features_are_counted_on_rows_that_were_held_out() -> None:
    """In a run that is shorter than SAELens's window its own count is 0."""
    x = torch.cat([rows(), rows() * 0.5, rows() * 2])
    many = torch.cat([x] * 20)
    sae = untrained("topk")
    done = interp.train_sae(sae, many, tokens=2560, batch_size=128, progress=False)
    used = interp.saes.inference(sae)
    fired = (used.encode(many[-16_384:]) > 0).any(0)
    assert done.summary[0]["held_out"] == 1 and done.summary[0]["rows"] == 16_384
    assert done.summary[0]["dead"] == pytest.approx(1 - int(fired.sum()) / FEATURES)
    assert sae.cfg.metadata["num_dead_features"] == FEATURES - int(fired.sum())
