"""`backend="simulated"`: requests are serialised as for NDIF and run by another process, without `interp`."""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from math import isclose
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import BackendError
from ..models.adapters import adapter_layers
from ..models.layout import Envoy
from . import worker as script
from .answers import read_answer
from .errand import Sealed
from .identity import weights_digest
from .remote import Shipped, failure
from .trace import Function
from .traffic import Stopped, Traffic

if TYPE_CHECKING:
    from ..models.model import Model

#: How many models the worker keeps; one more, and it drops the one that was used longest ago.
MODELS = 4


class Worker:
    """The process, its pipes, the models that it holds, and a folder for what has no better place."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="interp-worker-", ignore_cleanup_errors=True)
        self.owner = os.getpid()
        self.log = Path(self.folder.name) / "stderr.txt"
        self.models: dict[Any, int] = {}  # what is loaded -> its number over there, used last at the end
        self.loads = 0
        self.lock = threading.Lock()  # answers come in the order of questions
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", script.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=self.folder.name,
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process; it ends a worker that it waits for
            )
        self.answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(EOFError, OSError, ValueError):
            while True:
                self.answers.put(script.read_frame(self.process.stdout))
        self.answers.put(("lost", None))

    def ask(self, kind: str, content: Any, timeout: float) -> tuple[bool, Any]:
        """One question: (True, its answer) or (False, the traceback of its failure); BackendError if lost."""
        with self.lock:
            return self._ask(kind, content, timeout)

    def _ask(self, kind: str, content: Any, timeout: float) -> tuple[bool, Any]:
        assert self.process.stdin is not None
        try:
            script.write_frame(self.process.stdin, (kind, content))
            verdict, answer = self.answers.get(timeout=timeout)
        except queue.Empty:
            self.close()
            raise BackendError(
                f"the worker process did not answer within {timeout:.0f} s and was ended; give it less at "
                "once (max_tokens=), or more time (model.backend.timeout)"
            ) from None
        except (OSError, ValueError):  # a broken pipe, or one that was closed
            verdict, answer = "lost", None
        except BaseException:  # interrupted: this question's answer must not be taken for the next one's
            self.close()
            raise
        if verdict != "lost":
            return verdict == "ok", answer
        said = ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        with contextlib.suppress(OSError):
            said = self.log.read_text(errors="replace").strip()[-2000:]
        self.close()
        code = self.process.returncode
        why = "it was killed, most often for want of memory" if code < 0 else "it says why below"
        raise BackendError(
            f"the worker process ended with status {code}: {why}. The next run starts a new one.\n{said}"
        )

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.process.poll() is None

    def close(self) -> None:
        """End the process. A fork of the process that started it does nothing here."""
        if os.getpid() != self.owner:
            return
        if self.alive:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]
        self.folder.cleanup()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar of transformers where the user asked for nothing to be saved."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


_current: Worker | None = None


def current_worker() -> Worker:
    """The one worker of this process, started where there is none; it ends with this process."""
    global _current
    if _current is None or not _current.alive or _current.owner != os.getpid():
        if _current is not None:
            _current.close()
        _current = Worker()
        atexit.register(_current.close)
    return _current


class Simulated(Shipped):
    """A lasting process on this machine with torch, transformers and nnsight stands for the server.

    Args:
        source: the folder or hub id that the worker loads, or a HuggingFace module, which is saved for it.
        timeout: seconds that one request may take.
        options: how the checkpoint was read here (`subfolder`, `cache_dir`, `token`, changes to the config, …).
    """

    def __init__(self, source: Any, timeout: float = 3600.0, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(timeout)
        self.source = source
        self.options = dict(options or {})

    def address(self, model: Model) -> tuple[str, Mapping[str, object]]:
        return model.name, {}

    def fetch(self, model: Model, request: Sealed, traffic: Traffic, function: Function) -> dict[str, Envoy]:
        if traffic.stopped:
            raise Stopped
        worker = current_worker()
        settings = (torch.get_num_threads(), torch.get_float32_matmul_precision())
        question = (self.number_of(model, worker), settings, request.blob)
        if self.ledger is not None:
            self.ledger.sent(request.key, "", len(request.blob))
        good, answer = worker.ask("run", question, self.timeout)
        if not good:
            raise failure(answer, function, "the simulated server")
        self.received += len(answer)
        found = read_answer(answer, self.largest)
        if self.ledger is not None:
            self.ledger.done(request.key, "", answer)
        return found

    def number_of(self, model: Model, worker: Worker) -> int:
        """The worker's number for this model with the weights that it has now; loads it there where needed.

        Raises:
            BackendError: it cannot be saved or loaded, or what the worker loaded is not what is in memory.
        """
        hf = model.hf
        if adapter_layers(hf):
            raise BackendError(
                f"{model.name} holds adapters of PEFT, which a server would have to be given apart: merge them into the "
                "weights first and load what comes out (peft_model.merge_and_unload())"
            )
        weights = script.fingerprint(hf)
        in_memory = isinstance(self.source, torch.nn.Module)
        attention = getattr(hf.config, "_attn_implementation", None)
        key = (id(hf) if in_memory else str(self.source), model.dtype, attention, weights_digest(hf))
        if key in worker.models:
            worker.models[key] = worker.models.pop(key)
            return worker.models[key]
        while len(worker.models) >= MODELS:
            worker.ask("drop", worker.models.pop(next(iter(worker.models))), self.timeout)
        options: dict[str, Any] = {**self.options, "dtype": model.dtype, "attn_implementation": attention}
        if (spread := getattr(hf, "hf_device_map", None)) is not None and len(spread) > 1:
            options["device_map"] = spread
        if (quantised := getattr(hf.config, "quantization_config", None)) is not None:
            options["quantization_config"] = quantised
        module, name = type(hf).__module__, type(hf).__qualname__
        if module.startswith("transformers_modules"):
            module, name = "transformers", "AutoModelForCausalLM"
            options["trust_remote_code"] = True
        elif module.split(".")[0] != "transformers":
            raise BackendError(
                f"a {name} is a class of {module!r}, which the worker process does not have: give load_model a module of a "
                "class of transformers, or a folder whose code lies beside its weights (trust_remote_code=True)"
            )
        source = self.source
        worker.loads += 1
        if in_memory:
            source = Path(worker.folder.name) / f"model-{worker.loads}"
            with quiet():
                hf.save_pretrained(source)
        elif model.revision:
            options["revision"] = model.revision
        spec = {"source": str(source), "class": (module, name), "device": str(model.device), "options": options}
        good, answer = worker.ask("load", (worker.loads, spec), self.timeout)
        if in_memory:
            shutil.rmtree(source, ignore_errors=True)  # the worker has it in memory now
        if not good:
            raise failure(answer, self.number_of, "loading the model in the worker process")
        wrong = [name for name in weights if not isclose(weights[name], answer.get(name, -1.0), rel_tol=1e-3)]
        if wrong or len(answer) != len(weights):
            worker.ask("drop", worker.loads, self.timeout)
            raise BackendError(
                f"the worker's copy of {model.name} differs from the model here ({len(wrong)} parameters, "
                f"first {(wrong or ['one that is missing here'])[0]!r}): the backend needs a model that "
                "save_pretrained and from_pretrained restore; give load_model a module whose weights you "
                "changed, not its folder"
            )
        worker.models[key] = worker.loads
        return worker.loads
