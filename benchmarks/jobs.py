"""Requests in flight: one sweep on a real deployment of NDIF behind a slow wire, one request at a time and four.

    make ndif-up && python benchmarks/jobs.py [--delay 0.05] [--one-way]

Pairs of runs, one behind the other, in changing order; the median of their ratios. Needs the deployment of tests/ndif. A server
with one worker runs one request after another: four in flight hide the way there and back, and no more.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.ndif.deployment import TINY, Deployment
from tests.ndif.proxy import Proxy

DEPLOYMENT = Deployment()
os.environ["HF_ENDPOINT"] = DEPLOYMENT.hub  # before anything reads it
os.environ.pop("HF_HUB_OFFLINE", None)

import interp  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8, help="prompt pairs: six requests each")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds that the wire adds, each way")
    parser.add_argument("--one-way", action="store_true", help="add it to questions alone")
    options = parser.parse_args()
    proxy = Proxy(DEPLOYMENT.host, options.delay, 0.0 if options.one_way else options.delay)
    model = interp.load_model(TINY, backend=proxy.host)
    model.backend.limit = 40
    rows = [[3 + (row * 7 + column * column) % 110 for column in range(8)] for row in range(options.pairs)]
    others = [[(token * 5 + 1) % 110 + 2 for token in row] for row in rows]
    pairs = interp.PromptPairs(rows, others, [20] * options.pairs, [25] * options.pairs)

    def timed(in_flight: int) -> float:
        model.backend.in_flight = in_flight
        start = time.perf_counter()
        interp.patch(model, pairs, interp.grid("resid_pre", layers=[0, 1]), schedule="growing", max_tokens=40)
        return time.perf_counter() - start

    timed(4)
    ratios, one, four = [], [], []
    for number in range(options.repeats):
        order = (1, 4) if number % 2 else (4, 1)
        found = {count: timed(count) for count in order}
        one.append(found[1])
        four.append(found[4])
        ratios.append(found[1] / found[4])
        print(
            f"{model.backend.requests} requests: one at a time {found[1]:.2f} s, four {found[4]:.2f} s: {ratios[-1]:.2f} ×"
        )
    print(
        f"median: {statistics.median(ratios):.2f} × ({statistics.median(one):.2f} s against {statistics.median(four):.2f} s, "
        f"{options.delay * 1000:.0f} ms of delay {'one way' if options.one_way else 'each way'})"
    )


if __name__ == "__main__":
    main()
