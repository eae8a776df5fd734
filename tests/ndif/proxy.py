"""A wire between a client and a server that can be slow, and can be cut."""

from __future__ import annotations

import contextlib
import socket
import threading
import time


class Proxy:
    """Passes on what comes to `host`, questions `delay` seconds later and answers `back`; `cut()` ends all connections."""

    def __init__(self, target: str, delay: float = 0.0, back: float = 0.0) -> None:
        name, _, port = target.removeprefix("http://").partition(":")
        self.target, self.delay, self.back = (name, int(port)), delay, back
        self.cuts = 0
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def host(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(self.target, timeout=10)
        except OSError:
            client.close()  # as if nobody was there
            return
        server.settimeout(None)
        for one in (client, server):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open |= {client, server}
        back = threading.Thread(target=self._pass, args=(server, client, self.back), daemon=True)
        back.start()
        self._pass(client, server, self.delay)
        back.join()
        self._open -= {client, server}

    def _pass(self, source: socket.socket, sink: socket.socket, delay: float) -> None:
        last = 0.0
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if delay and time.monotonic() - last > delay / 2:  # a new one, not the rest of one
                    time.sleep(delay)
                last = time.monotonic()
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def cut(self) -> int:
        """End all connections that are open; how many there were."""
        there = list(self._open)
        for one in there:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self.cuts += bool(there)
        return len(there) // 2

    def close(self) -> None:
        self._listener.close()
        self.cut()
