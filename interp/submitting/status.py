"""`remote_status`: what a server is, before anything is sent to it."""

from __future__ import annotations


def remote_status(host: str | None = None) -> object:
    """To come."""
    raise NotImplementedError(host)
