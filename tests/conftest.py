"""Fixtures that every room's tests may use. Nothing here reaches a network: what is missing is named."""

from __future__ import annotations

import os

# Before any import that reads them.
if "127.0.0.1" not in os.environ.get("HF_ENDPOINT", ""):  # a stand-in of a hub, as for tests/ndif
    os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PIP_NO_INDEX"] = "1"  # a test that lacks the bundled model's package fails with the remedy
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")

import gc
import shutil
from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from interp import Model


# Test processes beside each other wait for one another where each has a thread per core, and a second thread that
# spins makes tiny models ten times slower. `make test-kernels` asks for two all the same.
torch.set_num_threads(int(os.environ.get("INTERP_TEST_THREADS", "1")))


@pytest.fixture(autouse=True, scope="module")
def little_to_collect() -> None:
    """What was imported and loaded before is not searched for garbage again: the engine asks for that when it backs off."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def bundled() -> Model:
    """The bundled real model, loaded once for all tests; do not change its weights."""
    import interp

    return interp.load_model("smollm2-135m")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of a Chromium. Without one the test is skipped, except in CI, where that is a failure."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    reason = "needs Chromium to open pages: install your system's chromium package"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None, None, None]:
    """What was left out for want of a browser, and how to get one, below all else that is said."""
    yield
    skipped = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])]
    if count := sum("Chromium" in reason for reason in skipped):
        terminalreporter.write_line(
            f"{count} tests that open pages were left out, because no Chromium was found: install it "
            "(apt-get install chromium, brew install chromium), or set INTERP_CHROMIUM to its path",
            yellow=True,
        )
