"""A tiny model here, the same behind a stand-in of a server, and pauses that are short."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import interp
from interp.engine import errand
from tests.oracle.configs import tiny

from .stand_in import StandIn


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that this process and every other can load."""
    made = tmp_path_factory.mktemp("tiny")
    hf, tokenizer = tiny("llama_gqa")
    hf.save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture(scope="session")
def here(folder: Path) -> interp.Model:
    return interp.load_model(folder)


@pytest.fixture(scope="session")
def _simulated(folder: Path) -> interp.Model:
    return interp.load_model(folder, backend="simulated")


@pytest.fixture
def server(_simulated: interp.Model) -> Iterator[StandIn]:
    made = StandIn(_simulated)
    yield made
    made.stop()


@pytest.fixture
def there(folder: Path, server: StandIn) -> interp.Model:
    """The model, run by the stand-in; small requests, so that there are several."""
    model = interp.load_model(folder, backend=server.host)
    model.backend.limit = 40
    return model


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for seconds here."""
    for name, seconds in {
        "PAUSE": 0.02, "PAUSE_MOST": 0.1, "UNSURE": 0.3, "UNKNOWN": 0.6, "SILENT": 0.4, "SILENT_RUNNING": 1.0,
        "SILENT_RESUMED": 2.0, "FIRST_CONTACT": 0.5,
    }.items():  # fmt: skip
        monkeypatch.setattr(errand, name, seconds)
