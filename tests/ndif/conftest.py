"""The deployment that these tests are about: up before them; down behind them where it was not up."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import interp

from .deployment import REAL, TINY, Deployment


@pytest.fixture(scope="session")
def deployment() -> Iterator[Deployment]:
    made = Deployment()
    if os.environ.get("HF_ENDPOINT") != made.hub or os.environ.get("HF_HUB_OFFLINE") == "1":
        pytest.fail(
            f"these tests need HF_ENDPOINT={made.hub} and no HF_HUB_OFFLINE before Python starts: make test-ndif sets both"
        )
    was_up = made.is_up()
    if (given := os.environ.get("INTERP_NDIF_HOST")) and not (was_up and given == made.host):
        pytest.fail(
            f"INTERP_NDIF_HOST={given}, and no deployment of {made.work} is up there; unset it, and one is brought up"
        )
    made.up()
    yield made
    if not was_up:
        made.down()


@pytest.fixture(scope="session", params=["tiny", "real"])
def both(request: pytest.FixtureRequest, deployment: Deployment) -> tuple[interp.Model, interp.Model]:
    """One model here, and the same on the server."""
    name = TINY if request.param == "tiny" else REAL
    return interp.load_model(deployment.models / name), interp.load_model(name, backend=deployment.host)


@pytest.fixture
def tiny(deployment: Deployment) -> interp.Model:
    """The tiny model on the server; small requests, so that there are many."""
    model = interp.load_model(TINY, backend=deployment.host)
    model.backend.limit = 40
    return model
