"""NDIF: requests run on a deployment that holds the weights (Fiotto-Kaufman et al. 2024); none come here."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import nnsight

from ..errors import BackendError
from ..models.layout import Envoy
from .errand import Errand, Sealed
from .remote import Shipped, failure
from .trace import Function
from .traffic import Traffic
from .wire import Wire

if TYPE_CHECKING:
    from ..models.model import Model

#: Requests that are on their way at once.
IN_FLIGHT = 4
_ONE_AT_A_TIME = threading.Lock()


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
        super().__init__(timeout, IN_FLIGHT)
        self.host = host
        self._wire: Wire | None = None

    @property
    def where(self) -> str:
        """The address that requests go to."""
        return str(self.host or nnsight.CONFIG.API.HOST)

    def address(self, model: Model) -> tuple[str, Mapping[str, object]]:
        return model_key(model.nn), model.nn._remoteable_get_env()

    def wire(self) -> Wire:
        """The connection, made where there is none. Raises BackendError: a key is needed, and missing."""
        with _ONE_AT_A_TIME:  # several requests begin at once
            if self._wire is None or self._wire.host != self.where.rstrip("/"):
                self._wire = Wire(self.host)
            self._wire.largest = self.largest
            return self._wire

    def fetch(self, model: Model, request: Sealed, traffic: Traffic, function: Function) -> dict[str, Envoy]:
        explain = partial(self.explain, model, function)
        timeout = self.timeout if self.ledger is None else math.inf  # a job has a deadline over all
        errand = Errand(self.wire(), traffic, request, self.ledger, explain, timeout)
        answer = errand.run()
        with _ONE_AT_A_TIME:
            self.received += errand.received
        return answer

    def explain(self, model: Model, function: Function, said: str) -> BackendError:
        """The error of a request that failed, from what the server says of it."""
        where = f"the server at {self.where}"
        if said.startswith("Could not deploy this model"):
            return BackendError(
                f"{where} cannot run {model.name}; interp.remote_status({self.where!r}) lists what it runs, another's hub id has "
                f"it load that. It said: {' '.join(said.split())[:600]}"
            )
        return failure(said, function, where)
