"""What can be logged, what is refused with a remedy, and how lines are read back."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from interp.errors import TrackerError
from interp.tracking.values import flat, line, read_lines, settings


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1, 1), (0.5, 0.5), (True, True), ("word", "word"), (None, None), (torch.tensor(2.5), 2.5), (torch.tensor([[3]]), 3),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5), (torch.tensor(True), True), (np.float32(0.25), 0.25), (np.int64(7), 7),
        (np.array([1.5]), 1.5), (np.bool_(True), True), (xr.DataArray(4.0), 4.0), (Decimal("0.5"), 0.5), (Fraction(1, 4), 0.25),
        (2**70, float(2**70)), (Path("a/b"), "a/b"), (torch.tensor(1.0, requires_grad=True), 1.0),
    ],
)  # fmt: skip
def test_values_that_are_one_number_or_word(value: object, kept: object) -> None:
    (found,) = flat({"x": value}).values()
    assert found == kept and type(found) is type(kept)
    json.loads(line({"x": found}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"w": torch.zeros(3, 4)},
            r"'w' is a Tensor of shape \[3, 4\]; a metric is one number: .*float\(w.mean\(\)\).*log_table",
        ),
        ({"w": np.zeros(0)}, r"'w' is a ndarray of shape \[0\]"),
        ({"w": [1, 2]}, "'w' is a list; a metric is a number or a text"),
        ({"w": object()}, "'w' is a object"),
        ({"w": 1j}, "'w' is a complex"),
        ({1: 2}, "name of a metric is a text, not 1"),
        ({"": 2}, "name of a metric is a text"),
        ([("loss", 1)], "log takes a dictionary"),
        ({"a/b": 1, "a": {"b": 2}}, "'a/b' is given twice"),
        ({"_time": 1}, "'_time' is when a line was logged"),
        ({"a": {"b": {"c": torch.ones(2)}}}, r"'c' is a Tensor of shape \[2\]"),
    ],
)
def test_what_is_refused(values: object, said: str) -> None:
    with pytest.raises(TrackerError, match=said):
        flat(values)


def test_dictionaries_within_are_flattened() -> None:
    assert flat({"a": {"b": 1, "c": {"d": 2}}, "e": 3}) == {"a/b": 1, "a/c/d": 2, "e": 3}


def test_odd_numbers_are_valid_json_that_pandas_reads_as_numbers() -> None:
    values = [1.5, math.nan, math.inf, -math.inf]
    text = b"".join(line({"x": value}) for value in values).decode()
    for part in text.splitlines():
        json.loads(part, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    read = pd.read_json(StringIO(text), lines=True)["x"]
    assert read.dtype == float
    np.testing.assert_array_equal(read, values)


def test_torn_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(line({"a": 1}) + b'{"a": 2\n' + b"\xff\xfe\n\n[1]\n" + line({"a": "ü\u2028"}) + b'{"a": 4, "b"')
    assert read_lines(path) == [{"a": 1}, {"a": "ü\u2028"}]
    assert read_lines(tmp_path / "none") == []
    json.loads(line({"bad": "\ud800"}))  # a text that is no unicode


def test_configurations() -> None:
    @dataclass
    class Config:
        lr: float = 0.1
        layers: tuple[int, ...] = (1, 2)

    assert settings(Config()) == {"lr": 0.1, "layers": [1, 2]}
    assert settings(argparse.Namespace(lr=0.1)) == {"lr": 0.1} and settings(None) == {}
    odd = settings({"dtype": torch.bfloat16, "path": Path("x"), "f": math.sqrt, 3: {"n": np.arange(2), "x": math.inf}})
    assert odd == {"dtype": "torch.bfloat16", "path": "x", "f": "sqrt", "3": {"n": [0, 1], "x": "Infinity"}}
    json.dumps(odd, allow_nan=False)
    assert len(str(settings({"w": torch.zeros(1000, 1000)}))) < 600
    with pytest.raises(TrackerError, match="config is a list; give a dictionary"):
        settings([1])
