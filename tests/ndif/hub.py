"""A stand-in for the model hub on loopback: what `huggingface_hub` asks for, out of a folder of models.

python hub.py FOLDER PORT     FOLDER/org/name/ holds what save_pretrained wrote
"""

from __future__ import annotations

import hashlib
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

DATE = "2024-01-01T00:00:00.000Z"


def name_of(text: str) -> str:
    """A commit's or a file's name: any will do that stays the same."""
    return hashlib.sha1(text.encode()).hexdigest()


def parameters(folder: Path) -> int:
    """Numbers in the weights of a model, from the heads of its files."""
    total = 0
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            head = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, tensor in head.items():
            size = 1
            for length in tensor["shape"] if name != "__metadata__" else (0,):
                size *= length
            total += size
    return total


class Hub(BaseHTTPRequestHandler):
    """Answers for the models below `root`."""

    protocol_version = "HTTP/1.1"
    root = Path()

    def reply(self, code: int, body: bytes = b"", length: int | None = None, **headers: str) -> None:
        self.send_response(code)
        for name, value in {"content-length": str(len(body) if length is None else length), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def missing(self, what: str) -> None:
        self.reply(404, b"{}", **{"x-error-code": what, "x-error-message": what})

    def model(self, org: str, name: str) -> Path | None:
        folder = self.root / org / name
        return folder if folder.is_dir() and ".." not in (org, name) else None

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            self.facts(parts[2], parts[3], parts[4:])
        elif len(parts) >= 5 and parts[2] == "resolve":
            self.file(parts[0], parts[1], "/".join(parts[4:]))
        else:
            self.missing("EntryNotFound")

    do_HEAD = do_GET

    def facts(self, org: str, name: str, rest: list[str]) -> None:
        folder, id = self.model(org, name), f"{org}/{name}"
        if folder is None:
            self.missing("RepoNotFound")
            return
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
        if not rest or rest[0] == "revision":
            count = parameters(folder)
            said: object = {
                "_id": name_of(id)[:24], "id": id, "modelId": id, "sha": name_of(id), "private": False, "gated": False,
                "disabled": False, "tags": ["transformers"], "downloads": 0, "likes": 0, "pipeline_tag": "text-generation",
                "library_name": "transformers", "siblings": [{"rfilename": file} for file in files],
                "safetensors": {"parameters": {"F32": count}, "total": count}, "createdAt": DATE, "lastModified": DATE,
            }  # fmt: skip
        elif rest[0] == "tree" and len(rest) <= 2:
            said = [
                {"type": "file", "path": file, "size": (folder / file).stat().st_size, "oid": name_of(file)}
                for file in files
            ]
        else:
            self.missing("EntryNotFound")
            return
        self.reply(200, json.dumps(said).encode(), content_type="application/json")

    def file(self, org: str, name: str, file: str) -> None:
        folder = self.model(org, name)
        path = folder / file if folder is not None else None
        if path is None or ".." in file or not path.is_file():
            self.missing("RepoNotFound" if path is None else "EntryNotFound")
            return
        size, commit = path.stat().st_size, name_of(f"{org}/{name}")
        self.reply(
            200, path.read_bytes() if self.command == "GET" else b"", size, content_type="application/octet-stream",
            x_repo_commit=commit, etag=f'"{name_of(f"{commit}{file}{size}")}"', accept_ranges="bytes",
        )  # fmt: skip


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1]).resolve()
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Hub).serve_forever()
