"""Answers from a server: read where they are tensors and plain data, refused where they are anything else; nothing is run."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

from interp.engine.answers import read_answer, unpacked
from interp.errors import BackendError

TRAP: list[str] = []


def sprung(what: str) -> str:
    TRAP.append(what)
    return what


class Trap:
    """What a pickle that runs code looks like."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.args


def packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return packed(buffer.getvalue())


def test_what_the_engine_returns_is_read() -> None:
    kept = torch.randn(3, 4).to(torch.bfloat16)
    value = {
        "result": [{"reads": {(0, "resid_pre"): kept}, "slope": 0.5, "name": "x", "none": None, "flag": True}, [1, 2]]
    }
    found = read_answer(saved(value))["result"]
    assert (
        torch.equal(found[0]["reads"][0, "resid_pre"], kept) and found[0]["reads"][0, "resid_pre"].dtype == kept.dtype
    )
    assert found[0]["slope"] == 0.5 and found[0]["none"] is None and found[1] == [1, 2]


@pytest.mark.parametrize(
    "blob", [b"", b"\x00", b"<html>502</html>", os.urandom(4096)], ids=["none", "zero", "page", "noise"]
)
def test_garbage_is_refused(blob: bytes) -> None:
    with pytest.raises(BackendError, match=r"was not read.*Nothing of it was run"):
        read_answer(blob)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_part_of_an_answer_is_refused(share: float) -> None:
    whole = saved({"result": torch.randn(20_000)})
    with pytest.raises(BackendError, match=r"ends in the middle"):
        read_answer(whole[: int(share * len(whole))])
    inside = zstandard.ZstdDecompressor().decompress(whole)
    with pytest.raises(BackendError, match="not in torch's format"):
        read_answer(packed(inside[: int(share * len(inside))]))


@pytest.mark.parametrize(
    "value",
    [
        Trap(sprung, "function"), {"result": Trap(sprung, "inside")}, {"result": [torch.ones(2), Trap(os.system, "true")]},
        {"result": Trap(eval, "1 + 1")}, {"result": Trap(getattr, "text", "upper")}, {"result": Path("x")},
    ],
    ids=["outer", "inner", "system", "eval", "getattr", "class"],
)  # fmt: skip
def test_a_pickle_that_would_run_code_runs_nothing(value: Any) -> None:
    TRAP.clear()
    with pytest.raises(BackendError, match="not tensors and plain data alone"):
        read_answer(saved(value))
    for plain in (pickle.dumps(value), pickle.dumps(value, protocol=0)):  # as such, without torch's format around it
        with pytest.raises(BackendError, match="not in torch's format"):
            read_answer(packed(plain))
    assert not TRAP


def test_the_traps_are_some() -> None:
    """Read as nnsight's own client reads it, it is sprung."""
    TRAP.clear()
    torch.load(
        io.BytesIO(zstandard.ZstdDecompressor().decompress(saved({"result": Trap(sprung, "x")}))), weights_only=False
    )
    assert TRAP == ["x"]


def test_more_than_is_allowed_is_refused_before_it_is_held() -> None:
    """A few kB that unpack to 2 GB; and the same with the packing inside of the archive."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    bomb = b"".join(compressor.compress(bytes(2**24)) for _ in range(128)) + compressor.flush()
    assert len(bomb) < 2**20
    with pytest.raises(BackendError, match="larger than 64 MiB"):
        read_answer(bomb, 2**26)
    with pytest.raises(BackendError, match="larger than 1,024 MiB"):
        unpacked(bomb, 2**30)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(2**24))
    with pytest.raises(BackendError, match="packed once more"):
        read_answer(packed(inner.getvalue()))


@pytest.mark.parametrize("value", [torch.ones(2), [1, 2], "text"], ids=["tensor", "list", "text"])
def test_an_answer_has_values_by_name(value: Any) -> None:
    with pytest.raises(BackendError, match="not the values of a request by name"):
        read_answer(saved(value))
