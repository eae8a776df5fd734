"""What can be logged as a number or a word, how it stands in a line of JSON, and how it is read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from numbers import Real
from pathlib import Path

from ..errors import TrackerError

#: JSON has no names for these; as words of these spellings pandas and Python's float() read them back.
ODD = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
Plain = str | int | float | bool | None


def flat(values: object) -> dict[str, Plain]:
    """Metrics by name, those of dictionaries within as "outer/inner".

    Raises:
        TrackerError: no dictionary, a name that is no text or stands twice, a value that is no single number or word.
    """
    if not isinstance(values, Mapping):
        raise TrackerError(f'log takes a dictionary, {{"loss": 0.5}}, not a {type(values).__name__}')
    out: dict[str, Plain] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name:
            raise TrackerError(f"the name of a metric is a text, not {name!r}; write {{{str(name) or 'loss'!r}: …}}")
        if isinstance(value, Mapping):
            found = {f"{name}/{inner}": item for inner, item in flat(value).items()}
        else:
            found = {name: number(name, value)}
        if twice := sorted(set(found) & set(out)):
            raise TrackerError(
                f"{twice[0]!r} is given twice, by itself and within a dictionary; give one of them another name"
            )
        out |= found
    if "_time" in out:
        raise TrackerError("'_time' is when a line was logged, which is noted by itself; give the metric another name")
    return out


def number(name: str, value: object) -> Plain:
    """A Python number or text of a metric. TrackerError: it is neither."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Path):
        return str(value)
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "item"):  # of torch, numpy, jax, xarray
        if math.prod(shape) != 1:
            raise TrackerError(
                f"{name!r} is a {type(value).__name__} of shape {list(shape)}; a metric is one number: log its mean or norm "
                f"(float({name}.mean())), a picture of it by log_figure, or a table by log_table"
            )
        return number(name, value.item())
    if isinstance(value, int):
        return int(value) if abs(value) < 2**63 else float(value)
    if isinstance(value, Real) or type(value).__name__ == "Decimal":
        return float(value)  # type: ignore[arg-type]
    raise TrackerError(
        f"{name!r} is a {type(value).__name__}; a metric is a number or a text: log a number made of it, or keep the whole by "
        "log_figure, log_effects, log_circuit, log_sae, log_table or log_artifact"
    )


def odd_as_words(value: object) -> object:
    """Plain data with NaN and infinities as the words that JSON can hold; what JSON does not know, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, Mapping):
        return {str(key): odd_as_words(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        if all(type(item) is int or type(item) is str for item in value):
            return list(value)
        return [odd_as_words(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else short(value)


def short(value: object) -> object:
    """What JSON does not know: a number, a list of few, or its text."""
    if hasattr(value, "item") and math.prod(getattr(value, "shape", (0,))) == 1:
        return odd_as_words(value.item())
    if is_dataclass(value) and not isinstance(value, type):
        return odd_as_words(asdict(value))
    if hasattr(value, "tolist") and math.prod(getattr(value, "shape", (10**9,))) <= 64:
        return odd_as_words(value.tolist())
    text = getattr(value, "__qualname__", None) or str(value)
    return text if len(text) <= 500 else text[:499] + "…"


def line(values: Mapping[str, object]) -> bytes:
    """One line of JSON, whatever the values are."""
    return json.dumps(odd_as_words(values), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace") + b"\n"


def settings(config: object) -> dict[str, object]:
    """A configuration as plain data: of a dictionary, a dataclass or what argparse gives.

    Raises:
        TrackerError: it is none of these.
    """
    if config is None:
        return {}
    if is_dataclass(config) and not isinstance(config, type):
        config = asdict(config)
    if not isinstance(config, Mapping) and type(config).__name__ in ("Namespace", "SimpleNamespace"):
        config = vars(config)
    if not isinstance(config, Mapping):
        raise TrackerError(
            f"config is a {type(config).__name__}; give a dictionary, a dataclass or what argparse gives: config={{'lr': 1e-3}}"
        )
    found = odd_as_words(config)
    assert isinstance(found, dict)
    return found


def read_lines(path: Path) -> list[dict[str, object]]:
    """The lines of a file of JSON that are whole; a torn one, where a process was killed while it wrote, is left out."""
    try:
        text = path.read_bytes().decode("utf-8", "replace")
    except FileNotFoundError:
        return []
    out = []
    for part in text.split("\n"):
        try:
            found = json.loads(part)
        except ValueError:
            continue
        if isinstance(found, dict):
            out.append(found)
    return out


def model_of(event: Mapping[str, object]) -> str:
    """The model of an experiment, where its record names one."""
    record = event.get("provenance")
    return str(record.get("model") or "") if isinstance(record, Mapping) else ""
