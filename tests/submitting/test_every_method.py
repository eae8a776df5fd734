"""Every public method, called and as a job: the same numbers from a server as here. The real server: tests/ndif."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp.saes import view_of
from tests.every_method import IDS, METHODS, RUNS_NONE, dictionary, methods, numbers

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


@pytest.mark.parametrize("disk", [False, True])
def test_the_most_active_features_are_found_there(
    disk: bool, here: interp.Model, folder: Path, server: StandIn, tmp_path: Path
) -> None:
    """Of a dictionary's features only values and numbers of the largest come back, and shards hold no more."""
    there = interp.load_model(folder, backend=server.host)
    view = view_of(dictionary(here.d_model))
    texts = [IDS[0], IDS[1], IDS[0][::-1]]
    whole = interp.collect_activations(here, texts, component=view).topk(4)
    if disk:
        stored = interp.collect_activations(there, texts, component=view, top_k=4, to_disk=tmp_path / "kept")
        (name,) = stored.names
        values, which = stored.load(name), torch.cat(list(stored.shards(f"{name}.index")))
    else:
        found = interp.collect_activations(there, texts, component=view, top_k=4)
        (name,) = (name for name in found if not name.endswith(".index"))
        values, which = found[name], found[f"{name}.index"]
    torch.testing.assert_close(values, whole.values, atol=1e-5, rtol=0)
    active = whole.values > 0  # of those that are zero any may be named
    assert torch.equal(which.long()[active], whole.indices[active]) and which.dtype == torch.int32
    assert there.backend.received < 2500
    with pytest.raises(interp.errors.PlanError, match=r"top_k=999 of .*1 to 64"):
        interp.collect_activations(there, texts, component=view, top_k=999)
