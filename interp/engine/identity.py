"""What makes two runs the same run, as plain data: model, plan, prompts, metric, and how they run."""

from __future__ import annotations

import dis
import hashlib
import platform
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from importlib.metadata import version
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from ..cells import Resolved
from ..metrics import Metric
from ..models.adapters import adapter_state
from .context import Context, Experiment

#: Packages whose releases may change the last bits of a number.
PACKAGES = ("interp", "torch", "transformers", "nnsight")
#: A metric's compiled code differs from one minor version to the next.
PYTHON = ".".join(platform.python_version_tuple()[:2])
_BLOCK = 1024
#: Globals that a metric reads and that count as a part of it.
_PLAIN = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset, torch.Tensor, np.ndarray)


def identify(asked: Experiment, context: Context, schedule: str, budget: int) -> dict[str, Any]:
    """Everything that the numbers of a run depend on, JSON-able and readable; long parts as digests.

    Reads every weight once; a model whose weights are elsewhere is known by its name and revision.
    """
    model, encoded = asked.model, asked.runs.encoded
    parts = [part.name for part in fields(encoded)]
    return {
        "model": {
            "name": model.name,
            "revision": model.revision,
            "weights": weights_digest(model.hf),
            "config": config_digest(model),
        },
        "dtype": str(model.dtype).removeprefix("torch."),
        "plan": {**asked.resolved.spec, "edits": edits_digest(asked.resolved, context)},
        "prompts": {
            "pairs": len(encoded),
            "first": "".join(encoded.labels[0])[:60],
            **{part: text_digest(repr(getattr(encoded, part))) for part in parts},
        },
        "metric": {"name": metric_name(asked.metric), "code": metric_digest(asked.metric)},
        "direction": asked.runs.direction,
        "method": {"name": asked.method, **asked.details, "noise": text_digest(repr(asked.runs.noise))},
        "schedule": schedule,
        "budget": budget,
        "device": model.device.type,
        "attention": str(model.taps["attention"]),
        "backend": type(model.backend).__name__.lower(),
        "versions": {"python": PYTHON, **{name: version(name) for name in PACKAGES}},
    }


