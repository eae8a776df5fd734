"""Paths: `~` is the home folder wherever something is read or written, and what is no path is told."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from bokeh.plotting import figure

import interp
from interp import Circuit, Effects
from interp.circuits import Facts, from_eap_ig, from_graphml, from_json, to_eap_ig, to_graphml, to_json
from interp.engine.checkpoint import read_identity
from interp.errors import InterpError
from interp.models.bundled import cache_root
from interp.plots import Figure
from interp.plots.browser import find_chromium
from interp.shards import StoredActivations

from .families import loaded, words
from .oracle.configs import tiny

FACTS = Facts(2, 2, 2)
CIRCUIT = Circuit.from_edges({("embed", "L1.H0.q"): 0.5}, FACTS, {"d_model": 8})
EFFECTS = Effects(xr.DataArray(np.ones((2, 1)), dims=("layer", "pair")), xr.DataArray([1.0], dims=("pair",)))


def patched(path: Any) -> None:
    pairs = interp.PromptPairs(words(5), words(5, seed=1), [20], [33])
    interp.patch(loaded("gpt2"), pairs, interp.grid("z", layers=0, positions=-1), checkpoint=path)


def saved_model(path: Any) -> None:
    hf, tokenizer = tiny("gpt2")
    for part in (hf, tokenizer):
        part.save_pretrained(Path(path).expanduser())


#: What writes a file or a folder under the name given, and what reads it back.
PLACES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any] | None]] = {
    "effects.nc": (EFFECTS.save, Effects.load),
    "circuit.json": (CIRCUIT.to_json, Circuit.from_json),
    "other.json": (lambda path: to_json(CIRCUIT, path), from_json),
    "circuit.graphml": (lambda path: to_graphml(CIRCUIT, path), from_graphml),
    "eap_ig.json": (lambda path: to_eap_ig(CIRCUIT, path), from_eap_ig),
    "sweep.ckpt": (patched, read_identity),
    "acts": (
        lambda path: interp.collect_activations(loaded("gpt2"), words(4), 1, to_disk=path),
        StoredActivations.open,
    ),
    "page.html": (Figure(figure(), "page").save, None),
    "model": (saved_model, interp.load_model),
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A home folder of its own; the test runs in another folder, in which nothing may be left."""
    here, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.chdir(elsewhere)
    yield here
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("kind", [str, Path])
def test_a_tilde_is_the_home_folder(name: str, kind: type, home: Path) -> None:
    write, read = PLACES[name]
    write(kind(f"~/deep/{name}"))
    assert (home / "deep" / name).exists()
    if read is not None:
        read(kind(f"~/deep/{name}"))


def test_settings_of_the_environment_may_begin_with_a_tilde(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERP_CACHE", "~/cache")
    assert cache_root() == home / "cache"
    shutil.copy(shutil.which("true") or "/bin/true", home / "chromium")
    monkeypatch.setenv("INTERP_CHROMIUM", "~/chromium")
    assert find_chromium() == str(home / "chromium")


@pytest.mark.parametrize("name", [name for name in PLACES if name != "model"])
@pytest.mark.parametrize("given", [None, 3, b"bytes", "~nobody-of-that-name/file", "null\0byte"])
def test_what_is_no_path_is_told(name: str, given: Any, home: Path) -> None:
    for use in filter(None, PLACES[name]):
        if given is None and name in ("sweep.ckpt", "acts"):
            continue  # there it means: nowhere
        with pytest.raises(InterpError):
            use(given)
