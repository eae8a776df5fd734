"""Pieces of patching: a chunk of a job, or some of its rows where it did not fit the device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .compile import Chunk, compile_chunk
from .program import Program
from .rows import Row
from .schedule import Job


@dataclass(frozen=True)
class Part:
    """A forward pass with all rows of a chunk, or some.

    `index` is the chunk's, `prepared` the run that it needs; `divided`: it is not the chunk itself.
    """

    job: Job
    index: int
    chunk: Chunk
    prepared: Program | None
    divided: bool = False

    @classmethod
    def of(cls, job: Job, index: int) -> Part:
        """A chunk, whole."""
        block = job.block[index]
        return cls(job, index, job.chunks[index], None if block is None else job.prepare[block])

    @property
    def program(self) -> Program:
        """What is run."""
        return self.chunk.program

    @property
    def what(self) -> str:
        """What the smallest part holds, for messages."""
        return "one patched row with its unpatched runs" if self.chunk.rows else "one pair's unpatched runs"

    @property
    def width(self) -> int:
        """Positions of its longest prompt."""
        return self.program["inputs"]["input_ids"].shape[1] + self.program.get("column", 0)

    def halves(self) -> list[Part]:
        """The two halves of a part: of its rows, or of its pairs where no run is patched; none of one row."""
        rows = sorted(self.chunk.rows, key=lambda row: (row.pair, row.stage))  # few pairs in each half
        middle = len(rows or self.chunk.pairs) // 2
        if not middle:
            return []
        if rows:
            return [self.recompiled(half, ()) for half in (rows[:middle], rows[middle:])]
        return [self.recompiled((), half) for half in (self.chunk.pairs[:middle], self.chunk.pairs[middle:])]

    def recompiled(self, rows: Sequence[Row], pairs: Sequence[int]) -> Part:
        """The part with only these rows (or, without any, only these pairs), on the same prepared run."""
        program, context = self.program, self.job.context
        column, first = program.get("column", 0), program["first"]
        chunk = compile_chunk(rows, context, self.job.schedule, column, pairs or None, self.width, first)
        if "use" in program:
            streams = context.runs.streams
            kept = [
                self.chunk.pairs.index(pair) * streams + stream for pair in chunk.pairs for stream in range(streams)
            ]
            chunk.program.update({"use": program["use"], "pick": program["pick"][kept], "column": column})
        return Part(self.job, self.index, chunk, self.prepared, divided=True)

    def alone(self) -> Part:
        """The same rows from the first layer and position on: a prepared run takes memory too."""
        chunk = compile_chunk(self.chunk.rows, self.job.context, self.job.schedule, 0, self.chunk.pairs, self.width)
        return Part(self.job, self.index, chunk, None, divided=True)

    def places(self) -> list[int]:
        """Where the scores of a part stand among those of its chunk."""
        whole, streams = self.job.chunks[self.index], self.job.context.runs.streams
        offset = len(whole.pairs) * streams
        pairs = {pair: number * streams for number, pair in enumerate(whole.pairs)}
        rows = {(row.cell, row.pair): offset + number for number, row in enumerate(whole.rows)}
        unpatched = [pairs[pair] + stream for pair in self.chunk.pairs for stream in range(streams)]
        return unpatched + [rows[row.cell, row.pair] for row in self.chunk.rows]
