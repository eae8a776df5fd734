"""The sweep of the soak test, as the client's process: submit it, or go on with it.

python -m tests.ndif.sweep FILE HOST
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import interp

from .deployment import TINY

DRAW = random.Random(1)
COUNT, LENGTH = 34, 8


def prompts() -> list[list[int]]:
    return [[DRAW.randrange(3, 120) for _ in range(LENGTH)] for _ in range(COUNT)]


PAIRS = interp.PromptPairs(prompts(), prompts(), [20] * COUNT, [25] * COUNT)
PLAN = interp.grid("resid_pre", layers=[0, 1])
#: One pair in one request, six of them: 204 requests.
OPTIONS: dict[str, Any] = {"schedule": "growing", "max_tokens": 40}


def load(host: str) -> interp.Model:
    model = interp.load_model(TINY, backend=host)
    model.backend.limit = 40
    return model


def begin(path: Path, host: str) -> interp.Job:
    """The job of this file, or a new one that is kept there."""
    model = load(host)
    if path.exists():
        return interp.Job.load(path, model)
    job = interp.submit(interp.patch, model, PAIRS, PLAN, root=path.parent / "jobs", in_flight=4, **OPTIONS)
    job.save(path)
    return job


if __name__ == "__main__":
    begin(Path(sys.argv[1]), sys.argv[2]).result()
