"""Out of memory: a chunk that does not fit is run in parts, down to one row, instead of ending the run."""

from __future__ import annotations

import gc
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..errors import BackendError, InterpError
from ..metrics import Metric
from .compile import Chunk, compile_chunk
from .rows import Row
from .schedule import Job

#: How memory failures read where they come as text from a server, or from a library below torch.
PHRASES = ("outofmemoryerror", "out of memory", "alloc_failed", "can't allocate memory")


@dataclass(frozen=True)
class Part:
    """A forward pass with all rows of a chunk, or some.

    `index` is the chunk's, `block` that of the prepared run it needs; `divided`: it is not the chunk itself.
    """

    index: int
    chunk: Chunk
    block: int | None
    divided: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, positions) that are run."""
        rows, positions = self.chunk.program["inputs"]["input_ids"].shape
        return rows + len(self.chunk.program["origin"]), positions

    @property
    def tokens(self) -> int:
        """How many tokens are run."""
        return math.prod(self.shape)


def run_parts(
    model: Any, job: Job, metric: Metric, todo: Sequence[int], finish: Callable[[int, np.ndarray, bool], None]
) -> None:
    """Run the chunks with these numbers, in order; `finish(index, scores [scored], divided)` after each.

    Where the device's memory is exhausted, a chunk is tried alone, then in halves, and so on; later chunks
    run in parts that are no larger than the halves of what did not fit.

    Raises:
        BackendError: a single row does not fit.
    """
    parts = deque(Part(index, job.chunks[index], job.block[index]) for index in todo)
    limit, count = math.inf, len(parts)
    gathered: np.ndarray | None = None
    unprepared: set[int] = set()

    def done(part: Part, scores: np.ndarray) -> None:
        nonlocal gathered
        if parts.popleft() is not part:
            raise BackendError(f"{type(model.backend).__name__} did not report programs in their order")
        if not part.divided:
            finish(part.index, scores, False)
            return
        whole = job.chunks[part.index]
        if gathered is None:
            gathered = np.full(len(whole.program["scored"]), np.nan, dtype=np.float32)
        gathered[places(job, whole, part.chunk)] = scores
        if not parts or parts[0].index != part.index:
            finish(part.index, gathered, True)
            gathered = None

    while parts:
        sent = list(parts)[:count]
        said, prepared = send(model, job, metric, sent, done)
        if said is None:
            count *= 4  # a server whose requests fail as a whole then repeats little
            continue
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        count = 1
        if len(sent) > 1:
            continue  # the first alone: a server does not say which program of a request it was
        part = parts[0]
        if part.block is not None and (not prepared or not halves(job, part)):
            unprepared.add(part.block)
        elif halves(job, part):
            limit = min(limit, part.tokens // 2)
        else:
            raise BackendError(too_long(model, part, said))
        fitting: list[Part] = []
        for item in parts:
            item = without_prepared(job, item) if item.block in unprepared else item
            fitting += fit(job, item, limit)
        parts = deque(fitting)


def send(
    model: Any, job: Job, metric: Metric, parts: Sequence[Part], done: Callable[[Part, np.ndarray], None]
) -> tuple[str | None, bool]:
    """Run parts, prepared runs before the parts that use them.

    Returns what an out-of-memory error said (None: all went well), and whether it was not in a prepared run.
    """
    programs: list[dict[str, Any]] = []
    owners: list[Part | None] = []
    ready: int | None = None
    for part in parts:
        if part.block is not None and part.block != ready:
            programs.append(job.prepare[part.block])
            owners.append(None)
            ready = part.block
        programs.append(part.chunk.program)
        owners.append(part)
    following = 0  # the program behind the last one that was reported

    def report(number: int, scores: torch.Tensor) -> None:
        nonlocal following
        following = number + 1
        owner = owners[number]
        if owner is not None:
            done(owner, scores.float().cpu().numpy())

    try:
        model.backend.run(model, programs, metric, report)
    except Exception as error:
        if not out_of_memory(error):
            raise
        said = str(error).strip().split("\n")[0] or type(error).__name__
    else:
        return None, True
    # Behind the except block: the error holds the frames, and with them the tensors, of what failed.
    return said, following == len(owners) or owners[following] is not None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device's memory is exhausted, here or on a server."""
    if isinstance(error, InterpError) and not isinstance(error, BackendError):
        return False
    said = str(error).strip().split("\n")[0].lower()
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in said for phrase in PHRASES)
    )


def places(job: Job, whole: Chunk, part: Chunk) -> list[int]:
    """Where the scores of a part stand among those of its chunk."""
    streams = 2 if job.context.source is not None else 1
    offset = len(whole.pairs) * streams
    pairs = {pair: number * streams for number, pair in enumerate(whole.pairs)}
    rows = {(row.cell, row.pair): offset + number for number, row in enumerate(whole.rows)}
    unpatched = [pairs[pair] + stream for pair in part.pairs for stream in range(streams)]
    return unpatched + [rows[row.cell, row.pair] for row in part.rows]


def fit(job: Job, part: Part, limit: float) -> Iterator[Part]:
    """The parts of at most `limit` tokens that a part is divided into, as far as it can be."""
    divided = halves(job, part) if part.tokens > limit else []
    if not divided:
        yield part
    for half in divided:
        yield from fit(job, half, limit)


def halves(job: Job, part: Part) -> list[Part]:
    """The two halves of a part: of its rows, or of its pairs where no run is patched; none of one row."""
    chunk = part.chunk
    rows: list[Row] = sorted(chunk.rows, key=lambda row: (row.pair, row.stage))  # few pairs in each half
    everything: Sequence[Any] = rows or chunk.pairs
    middle = len(everything) // 2
    cut = (everything[:middle], everything[middle:]) if middle else ()
    return [recompiled(job, part, half, ()) if rows else recompiled(job, part, (), half) for half in cut]


def recompiled(job: Job, part: Part, rows: Sequence[Row], pairs: Sequence[int]) -> Part:
    """A part with only these rows (or, without any, only these pairs), on the same prepared run."""
    program, context = part.chunk.program, job.context
    column = program.get("column", 0)
    width = program["inputs"]["input_ids"].shape[1] + column
    first = program["first"]
    chunk = compile_chunk(rows, context, job.schedule, column, pairs or None, width, first)
    if "use" in program:
        streams = 2 if context.source is not None else 1
        kept = [part.chunk.pairs.index(pair) * streams + stream for pair in chunk.pairs for stream in range(streams)]
        chunk.program.update(use=program["use"], pick=program["pick"][kept], column=column)
    return Part(part.index, chunk, part.block, divided=True)


def without_prepared(job: Job, part: Part) -> Part:
    """The same rows from the first layer and position on: a prepared run takes memory too."""
    program = part.chunk.program
    width = program["inputs"]["input_ids"].shape[1] + program.get("column", 0)
    chunk = compile_chunk(part.chunk.rows, job.context, job.schedule, 0, part.chunk.pairs, width)
    return Part(part.index, chunk, None, divided=True)


def too_long(model: Any, part: Part, said: str) -> str:
    """The message for a row that does not fit alone."""
    rows, positions = part.shape
    what = "one patched row with its unpatched runs" if part.chunk.rows else "one pair's unpatched runs"
    return (
        f"out of memory: {what} does not fit: {part.tokens} tokens ({rows} rows of {positions} positions) "
        f"through {model.name} ({model.dtype}, {model.device}); give it shorter prompts, load the model in "
        f"bfloat16 or over more devices (device_map='auto'), or free memory there. It said: {said}"
    )
