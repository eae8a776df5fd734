"""What a deployment of NDIF is asked over HTTP, one call each: take a request, tell of it, hand over its result, tell of itself.

Requests are sent without a websocket, so that the server keeps each status and result under the request's id: a connection
that drops, here or there, loses nothing. The id is chosen here, of 128 random bits, and known before anything is sent.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version

import httpx
import nnsight

from ..errors import BackendError
from .answers import LARGEST, too_large

#: Seconds to be connected, and to wait for the next bytes.
CONNECT, READ = 10.0, 120.0
#: HTTP answers of a server, or of what stands before it, that pass.
PASSING = (408, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524)
#: Bytes of an answer that is no result.
SMALL = 2**24
#: NDIF's own address: there a key is needed.
PUBLIC = "ndif.us"


class Passed(Exception):
    """Something that may be gone the next time.

    `restart`: the server itself was not there. `untaken`: what was sent did not reach it for certain. `wait`: seconds that it
    asked for.
    """

    def __init__(self, said: str, restart: bool = False, untaken: bool = False, wait: float = 0.0) -> None:
        super().__init__(said)
        self.restart, self.untaken, self.wait = restart, untaken, wait


class Gone(Exception):
    """A result that the server no longer has."""


@dataclass(frozen=True)
class Told:
    """What a server says of a request: RECEIVED, QUEUED, DISPATCHED, RUNNING, COMPLETED or ERROR, and where its result is."""

    status: str
    description: str
    url: str


def new_id() -> str:
    """A name for a request that nobody guesses: who knows it may read what comes back."""
    return secrets.token_hex(16)


def key_for(host: str) -> str:
    """The user's key for NDIF, as nnsight has it; BackendError where there is none and one is needed."""
    key = str(nnsight.CONFIG.API.APIKEY or os.environ.get("NDIF_API_KEY") or "")
    if not key and (httpx.URL(host).host or "").endswith(PUBLIC):
        raise BackendError(
            f"the server at {host} needs an API key, and there is none: set NDIF_API_KEY in the environment, or "
            "nnsight.CONFIG.set_default_api_key(...) once; keys are given out at https://login.ndif.us"
        )
    return key


