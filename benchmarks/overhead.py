"""The toolkit's own cost: one growing batch as `interp` runs it, and the same batch written by hand in nnsight.

python benchmarks/overhead.py [--quick]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from common import (
    POSITIONS,
    THREADS,
    heading,
    interleaved,
    pair_differing_from,
    random_gpt2,
    ratio_of,
    table,
    wait_for_quiet,
)

import interp
from interp.engine.context import Runs, context_of
from interp.engine.schedule import make_job
from interp.engine.trace import execute


def by_hand(nn: Any, ids: torch.Tensor, cells: list[tuple[int, int]], right: int, wrong: int) -> torch.Tensor:
    """Residual patches (layer, position), in order of layers, as rows that join at their layer; rows 0 and 1 are the two runs.

    This is what one would write for GPT-2 and one pair of equal length: no masks, no other sites, no other families.
    """
    joining = [torch.tensor([at for layer, at in cells if layer == number]) for number in range(len(nn.transformer.h))]
    with torch.no_grad(), nn.trace(ids):
        for layer, block in enumerate(nn.transformer.h):
            if len(joining[layer]):
                hidden = block.input
                new = hidden[:1].repeat(len(joining[layer]), 1, 1)
                new[torch.arange(len(new)), joining[layer]] = hidden[1, joining[layer]]
                block.input = torch.cat([hidden, new])
        nn.lm_head.input = nn.lm_head.input[:, -1:].contiguous()  # a strided one is slow
        logits = nn.output.logits[:, 0]
        scores = (logits[:, right] - logits[:, wrong]).save()
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three layers, one run: does it work?")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs (default 15)")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    repeats = 3 if args.quick else args.repeats
    model = interp.load_model(random_gpt2(n_layer=3) if args.quick else random_gpt2())
    pairs = pair_differing_from(0)
    encoded = model.encode(pairs)
    ids = torch.tensor([encoded.clean[0], encoded.corrupted[0]])
    right, wrong = encoded.answers[0][0], encoded.distractors[0][0]
    if not args.quick:
        wait_for_quiet()
    rows = []
    for positions in (2, 5):  # so many patches at each layer
        resolved = interp.grid("resid_pre", positions=range(positions)).resolve(model, encoded)
        context = context_of(model, Runs(encoded), resolved, "growing")
        job = make_job(resolved, context, "growing", 10**6, {})
        assert len(job.chunks) == 1 and not job.prepare
        (chunk,) = job.chunks
        cells = [(resolved.cells[row.cell].index[1], resolved.cells[row.cell].index[2]) for row in chunk.rows]

        def ours(program: dict[str, Any] = chunk.program) -> torch.Tensor:
            return execute(model.nn, model.taps, [program], interp.logit_diff)[0]["metric"]

        def theirs(cells: list[tuple[int, int]] = cells) -> torch.Tensor:
            return by_hand(model.nn, ids, cells, right, wrong)

        timed = interleaved({"interp": ours, "by hand": theirs}, repeats)
        error = float((timed["interp"].result - timed["by hand"].result).abs().max())
        more = [100 * (ratio_of(timed, "interp", "by hand", clock) - 1) for clock in ("wall", "cpu")]
        missed = "" if more[0] <= 10 else ", MISSED"
        rows.append(
            [
                f"{len(cells)} patches, {positions} at each layer",
                f"{1000 * timed['interp'].median:.0f} ms",
                f"{1000 * timed['by hand'].median:.0f} ms",
                f"**{more[0]:+.1f} %** (≤ +10 %{missed}; work {more[1]:+.1f} %)",
                f"{error:.0e}",
            ]
        )
    title = f"Overhead of one trace: {model.n_layers} layers × {POSITIONS} positions, growing, medians of {repeats}"
    print(heading(title))
    print(table(["one forward pass", "interp", "nnsight by hand", "more time", "max difference"], rows))


if __name__ == "__main__":
    main()
