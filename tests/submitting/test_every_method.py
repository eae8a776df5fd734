"""Every public method, called and as a job: the same numbers from a server as here. The real server: tests/ndif."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import interp
from tests.every_method import METHODS, RUNS_NONE, methods, numbers

from .stand_in import StandIn


def test_every_method_is_here() -> None:
    """A public method that is added must be added to `tests/every_method.py` too."""
    assert methods() - RUNS_NONE == {name.split()[0] for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_the_same_from_a_server(name: str, here: interp.Model, folder: Path, server: StandIn, tmp_path: Path) -> None:
    there = interp.load_model(folder, backend=server.host)
    one = numbers(METHODS[name](here))
    assert np.isfinite(one).any() and np.nanstd(one) > 0
    scale = max(1.0, float(np.nanmax(np.abs(one))))
    for found in (METHODS[name](there), interp.submit(METHODS[name], there, root=tmp_path).result(300)):
        np.testing.assert_allclose(numbers(found), one, rtol=0, atol=1e-5 * scale)
    assert server.ran and max(server.ran.values()) == 1
