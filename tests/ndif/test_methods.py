"""Every public method on a real server: the numbers of a local run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import interp
from tests.every_method import METHODS, numbers

pytestmark = pytest.mark.ndif


@pytest.mark.parametrize("name", METHODS)
def test_the_same_from_a_real_server(name: str, both: tuple[interp.Model, interp.Model], tmp_path: Path) -> None:
    here, there = both
    one = numbers(METHODS[name](here))
    found = numbers(METHODS[name](there))
    scale = max(1.0, float(np.nanmax(np.abs(one))))
    off = float(np.nanmax(np.abs(found - one))) / scale
    print(f"\n{name}: {off:.1e} of {scale:.3g}; {there.backend.sent} B up, {there.backend.received} B down")
    np.testing.assert_allclose(found, one, rtol=0, atol=1e-5 * scale)
    job = interp.submit(METHODS[name], there, root=tmp_path)
    np.testing.assert_allclose(numbers(job.result(600)), one, rtol=0, atol=1e-5 * scale)
