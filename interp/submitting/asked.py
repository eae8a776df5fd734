"""What a job was asked, as bytes: the method and its arguments, with a place where each model stood.

A model is kept as the call of `load_model` that made it, without passwords. All else is pickled, functions typed in a script or
notebook with their code: whoever loads the file runs what is in it, so load none but your own.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType

import cloudpickle

from ..errors import JobError
from ..models.model import Model

OURS = __name__.split(".")[0]
Call = tuple[Callable[..., object], tuple[object, ...], dict[str, object]]


class _Packer(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles a call, and puts its models aside."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.models: list[Model] = []

    def reducer_override(self, obj: object) -> object:
        """What is ours is known by name, although nnsight has it travel to servers by its source."""
        name = obj.__name__ if isinstance(obj, ModuleType) else getattr(obj, "__module__", None)
        if not isinstance(name, str) or name.split(".")[0] != OURS:
            return super().reducer_override(obj)
        return (import_module, (name,)) if isinstance(obj, ModuleType) else NotImplemented

    def persistent_id(self, obj: object) -> int | None:
        if not isinstance(obj, Model):
            return None
        for number, model in enumerate(self.models):
            if model is obj:
                return number
        self.models.append(obj)
        return len(self.models) - 1


class _Unpacker(pickle.Unpickler):
    """Puts models where they stood."""

    def __init__(self, file: io.BytesIO, models: Sequence[Model]) -> None:
        super().__init__(file)
        self.models = models

    def persistent_load(self, pid: object) -> Model:
        return self.models[int(str(pid))]


def pack_call(call: Call) -> tuple[bytes, list[Model]]:
    """A call as bytes, and the models in it. Raises JobError: something in it cannot be kept."""
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        packer.dump(call)
    except Exception as error:
        raise JobError(
            f"this call cannot be kept for another process: {type(error).__name__}: {error}. Its arguments must be plain "
            "values, tensors and functions that hold no lock, file, generator or other thing of this process"
        ) from error
    return file.getvalue(), packer.models


def unpack_call(blob: bytes, models: Sequence[Model]) -> Call:
    """The call again, with these models. Raises JobError: it needs a module that this process does not have."""
    try:
        made: Call = _Unpacker(io.BytesIO(blob), models).load()
    except Exception as error:
        raise JobError(
            f"the call that this job is of cannot be made here: {type(error).__name__}: {error}. Load it where the modules that "
            "it uses are on the path, with the Python and packages that it was submitted with"
        ) from error
    return made


def pack_models(models: Sequence[Model]) -> bytes:
    """How each model was loaded, as bytes; an empty entry for one that was made from a module in memory."""
    try:
        return bytes(cloudpickle.dumps([dict(model.loaded) for model in models]))
    except Exception:  # an option that holds something of this process: the model must be given again
        return bytes(cloudpickle.dumps([{} for _ in models]))


def load_models(blob: bytes) -> list[Model]:
    """The models that a job is about, loaded again. Raises JobError where that cannot be, and what load_model raises."""
    from ..models.loading import load_model

    made = []
    for loaded in pickle.loads(blob):
        how: Mapping[str, object] = loaded
        if not how:
            raise JobError(
                "this job is about a model that was in memory, which no file brings back: load the same model and give it, "
                "interp.Job.load(path, model=model)"
            )
        made.append(load_model(**how))  # type: ignore[arg-type]
    return made
