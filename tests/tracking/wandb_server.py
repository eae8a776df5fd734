"""A server that answers as wandb's does, as far as a run needs it: GraphQL, the stream of a run's files, and uploads."""

from __future__ import annotations

import gzip
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

#: 40 hexadecimal digits, as a key of wandb's has.
KEY = "0f" * 20


@dataclass
class Heard:
    """What a server was sent: rows of the history, other streamed files, uploads by name, and every byte."""

    port: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    streams: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    uploads: dict[str, bytes] = field(default_factory=dict)
    upserts: list[dict[str, Any]] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    #: while it is set, requests are answered; cleared, they are taken and nothing comes back
    answers: threading.Event = field(default_factory=threading.Event)
    over: threading.Event = field(default_factory=threading.Event)
    complete: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def graphql(self, query: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        who = {"id": "e", "name": "me", "username": "me", "entity": "me", "flags": "{}", "email": ""}
        if "upsertBucket" in query:
            self.upserts.append(asked)
            project = {"id": "p", "name": asked.get("project") or "interp", "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": asked.get("name"), "displayName": asked.get("displayName") or "run", "description": "",
                      "config": "{}", "sweepName": None, "project": project, "historyLineCount": 0, "tags": [],
                      "createdAt": "2026-01-01T00:00:00"}  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in asked["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {
            "viewer": {**who, "teams": {"edges": []}},
            "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None},
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    heard: Heard

    def answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size)
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        heard = self.heard
        while not heard.answers.wait(0.1):
            if heard.over.is_set():
                return
        heard.raw.append(body)
        out: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            asked = json.loads(body)
            out = {"data": heard.graphql(asked["query"], asked.get("variables") or {})}
        elif self.path.startswith("/upload/"):
            heard.uploads[unquote(self.path.removeprefix("/upload/"))] = body
        elif self.path.endswith("/file_stream"):
            said = json.loads(body)
            for name, part in (said.get("files") or {}).items():
                heard.streams[name] += part["content"]
                if name == "wandb-history.jsonl":
                    heard.history += [json.loads(row) for row in part["content"]]
            heard.complete = heard.complete or bool(said.get("complete"))
        data = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PUT = answer

    def log_message(self, format: str, *args: object) -> None:
        pass


class Quiet(ThreadingHTTPServer):
    """One whose clients may go away."""

    daemon_threads = True

    def handle_error(self, request: object, address: object) -> None:
        pass


@contextmanager
def wandb_server() -> Iterator[Heard]:
    """A server on a port of its own."""
    heard = Heard()
    handler = type("Bound", (Handler,), {"heard": heard})
    server = Quiet(("127.0.0.1", 0), handler)
    heard.port = server.server_address[1]
    heard.answers.set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield heard
    finally:
        heard.over.set()
        server.shutdown()
        server.server_close()
