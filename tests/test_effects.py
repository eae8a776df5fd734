"""The record: what it refuses, what it computes, and that a file of it is whole, ours, or refused by name."""

from __future__ import annotations

import io
import os
import resource
import signal
import tempfile
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from interp.effects import SCHEMA, Effects, bootstrap
from interp.errors import EffectsError, InterpError

TOKENS = [["<s>", " John", " and", " John"], ["<s>", " Mary", " or"]]


def make(direction: str | None = "noising", seed: int = 0, corrupted: bool = True, **coords: object) -> Effects:
    """Two components, three layers, four positions, two pairs; the second pair lacks the last position."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, 3, 4, 2)).astype(np.float32)
    values[:, :, 3, 1] = np.nan
    labels = {"component": ["resid_pre", "mlp_out"], "layer": [0, 1, 2], "position": [0, 1, 2, 3]} | coords
    return Effects(
        xr.DataArray(values, dims=("component", "layer", "position", "pair"), coords=labels),
        xr.DataArray(np.array([3.0, 2.0]), dims=("pair",)),
        xr.DataArray(np.array([-1.0, 4.0]), dims=("pair",)) if corrupted else None,
        {"model": "toy", "metric": "logit_diff", "direction": direction, "tokens": TOKENS, "seed": (1, 2)},
    )


def test_normalised_noising_by_hand() -> None:
    effects = make("noising")
    value = float(effects.values[1, 2, 0, 0])
    assert float(effects.normalized[1, 2, 0, 0]) == pytest.approx((value - 3.0) / (-1.0 - 3.0), rel=1e-6)
    assert effects.normalized.dims == effects.values.dims
    assert effects.base.equals(effects.clean)
    assert effects.source.equals(effects.corrupted)


def test_normalised_denoising_by_hand() -> None:
    effects = make("denoising")
    value = float(effects.values[0, 1, 2, 1])
    assert float(effects.normalized[0, 1, 2, 1]) == pytest.approx((value - 4.0) / (2.0 - 4.0), rel=1e-6)
    assert effects.base.equals(effects.corrupted)
    assert effects.source.equals(effects.clean)


def test_normalised_is_nan_without_a_source_or_a_difference() -> None:
    assert bool(make(None, corrupted=False).normalized.isnull().all())
    effects = make()
    same = Effects(effects.values, effects.clean, effects.clean.copy(data=[3.0, 4.0]), effects.provenance)
    assert bool(same.normalized[..., 0].isnull().all())  # this pair's two runs agree
    assert int(same.normalized[..., 1].notnull().sum()) == 2 * 3 * 3


def test_a_cell_that_does_not_exist_stays_nan_and_does_not_spoil_the_mean() -> None:
    effects = make()
    assert bool(effects.normalized[:, :, 3, 1].isnull().all())
    assert float(effects.mean()[0, 0, 3]) == float(effects.values[0, 0, 3, 0])
    assert "pair" not in effects.mean().dims


def test_round_trip(tmp_path: Path) -> None:
    effects = make()
    loaded = Effects.load(effects.save(tmp_path / "new" / "effects.nc"))
    assert loaded.values.identical(effects.values)
    assert loaded.values.dtype == np.float32
    assert loaded.clean.equals(effects.clean)
    assert loaded.corrupted.equals(effects.corrupted)
    assert loaded.provenance == effects.provenance
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["effects.nc"]


def test_round_trip_of_named_positions_shared_tokens_no_source_and_long_provenance(tmp_path: Path) -> None:
    names = ["subject", "été", " x", "end"]
    token = ("position", ["a", " b", "\n", "日"])
    effects = make(None, corrupted=False, position=names, token=token)
    effects.provenance["prompts"] = ["long " * 200] * 300  # beyond the 64 kB of a plain HDF5 attribute
    loaded = Effects.load(effects.save(tmp_path / "effects.nc"))
    assert loaded.values["position"].values.tolist() == names
    assert loaded.values["token"].values.tolist() == token[1]
    assert loaded.corrupted is None
    assert loaded.provenance == effects.provenance


def test_refusals_name_the_file_and_the_cause(tmp_path: Path) -> None:
    path = make().save(tmp_path / "good.nc")
    whole = path.read_bytes()
    with pytest.raises(EffectsError, match=r"cannot write \."):
        make().save(".")
    with pytest.raises(EffectsError, match=r"missing\.nc.*No such file"):
        Effects.load(tmp_path / "missing.nc")
    (tmp_path / "text.nc").write_text("not numbers")
    with pytest.raises(EffectsError, match=r"text\.nc is not an effects file"):
        Effects.load(tmp_path / "text.nc")
    (tmp_path / "short.nc").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EffectsError, match=r"short\.nc is damaged"):
        Effects.load(tmp_path / "short.nc")
    at = whole.index(make().values.values[0, 0].tobytes()[:16])
    (tmp_path / "flipped.nc").write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(EffectsError, match=r"flipped\.nc is damaged: its checksum"):
        Effects.load(tmp_path / "flipped.nc")
    xr.Dataset({"rain": ("day", [1.0])}).to_netcdf(tmp_path / "rain.nc", engine="h5netcdf")
    with pytest.raises(EffectsError, match=r"rain\.nc is a NetCDF file, but not one of effects \(it holds rain"):
        Effects.load(tmp_path / "rain.nc")
    newer = xr.load_dataset(io.BytesIO(whole), engine="h5netcdf")
    newer.assign_attrs(interp_effects=SCHEMA + 1).to_netcdf(tmp_path / "newer.nc", engine="h5netcdf")
    with pytest.raises(EffectsError, match=rf"newer\.nc has schema version {SCHEMA + 1}.*upgrade"):
        Effects.load(tmp_path / "newer.nc")


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = make(seed=0).save(tmp_path / "effects.nc")
    limits, action = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # a write that stops half-way, as ENOSPC does
        with pytest.raises(EffectsError, match=r"cannot write .*effects\.nc: File too large"):
            make(seed=1).save(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, action)
    assert Effects.load(path).values.equals(make(seed=0).values)
    assert [p.name for p in tmp_path.iterdir()] == ["effects.nc"]


def test_a_read_only_folder_leaves_the_earlier_file() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name), os.geteuid()
        path = make(seed=0).save(folder / "effects.nc")
        folder.chmod(0o555)
        try:
            if user == 0:
                os.seteuid(65534)  # root may write anywhere
            with pytest.raises(EffectsError, match=r"cannot write .*effects\.nc: Permission denied"):
                make(seed=1).save(path)
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert Effects.load(path).values.equals(make(seed=0).values)


def test_dataframe_has_a_row_per_cell_and_pair() -> None:
    effects = make()
    frame = effects.to_dataframe()
    assert list(frame) == ["component", "layer", "position", "pair", "value", "normalized", "token"]
    assert len(frame) == effects.values.size
    one = frame[(frame.component == "mlp_out") & (frame.layer == 2) & (frame.position == 1) & (frame.pair == 1)]
    assert one.value.item() == float(effects.values[1, 2, 1, 1])
    assert one.normalized.item() == float(effects.normalized[1, 2, 1, 1])
    assert one.token.item() == " Mary"
    assert frame[(frame.position == 3) & (frame.pair == 1)].token.isna().all()


def test_dataframe_of_other_dims_has_no_tokens() -> None:
    values = xr.DataArray(np.ones((2, 3, 1)), dims=("sender", "receiver", "pair"), coords={"sender": ["a", "b"]})
    frame = Effects(values, xr.DataArray([1.0], dims="pair")).to_dataframe()
    assert frame.sender.tolist() == ["a"] * 3 + ["b"] * 3
    assert frame.token.isna().all()


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    values = xr.DataArray(rng.normal(loc=0.7, size=(2000, 40)), dims=("cell", "pair"))
    found = bootstrap(values, level=0.9, samples=500)
    assert 0.86 < float(((found.low < 0.7) & (found.high > 0.7)).mean()) < 0.92
    assert bool(((found.low < found["mean"]) & (found["mean"] < found.high)).all())
    assert found["mean"].equals(values.mean("pair"))


def test_interval_follows_seed_and_level() -> None:
    values = xr.DataArray(np.random.default_rng(2).normal(size=(10, 30)), dims=("cell", "pair"))
    found = bootstrap(values, 0.99, 200, seed=3)
    assert found.identical(bootstrap(values, 0.99, 200, seed=3))
    assert not found.low.equals(bootstrap(values, 0.99, 200, seed=4).low)
    narrow = bootstrap(values, 0.5, 200, seed=3)
    assert bool((found.high - found.low > narrow.high - narrow.low).all())
    for level, samples in ((0.0, 10), (1.0, 10), (0.9, 0)):
        with pytest.raises(EffectsError, match="level must lie"):
            make().interval(level, samples)


def test_interval_of_cells_that_some_pairs_lack() -> None:
    effects = make()
    found = effects.interval(normalized=True)
    held = effects.values.notnull().sum("pair")
    assert bool((found.low.notnull() == (held >= 2)).all())  # one pair has no spread
    np.testing.assert_array_equal(found["mean"], effects.mean(normalized=True))
    values = xr.DataArray([[1.0, 3.0, np.nan]], dims=("cell", "pair"))
    found = bootstrap(values)
    assert (float(found.low[0]), float(found.high[0])) == (
        1.0,
        3.0,
    )  # resamples of all missing pairs are left out


def test_interval_of_many_cells_equals_that_of_few() -> None:
    values = xr.DataArray(np.random.default_rng(1).normal(size=(5000, 4)), dims=("cell", "pair"))
    whole, part = bootstrap(values, samples=50), bootstrap(values[4990:], samples=50)
    np.testing.assert_allclose(whole.low[4990:], part.low, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": xr.DataArray([1.0, 2.0, 3.0], dims="pair")}, "clean has 3 pairs, but values has 2"),
        ({"clean": np.ones(2)}, "clean must be an xarray.DataArray"),
        (
            {"corrupted": xr.DataArray([[1.0, 2.0]], dims=("x", "pair"))},
            "corrupted must have the one dimension",
        ),
        ({"values": xr.DataArray([1.0], dims="layer")}, "values must be an xarray.DataArray with a 'pair'"),
        ({"provenance": {"direction": "sideways"}}, "direction 'sideways' is unknown"),
        ({"provenance": {"direction": "denoising"}, "corrupted": None}, "corrupted is None"),
        ({"provenance": {"model": object()}}, "provenance must be JSON-able"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    effects = make()
    parts = {k: getattr(effects, k) for k in ("values", "clean", "corrupted", "provenance")}
    with pytest.raises(EffectsError, match=message) as caught:
        Effects(**(parts | change))
    assert isinstance(caught.value, InterpError)


def test_pairs_with_other_labels_are_refused_not_dropped() -> None:
    values = xr.DataArray(np.zeros((1, 2)), dims=("layer", "pair"), coords={"pair": [0, 1]})
    with pytest.raises(EffectsError, match="pair labels of clean"):
        Effects(values, xr.DataArray([1.0, 2.0], dims="pair", coords={"pair": [1, 2]}))


def test_provenance_is_a_copy() -> None:
    given = {"tokens": [["a"]]}
    values = xr.DataArray(np.zeros((1, 1)), dims=("layer", "pair"))
    effects = Effects(values, xr.DataArray([1.0], dims="pair"), None, given)
    given["tokens"][0][0] = "changed"
    assert effects.provenance["tokens"] == [["a"]]


def test_representations_are_short_and_escaped() -> None:
    effects = make()
    assert repr(effects) == (
        "Effects(toy, logit_diff, noising; component 2 × layer 3 × position 4 × pair 2; "
        "components: resid_pre, mlp_out; clean: 2.5; corrupted: 1.5)"
    )
    named = Effects(effects.values, effects.clean, None, {"model": "<b>"})
    assert "&lt;b&gt;" in named._repr_html_()
    assert "<b>" not in named._repr_html_()
