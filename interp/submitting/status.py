"""`remote_status`: what a server is, before anything is sent to it."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TypeGuard

from ..engine.wire import Passed, Wire
from ..errors import BackendError
from ..estimates import size
from ..markup import definitions, table

#: Packages whose releases must fit: nnsight reads what is sent, transformers says where a model's modules are, torch rounds.
PACKAGES = ("nnsight", "transformers", "torch")
COLUMNS = ("model", "state", "dtype", "parameters", "execution limit")


@dataclass(frozen=True)
class RemoteStatus:
    """What `remote_status` found.

    `versions`: {package: (here, there)}. `models`: those that are deployed, as rows of `COLUMNS`. `free`: bytes of memory of each
    device that another model may take. `queue`: requests that wait, None where the server does not say. `problems`: what will not
    work, in words; empty where all is well.
    """

    host: str
    versions: Mapping[str, tuple[str, str]]
    models: tuple[tuple[str, ...], ...]
    free: tuple[int, ...]
    queue: int | None
    problems: tuple[str, ...]

    def _said(self) -> dict[str, object]:
        room = (
            f"weights of about {size(max(self.free))} on one device, {size(sum(self.free))} on all"
            if self.free
            else "unknown"
        )
        return {
            "versions (here, there)": "; ".join(
                f"{name} {one}, {other}" for name, (one, other) in self.versions.items()
            ),
            "room for another model": f"{room}; the first request for one deploys it",
            "queue": "the server does not say" if self.queue is None else self.queue,
            "problems": "; ".join(self.problems) or "none",
        }

    def __repr__(self) -> str:
        rows = [f"  {' · '.join(cell for cell in row if cell)}" for row in self.models] or ["  none"]
        said = [f"{name}: {value}" for name, value in self._said().items()]
        return "\n".join([f"NDIF at {self.host}", "models:", *rows, *said])

    def _repr_html_(self) -> str:
        return definitions(self._said(), self.host) + table(COLUMNS, self.models, "models")


def remote_status(host: str | None = None) -> RemoteStatus:
    """What a deployment of NDIF runs, with which versions, and what of it will not work from here.

    Args:
        host: its address; None for nnsight's own setting, the public one.

    Raises:
        BackendError: nobody answers there, it is no NDIF server, or it wants a key.

    Examples:
        >>> try:
        ...     status = interp.remote_status("http://127.0.0.1:9")
        ... except interp.errors.BackendError as error:
        ...     print(str(error).partition(" (")[0])
        no connection to http://127.0.0.1:9
    """
    wire = Wire(host)
    try:
        status, environment = wire.call("GET", "/status"), wire.call("GET", "/env")
    except Passed as passed:
        raise BackendError(
            f"{passed}: is the server running, is the address right, and has it its workers? Try again in a minute"
        ) from passed
    finally:
        wire.close()
    if status is None or environment is None:
        raise BackendError(
            f"{wire.host} does not answer as an NDIF server does: it has no /status or /env; is the address right?"
        )
    python, packages = str(environment.get("python_version", "?")).split(" ")[0], environment.get("packages")
    there = packages if is_mapping(packages) else {}
    versions = {"python": (platform.python_version(), python)}
    versions |= {name: (version(name), str(there.get(name, "?"))) for name in PACKAGES}
    models, problems = [], list(unlike(versions))
    deployments = status.get("deployments")
    for said in deployments.values() if is_mapping(deployments) else ():
        if is_mapping(said):
            models.append(row_of(said))
            if said.get("deployment_level") != "HOT":
                problems.append(
                    f"{said.get('repo_id')} is {said.get('deployment_level')}: the first request waits until it is loaded"
                )
    if not models:
        problems.append("no model is deployed: the first request waits until one is loaded")
    queue = status.get("queue")
    return RemoteStatus(
        wire.host,
        versions,
        tuple(models),
        tuple(free_in(status)),
        queue if isinstance(queue, int) else None,
        tuple(problems),
    )


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a part of an answer is an object of JSON's."""
    return isinstance(value, dict)


def unlike(versions: Mapping[str, tuple[str, str]]) -> Sequence[str]:
    """What versions that differ mean."""
    found = []
    for name, (here, there) in versions.items():
        minor = [text.split("+")[0].split(".")[:2] for text in (here, there)]
        if minor[0] == minor[1] and (name != "transformers" or here == there):
            continue
        what = {
            "python": "functions travel by source, which must be read there",
            "nnsight": "it may not read what is sent",
            "transformers": "a model's modules may stand elsewhere: model.audit() tells",
            "torch": "numbers may be rounded otherwise",
        }[name]
        found.append(f"{name} is {here} here and {there} there: {what}")
    return found


def row_of(said: Mapping[str, object]) -> tuple[str, ...]:
    """A deployed model as a row of `COLUMNS`."""
    count, limit = said.get("n_params"), said.get("execution_timeout_seconds")
    revision = f"@{said['revision']}" if said.get("revision") else ""
    return (
        f"{said.get('repo_id')}{revision}",
        f"{said.get('application_state')}, {said.get('deployment_level')}",
        str(said.get("dtype") or ""),
        f"{count / 1e6:,.1f} million" if isinstance(count, int) else "",
        f"{limit} s a request" if limit else "",
    )


def free_in(status: Mapping[str, object]) -> list[int]:
    """Free bytes of every device of a cluster."""
    found = []
    for part in walk(json.loads(json.dumps(status.get("cluster") or {}))):
        if isinstance(memory := part.get("available_memory_bytes"), int):
            found.append(memory)
    return found


def walk(value: object) -> list[Mapping[str, object]]:
    """All objects within one of JSON's."""
    inner = list(value.values()) if is_mapping(value) else value if isinstance(value, list) else []
    return [*([value] if is_mapping(value) else []), *(part for item in inner for part in walk(item))]
