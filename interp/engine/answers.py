"""Answers from elsewhere: tensors and plain data are built, and nothing in them is run.

An answer is torch's zip format, compressed, as nnsight's servers send it. It is unpacked no further than a limit, its parts
must lie in it as they are, and torch's restricted unpickler reads it: that one builds tensors, numbers, text and
containers, and refuses every other name a pickle may hold, before anything of it is called.
"""

from __future__ import annotations

import hashlib
import io
import zipfile

import torch
import zstandard

from ..errors import BackendError
from ..models.layout import Envoy

#: Bytes that an answer may hold, unpacked.
LARGEST = 2**30
_CHUNK = 2**20


def digest_of(blob: bytes) -> str:
    """The first half of an answer's sha256."""
    return hashlib.sha256(blob).hexdigest()[:32]


def unpacked(blob: bytes, largest: int) -> bytes:
    """What a compressed answer holds. Raises BackendError: not whole, not compressed so, or more than `largest` bytes."""
    held = bytearray()
    try:
        reader = zstandard.ZstdDecompressor().decompressobj()
        view = memoryview(blob)
        for start in range(0, len(view), _CHUNK):
            held += reader.decompress(view[start : start + _CHUNK])
            if len(held) > largest:
                raise too_large(largest)
    except (zstandard.ZstdError, MemoryError) as error:
        raise refused(f"it is no compressed answer ({error})") from error
    if not reader.eof:
        raise refused(f"it ends in the middle, after {len(blob):,} bytes")
    return bytes(held)


def read_answer(blob: bytes, largest: int = LARGEST) -> dict[str, Envoy]:
    """The values that a request saved, by name.

    Raises:
        BackendError: garbage, a part of an answer, too much, or a pickle that names what is neither tensor nor plain data.
    """
    data = unpacked(blob, largest)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise refused(f"it is not in torch's format ({error})") from error
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise refused("its parts are packed once more, which torch never does")
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # an UnpicklingError for what is not allowed, and every class for what is malformed
        said = str(error).strip().split("\n")[0]
        raise refused(f"it is not tensors and plain data alone ({type(error).__name__}: {said[:200]})") from error
    if type(found) is not dict:
        raise refused(f"it is a {type(found).__name__}, not the values of a request by name")
    return found


def refused(why: str) -> BackendError:
    """The error for an answer that cannot be used."""
    return BackendError(
        f"the answer of the server was not read: {why}. Nothing of it was run; is the address that of an NDIF server, and is "
        "what stands between you and it sound?"
    )


def too_large(largest: int) -> BackendError:
    """The error for an answer of more bytes than are allowed."""
    return BackendError(
        f"the answer of the server was not read: it is larger than {largest / 2**20:,.0f} MiB; ask for less at once "
        "(fewer sites, positions= or batch_tokens=), or set model.backend.largest to more bytes"
    )
