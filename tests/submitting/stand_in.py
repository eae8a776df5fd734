"""A stand-in for a deployment of NDIF: its HTTP calls as 0.1.2 answers them, its queue, and faults on demand.

It runs what it is sent in a worker process without `interp`, one request after another, and counts what it ran. The real
server is tested against in tests/ndif.
"""

from __future__ import annotations

import json
import queue
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import interp
from interp.engine.simulated import Simulated, current_worker

#: What the server says where its worker was killed, word for word.
KILLED = "Error submitting request to model deployment. Please try again later. Sorry for the inconvenience."


class StandIn:
    """One server. `model` is an `interp` model with `backend="simulated"`, whose worker runs the requests.

    `ran` counts finished runs by id. A fault is called with the handler before a call is answered, and returns whether it
    answered itself.
    """

    def __init__(self, model: interp.Model) -> None:
        self.model = model
        self.ran: Counter[str] = Counter()
        self.began: Counter[str] = Counter()
        self.told: dict[str, dict[str, Any]] = {}
        self.results: dict[str, bytes] = {}
        self.keys: list[str | None] = []
        self.queue: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self.fault: Callable[[Any], bool] | None = None
        self.error: Callable[[str], str | None] = lambda id: None  # what a request ends with instead of running
        self.delay = 0.0
        self.held = threading.Event()
        self.held.set()
        self.most = 0  # requests that were here at once
        self.port = 0
        self._server: ThreadingHTTPServer | None = None
        threading.Thread(target=self._work, daemon=True).start()
        self.start()

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 2**16

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                stand_in._answer(self, "GET")

            def do_POST(self) -> None:
                stand_in._answer(self, "POST")

        class Server(ThreadingHTTPServer):
            daemon_threads, allow_reuse_address, request_queue_size = True, True, 64

            def handle_error(self, *_: Any) -> None:
                pass  # a client that went away

        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self, forget: bool = False) -> None:
        """Nobody listens any more; `forget`: what was queued is lost, and so is what was said of it."""
        assert self._server is not None
        self._server.shutdown()
        self._server.server_close()
        if forget:
            while not self.queue.empty():
                self.queue.get_nowait()
            self.told = {id: told for id, told in self.told.items() if told["status"] == "COMPLETED"}

    def say(self, id: str, status: str, description: str = "", data: str | None = None) -> None:
        self.told[id] = {"id": id, "status": status, "description": description, "data": data, "meta": None}

    def _work(self) -> None:
        while True:
            id, blob = self.queue.get()
            self.held.wait()
            self.began[id] += 1
            self.say(id, "RUNNING", "Your job has started running.")
            if (said := self.error(id)) is not None:
                self.say(id, "ERROR", said)
                continue
            worker, backend = current_worker(), self.model.backend
            assert isinstance(backend, Simulated)
            good, answer = worker.ask("run", (backend.number_of(self.model, worker), (1, "highest"), blob), 300)
            if not good:
                self.say(id, "ERROR", answer)
                continue
            self.ran[id] += 1
            self.results[id] = answer
            self.say(id, "COMPLETED", "Your job has been completed.", f"{self.host}/result/{id}")

    def waiting(self) -> int:
        """Requests that were taken and are not finished."""
        return sum(told["status"] not in ("COMPLETED", "ERROR") for told in self.told.values())

    def _answer(self, handler: Any, method: str) -> None:
        time.sleep(self.delay)
        if self.fault is not None and self.fault(handler):
            return
        if method == "POST":
            size = int(handler.headers["content-length"])
            data = handler.rfile.read(size)
            self.keys.append(handler.headers.get("ndif-api-key"))
            parts = parts_of(handler.headers["content-type"], data)
            envelope = json.loads(parts[b"data"])
            assert envelope["session_id"] == "" and envelope["compress"] is True
            id = envelope["id"]
            self.say(id, "QUEUED", "Added to Queue at position 1.")
            self.queue.put((id, parts[b"blob"]))
            self.most = max(self.most, self.waiting())
            self.reply(handler, 200, {"id": id, "status": "RECEIVED", "description": "", "data": None, "meta": None})
        elif handler.path.startswith("/response/"):
            told = self.told.get(handler.path.split("/")[2])
            self.reply(handler, *((200, told) if told else (404, {"detail": "No response"})))
        elif handler.path.startswith("/result/"):
            found = self.results.get(handler.path.split("/")[2])
            self.reply(handler, 200 if found else 404, found or b"")
        else:
            self.reply(handler, 404, {"detail": "Not Found"})

    @staticmethod
    def reply(handler: Any, code: int, content: Any, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    @staticmethod
    def cut(handler: Any) -> None:
        """End a connection in the middle, as a network does."""
        handler.close_connection = True
        handler.connection.shutdown(socket.SHUT_RDWR)


def parts_of(kind: str, data: bytes) -> dict[bytes, bytes]:
    """The parts of a form as it is posted, by name."""
    boundary = kind.partition("boundary=")[2].encode()
    found = {}
    for part in data.split(b"--" + boundary)[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'name="(\w+)"', head)
        assert name is not None
        found[name.group(1)] = content[:-2]
    return found
