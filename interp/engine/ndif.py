"""NDIF: requests run on a deployment that holds the weights (Fiotto-Kaufman et al. 2024); none come here."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import nnsight
from nnsight.intervention.backends.remote import RemoteBackend, RemoteError
from nnsight.tracing.backend import Backend as Transport

from ..errors import BackendError
from ..models.layout import Envoy
from .remote import Shipped, failure, serialise
from .trace import Function

if TYPE_CHECKING:
    from ..models.model import Model


class Watch:
    """Stands where nnsight prints a job's status: notes the last one, and ends a wait that takes too long."""

    enabled = True  # nnsight then wakes up between messages, and calls `refresh`

    def __init__(self, timeout: float) -> None:
        self.timeout, self.deadline, self.status = timeout, time.monotonic() + timeout, "SENT"

    def update(self, response: Envoy) -> None:
        """A message of the server."""
        self.status = response.status.value

    def refresh(self) -> None:
        """No message for a moment. Raises BackendError past the deadline."""
        if time.monotonic() > self.deadline:
            raise BackendError(
                f"no result within {self.timeout:.0f} s, the job was last {self.status}: the server may be "
                "full, or was restarted and lost it; run again, or set model.backend.timeout to more seconds"
            )


class Wire(RemoteBackend):
    """nnsight's connection to a server, with its bytes counted."""

    def __init__(self, backend: Ndif, model: Model) -> None:
        env = model.nn._remoteable_get_env()
        super().__init__(model_key(model.nn), host=backend.host, env=env)
        self.compress = True
        self.backend = backend
        self.display = Watch(backend.timeout)

    def _serialize(self, tracer: Envoy) -> bytes:
        blob = serialise(tracer)
        self.backend.sent += len(blob)
        return blob

    def finalize(self, content: bytes) -> Any:
        self.backend.received += len(content)
        return super().finalize(content)


def model_key(nn: Envoy) -> str:
    """The name under which servers know this model: the hub's spelling of its id or, without a hub, ours."""
    from nnsight.modeling import huggingface

    try:
        return nn.to_model_key()
    except Exception:  # no hub to ask, or a folder
        huggingface._ID_CACHE[nn.repo_id] = nn.repo_id
        return nn.to_model_key()


class Ndif(Shipped):
    """A deployment of NDIF: nnsight's configured one, or one at an address of your own.

    Args:
        host: `http://host:port`; None for nnsight's own setting (the public deployment; it needs an API key).
        timeout: seconds to wait for one request.
    """

    weights_here = False

    def __init__(self, host: str | None = None, timeout: float = 3600.0) -> None:
        super().__init__(timeout)
        self.host = host

    def transport(self, model: Model) -> Transport:
        return Wire(self, model)

    def explain(self, error: Exception, function: Function) -> BackendError:
        where = self.host or nnsight.CONFIG.API.HOST
        if isinstance(error, RemoteError):
            return failure(str(error), function, f"the server at {where}")
        return BackendError(
            f"no connection to the NDIF server at {where} ({type(error).__name__}: {error}); is it running, "
            "is the address right, and, for the public one, is NDIF_API_KEY set?"
        )