def text_digest(text: str) -> str:
    """The first half of a sha256, as hex: enough to tell two runs apart, short enough to read."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def weights_digest(module: torch.nn.Module) -> str:
    """Digest of every parameter and buffer of a module; of one on the meta device, only its name and shape.

    Bits are summed as 64-bit integers, by row and by column of blocks of 1024: exact in any order, on any
    device, and as fast as memory is read.
    """
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        if tensor.is_meta:
            continue
        try:
            bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        except (RuntimeError, NotImplementedError):  # a packed tensor that has no bits to look at
            continue
        whole = len(bits) // (8 * _BLOCK) * 8 * _BLOCK
        part = bits[:whole]
        part = part if part.storage_offset() % 8 == 0 else part.clone()
        blocks = part.view(torch.int64).view(-1, _BLOCK)
        for sums in (blocks.sum(0), blocks.sum(1), bits[whole:]):
            digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def config_digest(model: Any) -> str:
    """Digest of what is in no weight: epsilons, caps, windows, scalings; which adapters are active."""
    said = {key: value for key, value in model.hf.config.to_dict().items() if key not in ("_name_or_path", "dtype")}
    return text_digest(repr(sorted(said.items())) + repr(adapter_state(model.hf)))


def edits_digest(resolved: Resolved, context: Context) -> str:
    """Digest of every cell: its edits with their places and values, its edges, and those that are cut."""
    digest = hashlib.sha256()
    for site, values in context.values.items():
        digest.update(f"{site}{tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().numpy().tobytes())
    for cell in resolved.cells:
        edits = [(edit.op, str(edit.site), place, context.value_index(edit)) for edit, place in cell.edits]
        edges = [(str(edge.sender), str(edge.receiver)) for edge in cell.edges]
        digest.update(repr((cell.index, edits, edges, cell.through_mlps)).encode())
    cut = [cell.cut for cell in resolved.cells if cell.cut is not None]
    views = [(name, seen.tap, seen.read, seen.write, seen.pull, seen.tensors) for name, seen in context.views.items()]
    for part in _parts([context.reference, *cut, *views], {}):
        digest.update(part)
    return digest.hexdigest()[:32]


def metric_name(metric: Metric) -> str:
    """The name of a metric as its author wrote it."""
    if isinstance(metric, partial):
        return f"partial({metric_name(metric.func)})"
    return getattr(metric, "__qualname__", None) or type(metric).__qualname__


def metric_digest(metric: Metric) -> str:
    """Digest of what a metric computes: its compiled code, constants, helpers, and what it closes over.

    Compiled code, because the source of a metric may be out of reach (typed in a session) or part of a longer
    line (a lambda), and changes with its comments.
    """
    return value_digest(metric, outer=True)


def value_digest(value: object, outer: bool = False) -> str:
    """Digest of numbers, tensors, functions and what they are made of; `outer`: a callable object is what it computes."""
    digest = hashlib.sha256()
    for part in _parts(value, {}, outer):
        digest.update(part)
    return digest.hexdigest()[:32]


def _parts(value: Any, seen: dict[int, Any], outer: bool = False) -> Iterator[bytes]:
    """What tells a value apart, as bytes. Objects inside a metric count by type: an address says nothing."""
    if isinstance(value, bool | int | float | complex | str | bytes | None):
        yield f"{type(value).__name__} {value!r};".encode()
        return
    if id(value) in seen:
        yield b"again;"
        return
    seen[id(value)] = value
    yield f"{type(value).__qualname__}:".encode()
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        flat = value.detach().cpu().contiguous().flatten()
        yield flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype}{value.shape}".encode() + value.tobytes()
    elif isinstance(value, torch.nn.Module):
        yield weights_digest(value).encode()
        if outer:
            yield from _parts(type(value).forward, seen)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, set | frozenset):
        yield repr(sorted(map(repr, value))).encode()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"{key!r}=".encode()
            yield from _parts(item, seen)
    elif isinstance(value, CodeType):
        yield value.co_code + repr((value.co_names, value.co_varnames, value.co_freevars)).encode()
        for item in value.co_consts:
            yield from _parts(item, seen)
    elif isinstance(value, FunctionType):
        yield from _function_parts(value, seen)
    elif isinstance(value, partial):
        for item in (value.func, value.args, value.keywords):
            yield from _parts(item, seen, outer)
    elif isinstance(value, MethodType):
        yield from _parts(value.__func__, seen)
        yield from _parts(value.__self__, seen, outer)
    elif outer and callable(value) and not isinstance(value, type):
        yield from _parts(type(value).__call__, seen)
        yield from _parts(getattr(value, "__dict__", {}), seen)
    else:
        yield str(getattr(value, "__qualname__", "")).encode()


def _function_parts(function: FunctionType, seen: dict[int, Any]) -> Iterator[bytes]:
    """A function: its code, defaults and closure, and the constants and helpers of its package it names."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    for item in (function.__code__, function.__defaults__, function.__kwdefaults__, cells):
        yield from _parts(item, seen)
    own = function.__module__.split(".")[0] if function.__module__ else ""
    for name in sorted(set(_globals_of(function.__code__))):
        item = function.__globals__.get(name)
        local = isinstance(item, FunctionType) and (item.__module__ or "").split(".")[0] == own
        if local or isinstance(item, _PLAIN):
            yield f"{name}=".encode()
            yield from _parts(item, seen)


def _globals_of(code: CodeType) -> Iterator[str]:
    """Names of the globals that a code object and the code inside it read."""
    yield from (step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL")
    for item in code.co_consts:
        if isinstance(item, CodeType):
            yield from _globals_of(item)


def _filled(cell: Any) -> bool:
    """Whether a closure's cell holds a value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