class Wire:
    """The calls of one server. Each raises `Passed` where trying again may help, and BackendError where it does not."""

    def __init__(self, host: str | None, largest: int = LARGEST) -> None:
        self.host = str(host or nnsight.CONFIG.API.HOST).rstrip("/")
        if not self.host.startswith(("http://", "https://")):
            raise BackendError(f"{self.host!r} is no address of a server; write http://host:port or https://host")
        self.largest = largest
        key = key_for(self.host)
        self._key = key
        headers = {"nnsight-version": version("nnsight"), "python-version": sys.version}
        self._client = httpx.Client(
            base_url=self.host,
            headers=headers | ({"ndif-api-key": key} if key else {}),
            timeout=httpx.Timeout(READ, connect=CONNECT),
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=5),
        )
        self._bare = httpx.Client(timeout=self._client.timeout)  # results lie elsewhere: the key is not for there

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()
        self._bare.close()

    def said(self, error: object) -> str:
        """An error as text, without the key."""
        text = str(error)
        return text.replace(self._key, "…") if self._key else text

    def _read(self, client: httpx.Client, method: str, url: str, most: int, **sent: object) -> tuple[int, bytes, str]:
        """(status, body, what `retry-after` says) of a call; no more than `most` bytes are taken."""
        held = bytearray()
        try:
            with client.stream(method, url, **sent) as response:  # type: ignore[arg-type]
                for part in response.iter_bytes():
                    held += part
                    if len(held) > most:
                        raise too_large(most)
                return response.status_code, bytes(held), response.headers.get("retry-after", "")
        except httpx.ConnectError as error:
            said = f"no connection to {self.host} ({self.said(error)})"
            raise Passed(said, restart=refused(error), untaken=True) from error
        except httpx.TransportError as error:
            raise Passed(f"the connection to {self.host} broke ({type(error).__name__}: {self.said(error)})") from error
        except httpx.HTTPError as error:
            raise BackendError(f"{self.host} cannot be asked: {type(error).__name__}: {self.said(error)}") from error
        except (httpx.InvalidURL, ValueError) as error:
            raise BackendError(f"{self.host} is no address of a server: {self.said(error)}") from error

    def call(self, method: str, url: str, **sent: object) -> dict[str, object] | None:
        """The JSON object that a call gives; None for 404."""
        status, body, after = self._read(self._client, method, url, SMALL, **sent)
        if status == 404 and method == "GET":
            return None
        if status >= 300:
            raise self._failed(status, body, after)
        try:
            found = json.loads(body)
        except ValueError as error:
            raise BackendError(self._no_ndif(f"it answered {url.split('/')[1]!r} with {body[:80]!r}")) from error
        if not isinstance(found, dict):
            raise BackendError(self._no_ndif(f"it answered {url.split('/')[1]!r} with a {type(found).__name__}"))
        return found

    def _no_ndif(self, why: str) -> str:
        return f"{self.host} does not answer as an NDIF server does: {why}; is the address right?"

    def _failed(self, status: int, body: bytes, after: str) -> Exception:
        """What an HTTP status above 299 means."""
        said = body.decode(errors="replace").strip()
        try:
            detail = json.loads(said)
            said = str(detail.get("detail", said)) if isinstance(detail, dict) else said
        except ValueError:
            pass
        said = self.said(said)[:500]
        if status in (401, 403):
            return BackendError(
                f"the server at {self.host} does not take this API key ({status}: {said}); set NDIF_API_KEY to a valid one"
            )
        if status in PASSING:
            what = "its queue is full" if status == 429 else "it is not ready"
            wait = float(after) if after.replace(".", "", 1).isdigit() else 0.0
            untaken = status in (425, 429, 503)
            return Passed(f"{self.host}: {what} ({status}: {said})", status in (502, 503), untaken, wait)
        if "version" in said.lower():
            return BackendError(
                f"the server at {self.host} does not take what this machine sends ({status}: {said}); "
                f"here nnsight is {version('nnsight')}, Python {sys.version.split()[0]}; see interp.remote_status({self.host!r})"
            )
        return BackendError(f"the server at {self.host} refused the request ({status}: {said})")

    def post(self, id: str, model_key: str, env: Mapping[str, object], blob: bytes) -> str:
        """Hand a request over; returns the id under which the server has it."""
        envelope = {"id": id, "model_key": model_key, "session_id": "", "compress": True, "env": dict(env)}
        found = self.call(
            "POST",
            "/request",
            data={"data": json.dumps(envelope)},
            files={"blob": ("request", blob, "application/octet-stream")},
            headers={"ndif-timestamp": repr(time.time())},
        )
        if found is None or not isinstance(found.get("id"), str):
            raise BackendError(self._no_ndif(f"it took a request and said {str(found)[:80]!r}"))
        return str(found["id"])

    def look(self, id: str) -> Told | None:
        """What has become of a request; None where the server knows of none under this id (yet)."""
        found = self.call("GET", f"/response/{id}")
        if found is None:
            return None
        if found.get("id") != id or not isinstance(found.get("status"), str):
            raise BackendError(self._no_ndif(f"asked for a request it said {str(found)[:80]!r}"))
        return Told(str(found["status"]), self.said(found.get("description") or ""), str(found.get("data") or ""))

    def connected(self) -> bool:
        """Whether the server has its workers, and takes requests."""
        try:
            self.call("GET", "/connected")
        except Passed:
            return False
        return True

    def result(self, url: str) -> bytes:
        """The bytes of a result, from where the server says it is. Raises Gone: they are there no more."""
        if not url.startswith(("http://", "https://")):
            raise BackendError(self._no_ndif(f"it says of a result that it is at {url[:80]!r}"))
        status, body, after = self._read(self._bare, "GET", url, self.largest)
        if status in (403, 404, 410):
            raise Gone(f"the server no longer has the result ({status})")
        if status >= 300:
            raise self._failed(status, body, after)
        return body


def refused(error: httpx.ConnectError) -> bool:
    """Whether nobody listened at the address: a server that was stopped, not a network that is away."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError) or "refused" in str(cause).lower():
            return True
        cause = cause.__cause__ or cause.__context__
    return False
