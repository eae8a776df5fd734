"""Files of circuits: what is written and read of them as JSON with a schema and a version, before a circuit is made of it.

A file that is not what it should be is refused with a CircuitError that names the line or the field at fault.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from ..errors import CircuitError
from ..files import path_of, write_atomically
from ..sites import Site
from .nodes import EMBED, LOGITS, Facts, node

LEVELS = ("edge", "node")
SCHEMA, VERSION = "interp.circuit", 1
Place = str | os.PathLike[str]
#: A node or an edge (sender, receiver), by name or as Sites; with their scores.
Item = Any
Items = dict[Item, float | None]
Meta = dict[str, Any]
_FIELDS = ("schema", "version", "level", "facts", "meta", "nodes", "edges")
T = TypeVar("T")


class Parts(NamedTuple):
    """What a file says of a circuit."""

    level: str
    items: Items
    facts: Facts | None
    meta: Mapping[str, object]


class Written(Protocol):
    """What is written of a circuit."""

    @property
    def meta(self) -> Meta: ...
    @property
    def level(self) -> str: ...
    @property
    def edges(self) -> list[tuple[str, str]]: ...
    def nodes(self, level: str = "node") -> list[str]: ...
    def scores(self) -> dict[Item, float]: ...


def write_json(circuit: Written, path: Place) -> None:
    """Write a circuit as JSON: schema, version, level, facts, meta, and nodes or edges, one to a line.

    An edge is [sender, receiver, score], a node [name, score]; a score is null where there is none. At level
    "node" the edges follow from the nodes and are not written.

    Raises:
        CircuitError: meta that JSON cannot hold, or a place that cannot be written.
    """
    scores, of_edges = circuit.scores(), circuit.level == "edge"
    kept = [name for name in circuit.nodes() if name != LOGITS.node and (name != EMBED.node or name in scores)]
    rows = {
        "nodes": [] if of_edges else [[name, scores.get(name)] for name in kept],
        "edges": [[*edge, scores.get(edge)] for edge in circuit.edges] if of_edges else [],
    }
    head = {"schema": SCHEMA, "version": VERSION, "level": circuit.level, "facts": circuit.meta["facts"]}
    lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
    lines.append(f'"meta": {meta_text(circuit)}')
    lines += [f'"{key}": [' + ",".join(f"\n  {json.dumps(row)}" for row in rows[key]) + "]" for key in rows]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_parts(path: Place) -> Parts:
    """Read a file that `write_json` wrote.

    Raises:
        CircuitError: no such file, no JSON, another schema, a newer version, a field missing, unknown, wrong.
    """
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        hint = "; this may be from_eap_ig's" if {"cfg", "edges"} <= data.keys() else ""
        refuse(path, "schema", f"must be {SCHEMA!r}, not {data.get('schema')!r}{hint}")
    version = data.get("version")
    if type(version) is not int or version < 1:
        refuse(path, "version", f"must be a positive integer, not {version!r}")
    if version > VERSION:
        refuse(path, "version", f"is {version}, newer than {VERSION}: upgrade interp")
    for name in _FIELDS:
        if name not in data:
            refuse(path, name, "is missing")
    if unknown := [name for name in data if name not in _FIELDS]:
        refuse(path, unknown[0], f"is unknown; the fields are {', '.join(_FIELDS)}")
    level, meta = data["level"], typed(path, "meta", data["meta"], dict)
    if level not in LEVELS:
        refuse(path, "level", f"must be one of {LEVELS}, not {level!r}")
    with field(path, "facts"):
        facts = None if data["facts"] is None else Facts.of(typed(path, "facts", data["facts"], dict))
    key, other, width = ("edges", "nodes", 3) if level == "edge" else ("nodes", "edges", 2)
    if data[other] != []:
        refuse(path, other, f"must be an empty list at level {level!r}")
    items: Items = {}
    for i, row in enumerate(typed(path, key, data[key], list)):
        if not isinstance(row, list) or len(row) != width:
            refuse(path, f"{key}[{i}]", f"must be a list of {width}, not {json.dumps(row)[:60]}")
        with field(path, f"{key}[{i}]"):
            add(items, tuple(row[:-1]), row[-1], facts)
    return Parts(level, items, facts, meta)


def add(
    items: Items,
    names: tuple[Site | str, ...],
    score: object,
    facts: Facts | None,
    required: bool = False,
) -> None:
    """Add a node or an edge that is checked on its own, so that the message can say which one is wrong."""
    sites = tuple(node(name) for name in names)
    number = isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
    if not number and (required or score is not None):
        raise CircuitError(f"the score must be a finite number{'' if required else ' or null'}, not {score!r}")
    item = sites if len(sites) == 2 else sites[0]
    if item in items:
        raise CircuitError(f"{' -> '.join(site.node for site in sites)} stands here a second time")
    if facts and not (facts.has_edge(*sites) if len(sites) == 2 else sites[0] in facts.sender_index):
        thing = "edge" if len(sites) == 2 else "sender"
        raise CircuitError(f"no {thing} {' -> '.join(s.node for s in sites)} in a model with {facts}")
    items[item] = score  # type: ignore[assignment]  # a number, or None


def refuse(path: Place, name: str, why: str) -> NoReturn:
    """Refuse a file for one of its fields."""
    raise CircuitError(f"{path}: field {name} {why}")


@contextmanager
def field(path: Place, name: str) -> Iterator[None]:
    """Say where in which file a CircuitError, or a value of the wrong form, comes from."""
    try:
        yield
    except CircuitError as error:
        if str(error).startswith(f"{path}: "):  # says where it comes from already
            raise
        raise CircuitError(f"{path}: field {name}: {error}") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise CircuitError(f"{path}: field {name}: {error}") from error


def typed(path: Place, name: str, value: object, kind: type[T]) -> T:
    """The value of a field, which must be a dict or a list."""
    if not isinstance(value, kind):
        wanted = "an object" if kind is dict else "a list"
        refuse(path, name, f"must be {wanted}, not {json.dumps(value)[:60]}")
    return value


def read_bytes(path: Place) -> bytes:
    """The bytes of a file. CircuitError: it cannot be read."""
    place = path_of(path, CircuitError)
    try:
        return place.read_bytes()
    except OSError as error:
        raise CircuitError(f"cannot read a circuit from {path}: {error.strerror or error}") from error


def read_json(path: Place) -> Meta:
    """The object in a JSON file; a CircuitError names the line where it breaks off."""
    try:
        data = json.loads(read_bytes(path).decode())
    except json.JSONDecodeError as error:
        raise CircuitError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise CircuitError(f"{path}: byte {error.start} is not UTF-8: this is no JSON file") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless brackets
        raise CircuitError(f"{path}: no JSON that can be read: {error}") from error
    made: Meta = typed(path, "(top)", data, dict)
    return made


def meta_text(circuit: Written) -> str:
    """A circuit's meta as JSON, without what stands elsewhere in a file. CircuitError: an entry that JSON cannot hold."""
    meta = {key: value for key, value in circuit.meta.items() if key not in ("level", "facts")}
    for key, value in meta.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise CircuitError(f"meta[{key!r}] cannot be written as JSON: {error}") from error
    return json.dumps(meta)


def write_text(path: Place, text: str) -> None:
    """Write a whole file or none."""
    place = path_of(path, CircuitError)
    try:
        write_atomically(place, text.encode())
    except (OSError, ValueError) as error:  # "." has no name to write to
        raise CircuitError(f"cannot write a circuit to {path}: {getattr(error, 'strerror', None) or error}") from error
