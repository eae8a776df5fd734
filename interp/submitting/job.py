"""`submit` and `Job`: a method that runs on a server, and is found again."""

from __future__ import annotations

import contextlib
import platform
import secrets
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from ..engine.ledger import Ledger
from ..errors import JobError
from ..files import path_of, write_atomically
from ..journal import tell
from ..models.model import Model
from .asked import pack_call, pack_models
from .runner import Runner, elsewhere
from .state import POINTER, Progress, progress_of, state_of

#: Seconds that a job may take, and that `submit` waits for a method to refuse what it was given.
DEADLINE, REFUSED_WITHIN = 86400.0, 20.0
#: Seconds between two looks at a job.
LOOKED = 0.5


class Job:
    """A method on its way; made by `submit`, found again by `Job.load(path)`.

    `method` and `model` are what it runs, `path` is its file. It runs in a thread of this process; whatever ends that, the job
    goes on from its file.

    Examples:
        >>> there = interp.load_model("smollm2-135m", backend="simulated")
        >>> job = interp.submit(interp.patch, there, pairs, interp.grid("mlp_out", layers=[3]))
        >>> path = job.save("sweep.job")
        >>> effects = job.result()
        >>> interp.Job.load(path).status
        'done'
    """

    def __init__(self, runner: Runner) -> None:
        self._runner, self._ledger = runner, runner.ledger
        self.id, self.method, self.model = (str(self._ledger.fact(name)) for name in ("id", "method", "model"))

    @classmethod
    def load(cls, path: str | Path, model: Model | None = None) -> Job:
        """A job from its file; what is not done goes on at once, in a thread, and fetches what finished meanwhile.

        Args:
            path: the file; it holds code that is run, so load none but your own.
            model: in place of the one that it was submitted with, where that cannot be loaded by its name, or needs a password.

        Raises:
            JobError: no job's file, another model, or one of other versions of Python or interp.
        """
        file = path_of(path, JobError)
        if not file.is_file():
            raise JobError(f"no job at {file}; interp.jobs() lists those known here")
        ledger = Ledger(file)
        for name, here in versions().items():
            if (then := ledger.fact(name)) != here:  # answers of different versions are not mixed
                raise JobError(
                    f"{file} was submitted with {name} {then}, and this is {here}: load it with that version"
                )
        if model is not None:
            elsewhere(model)
            if model.name != ledger.fact("model"):
                raise JobError(f"{file} is about {ledger.fact('model')}, and the model given is {model.name}")
        job = cls(Runner(ledger, None if model is None else [model]))
        if job.status != "done":
            job._runner.begin()
        return job

    @property
    def path(self) -> Path:
        """The job's file."""
        return self._ledger.path

    @property
    def status(self) -> str:
        """ "running", "done", "failed", "cancelled", or "stopped": begun by a process that is no more."""
        return state_of(self._ledger)

    @property
    def progress(self) -> Progress:
        """How far it is: a number from 0 to 1, of the method's present work."""
        return progress_of(self._ledger)

    @property
    def events(self) -> list[tuple[float, str, str, str]]:
        """All that happened to its requests: (seconds since 1970, id on the server, what, what was said)."""
        return self._ledger.events()

    def result(self, timeout: float | None = None) -> object:
        """What the method returns; waits for it.

        Raises:
            Whatever the method raises. JobError: no result after `timeout` seconds, or it was cancelled.
        """
        until = time.monotonic() + (float("inf") if timeout is None else timeout)
        runner = self._runner
        while True:
            if runner.thread is None and not runner.finished.is_set():  # done before, or another process has it
                runner.begin()
            if runner.finished.wait(max(0.0, min(LOOKED, until - time.monotonic()))):
                break
            if time.monotonic() >= until:
                raise JobError(f"{self!r} has no result after {timeout:.0f} s; it goes on, ask again")
        if runner.error is not None:
            raise runner.error
        if self.status == "cancelled":
            raise JobError(f"{self!r} was cancelled; interp.Job.load({str(self.path)!r}) goes on with it")
        return runner.result

    def cancel(self) -> None:
        """Send nothing more. What a server has already it finishes: NDIF lets only those who run it take a request back."""
        self._runner.cancel()

    def save(self, path: str | Path) -> Path:
        """Keep the job's file at `path` from now on, while it runs or after. JobError: there is one, or none can be written."""
        new, old = path_of(path, JobError).absolute(), self.path
        if new == old.absolute():
            return old
        self._runner.move(new)
        with contextlib.suppress(OSError):  # where it cannot be written, interp.jobs() does not list it
            write_atomically(old.with_suffix(POINTER), str(new).encode())
        return new

    def __repr__(self) -> str:
        return f"Job({self.method} on {self.model}: {self.status}, {self.progress!r}; {self.path})"


def submit(
    method: Callable[..., object],
    *args: object,
    in_flight: int = 4,
    deadline: float = DEADLINE,
    root: str | Path = "artifacts/jobs",
    **kwargs: object,
) -> Job:
    """Run a method on a model that is elsewhere, as a job that outlives this process.

    Args:
        method: a public method (`interp.patch`, `interp.discover`, `model.run`, …) or a function of your own that calls some.
        args, kwargs: what it is given; a model among them must have a backend elsewhere ("simulated", "ndif", an address).
        in_flight: requests on their way at once.
        deadline: seconds in which all must be done, counted anew when the job is loaded.
        root: the folder of the job's file; `Job.save(path)` puts it elsewhere.

    Returns:
        Job, at once, or as soon as the method has checked what it was given.

    Raises:
        JobError: no model, one that runs in this process, or arguments that cannot be kept.
        Whatever the method refuses before it runs the model: a plan, a metric that cannot travel, …

    Examples:
        >>> there = interp.load_model("smollm2-135m", backend="simulated")
        >>> job = interp.submit(interp.patch, there, pairs, interp.grid("resid_pre", layers=[3]))
        >>> job.result().values.sizes["layer"]
        1
    """
    if not callable(method):
        raise JobError(
            f"submit was given a {type(method).__name__}: give a method, interp.patch or another, and its arguments"
        )
    if in_flight < 1 or deadline <= 0:
        raise JobError(f"in_flight={in_flight}, deadline={deadline}: at least 1 request, and more than 0 seconds")
    blob, models = pack_call((method, args, kwargs))
    name = getattr(method, "__name__", type(method).__name__)
    if not models:
        raise JobError(f"submit({name}, …) was given no model: give it as {name} takes it, submit({name}, model, …)")
    for model in models:
        elsewhere(model)
    id = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{secrets.token_hex(3)}"
    ledger = Ledger(path_of(root, JobError, "root") / f"{id}.job")
    ledger.note(
        id=id, method=name, model=models[0].name, created=time.time(), call=blob, models=pack_models(models), state="running",
        in_flight=in_flight, deadline=deadline, share=0.0, limit=elsewhere(models[0]).limit, **versions(),
    )  # fmt: skip
    runner = Runner(ledger, models)
    runner.begin()
    if (refused := runner.refusal(REFUSED_WITHIN)) is not None:  # there is no job then
        runner.forget()
        raise refused
    job = Job(runner)
    tell("submit", {"method": name, "model": models[0].name, "in_flight": in_flight, "path": str(job.path)}, repr(job))
    return job


def versions() -> dict[str, str]:
    """What must be the same where a job goes on: a metric's compiled code is Python's, and what is asked is ours."""
    return {"interp": version("interp"), "python": ".".join(platform.python_version_tuple()[:2])}
