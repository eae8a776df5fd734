"""Activation patching: `interp.patch` beside one forward pass per patch in TransformerLens and in nnsight.

python benchmarks/patching.py            the table (about ten minutes on two cores)
python benchmarks/patching.py --quick    three layers, one run: does it work?
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import nnsight
import pandas as pd
import torch
from common import (
    POSITIONS,
    THREADS,
    Timed,
    bridge,
    heading,
    hooked_transformer,
    interleaved,
    pair_differing_from,
    random_gpt2,
    table,
    verdict,
    wait_for_quiet,
)

import interp

PEERS = ("HookedTransformer", "TransformerBridge", "naive nnsight")


@dataclass(frozen=True)
class Job:
    """A sweep, where its prompts begin to differ, and how many times faster than each peer it must be."""

    name: str
    kind: str
    start: int
    wanted: tuple[float, float, float]


JOBS = (
    Job("residual sweep, all positions", "resid_pre", 0, (16, 7, 6)),
    Job("residual sweep, differing from position 10", "resid_pre", 10, (80, 40, 30)),
    Job("head z sweep", "z", 0, (15, 7, 7)),
    Job("head z sweep, ⅔ shared prefix", "z", 10, (30, 14, 13)),
)


Cells = list[tuple[int, int]]


def with_lens(model: Any, pairs: interp.PromptPairs, kind: str, cells: Cells) -> Callable[[], torch.Tensor]:
    """TransformerLens's own loop over (layer, position | head): the corrupted run's activations into the clean run."""
    from transformer_lens import patching

    patching.tqdm = lambda rows: rows  # no bars
    by_head = kind == "z"
    frame = pd.DataFrame(cells, columns=["layer", "head" if by_head else "pos"])
    setter = patching.layer_head_vector_patch_setter if by_head else patching.layer_pos_patch_setter
    right, wrong = pairs.answers[0], pairs.distractors[0]
    clean = torch.tensor(list(pairs.clean))
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor(list(pairs.corrupted)))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, right] - logits[0, -1, wrong]

    @torch.no_grad()
    def loop() -> torch.Tensor:
        return patching.generic_activation_patch(
            model, clean, cache, metric, patch_setter=setter, activation_name=kind, index_df=frame
        )

    return loop


def with_nnsight(nn: Any, pairs: interp.PromptPairs, kind: str, heads: int, cells: Cells) -> Callable[[], torch.Tensor]:
    """The same by hand in nnsight, one trace per patch."""
    clean, corrupted = torch.tensor(list(pairs.clean)), torch.tensor(list(pairs.corrupted))
    right, wrong = pairs.answers[0], pairs.distractors[0]
    blocks = nn.transformer.h
    width = nn.config.n_embd // heads
    with torch.no_grad(), nn.trace(corrupted):
        source = nnsight.save([])
        for block in blocks:
            source.append(block.attn.c_proj.input if kind == "z" else block.input)

    @torch.no_grad()
    def loop() -> torch.Tensor:
        out = []
        for layer, place in cells:
            block, new = blocks[layer], source[layer]
            with nn.trace(clean):
                if kind == "z":
                    part = slice(place * width, (place + 1) * width)
                    block.attn.c_proj.input[..., part] = new[..., part]
                else:
                    block.input[:, place] = new[:, place]
                logits = nn.output.logits[0, -1]
                score = (logits[right] - logits[wrong]).save()
            out.append(score)
        return torch.stack(out)

    return loop


def with_interp(model: interp.Model, pairs: interp.PromptPairs, kind: str) -> torch.Tensor:
    """`interp.patch`, `[layer, position | head]`."""
    plan = interp.grid(kind) if kind == "resid_pre" else interp.heads(kind)
    return torch.tensor(interp.patch(model, pairs, plan, progress=False).values.values[0, ..., 0])


def run(job: Job, libraries: dict[str, Any], repeats: int, every: int) -> dict[str, Timed]:
    """One job in every library, interleaved; the peers do every `every`-th cell, and their times are scaled."""
    model = libraries["interp"]
    pairs = pair_differing_from(job.start)
    across = POSITIONS if job.kind == "resid_pre" else model.n_heads
    cells = [(layer, place) for layer in range(model.n_layers) for place in range(across)]
    chosen = cells[every // 2 :: every]
    todo: dict[str, Callable[[], torch.Tensor]] = {"interp": partial(with_interp, model, pairs, job.kind)}
    for peer in PEERS[:2]:
        todo[peer] = with_lens(libraries[peer], pairs, job.kind, chosen)
    todo[PEERS[2]] = with_nnsight(model.nn, pairs, job.kind, model.n_heads, chosen)
    timed = interleaved(todo, repeats, dict.fromkeys(PEERS, len(cells) / len(chosen)))
    ours = torch.stack([timed["interp"].result[cell] for cell in chosen])
    return {name: replace(one, result=ours if name == "interp" else one.result) for name, one in timed.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three layers, one run: does it work?")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of every loop (default 5)")
    parser.add_argument(
        "--every", type=int, default=1, help="peers' loops do every Nth patch, and their times are scaled"
    )
    parser.add_argument("--jobs", type=int, nargs="*", help="only these rows of the table, from 0")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    repeats, every = (1, 7) if args.quick else (args.repeats, args.every)
    hf = random_gpt2(n_layer=3) if args.quick else random_gpt2()
    libraries = {
        "HookedTransformer": hooked_transformer(hf),
        "TransformerBridge": bridge(hf),
        "interp": interp.load_model(hf),
    }
    layers = libraries["interp"].n_layers
    rows = []
    for number, job in enumerate(JOBS):
        if args.jobs is not None and number not in args.jobs:
            continue
        if not args.quick:
            wait_for_quiet()
        timed = run(job, libraries, repeats, every)
        ours = timed["interp"]
        row = [job.name, f"{ours.median:.2f} s"]
        for peer, least in zip(PEERS, job.wanted, strict=True):
            error = float((timed[peer].result - ours.result).abs().max())
            row.append(f"{timed[peer].median:.2f} s, {verdict(timed, peer, 'interp', least)}, {error:.0e} apart")
        rows.append(row)
        print("| " + " | ".join(row) + " |", file=sys.stderr, flush=True)
    print(heading(f"Patching: GPT-2 small's size, {layers} layers × {POSITIONS} positions, medians of {repeats}"))
    print(table(["job", "interp", *PEERS], rows))
    if every > 1:
        print(f"\nPeers ran every {every}th patch; their times are scaled to all.")


if __name__ == "__main__":
    main()
