"""The process in which `backend="simulated"` runs traces: torch, transformers and nnsight, but no `interp`.

`simulated.py` starts this file as a script; as a module it only lends its frames. One frame on stdin is one
question `(kind, content)`, one on stdout its answer `("ok", content)` or `("error", traceback)`.
Standard library alone at the top, so that importing it costs nothing.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import struct
import sys
import traceback
from typing import IO, Any

HIDDEN = "interp"


def write_frame(stream: IO[bytes], content: Any) -> None:
    """One pickle, behind its length in eight bytes."""
    data = pickle.dumps(content)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def read_frame(stream: IO[bytes]) -> Any:
    """The next pickle. Raises EOFError where the other side is gone."""
    head = stream.read(8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    data = stream.read(size)
    if not size or len(data) < size:
        raise EOFError("the other side closed the pipe")
    return pickle.loads(data)


def fingerprint(model: Any) -> dict[str, float]:
    """The norm of every floating-point parameter: two copies of the same weights agree."""
    floats = ((name, p) for name, p in model.named_parameters() if p.is_floating_point())
    return {name: float(p.detach().float().norm()) for name, p in floats}


class Refuse:
    """An import hook in front of all others: what a server does not have cannot be imported here either."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.split(".")[0] == HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load(spec: dict[str, Any]) -> Any:
    """The nnsight model around a checkpoint, as a server makes it: weights without gradients."""
    import nnsight
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    module, name = spec["class"]
    hf = getattr(importlib.import_module(module), name).from_pretrained(spec["source"], **spec["options"])
    if spec["options"].get("device_map") is None:
        hf.to(spec["device"])
    hf.eval().requires_grad_(False)
    for config in (hf.config, hf.config.get_text_config()):
        config.return_dict = True
    # Requests hold token ids, but nnsight wants some tokenizer.
    ids = Tokenizer(models.WordLevel({"<0>": 0}, unk_token="<0>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=ids, unk_token="<0>", pad_token="<0>")
    return nnsight.TransformersModel(hf, tokenizer=tokenizer, task="text-generation")


def execute(model: Any, settings: tuple[int, str], blob: bytes) -> bytes:
    """Run one serialised request; what it saved comes back as from a server: torch's format, compressed."""
    import torch
    import zstandard
    from nnsight.schema.request import RequestModel
    from nnsight.tracing.globals import BLOCKS, SOURCES
    from nnsight.tracing.tracer import dec, inc

    torch.set_num_threads(settings[0])
    torch.set_float32_matmul_precision(settings[1])
    tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), compress=True)
    before = dict(tracer.info.frame.f_locals)
    inc()
    try:
        tracer.execute(tracer.info.code)
    finally:
        dec()
        model.interleaver.cancel()
        SOURCES.clear()  # nnsight keeps them by file and line; the next request may have another block there
        BLOCKS.clear()
    after = tracer.info.frame.f_locals
    saved = {name: value for name, value in after.items() if name not in before or before[name] is not value}
    assert HIDDEN not in sys.modules, f"{HIDDEN} was imported in the worker"
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return zstandard.ZstdCompressor(level=6).compress(buffer.getvalue())


def serve() -> None:
    """Answer questions until the other side closes the pipe."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a request prints must not fall between the frames
    sys.meta_path.insert(0, Refuse())  # type: ignore[arg-type]
    models: dict[int, Any] = {}
    while True:
        try:
            kind, content = read_frame(questions)
        except EOFError:
            return
        answer: Any = None
        try:
            if kind == "load":
                number, spec = content
                models[number] = load(spec)
                answer = fingerprint(models[number]._module)
            elif kind == "run":
                number, settings, blob = content
                answer = execute(models[number], settings, blob)
            else:
                models.pop(content, None)
        except Exception:
            write_frame(answers, ("error", traceback.format_exc()))
        else:
            write_frame(answers, ("ok", answer))


if __name__ == "__main__":
    serve()
