"""Circuits: what edge attribution costs beside plain passes, and ACDC in batches beside one edge at a time.

python benchmarks/circuits.py [--quick]
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from common import (
    THREADS,
    heading,
    interleaved,
    pair_differing_from,
    random_gpt2,
    ratio_of,
    table,
    verdict,
    wait_for_quiet,
)

import interp
from interp.cells import Resolved
from interp.circuits.acdc import acdc
from interp.engine.context import Experiment, Runs
from interp.options import Options


def plain_passes(hf: Any, ids: torch.Tensor, right: int, wrong: int) -> float:
    """Three plain forward passes of the same rows, two of them with a backward pass."""
    total = 0.0
    for gradient in (False, True, True):
        with torch.set_grad_enabled(gradient):
            entering = hf.transformer.wte(ids).detach().requires_grad_(gradient)
            hidden = hf.transformer(inputs_embeds=entering).last_hidden_state[:, -1]
            logits = hf.lm_head(hidden)
            metric = (logits[:, right] - logits[:, wrong]).sum()
            if gradient:
                torch.autograd.grad(metric, entering)
        total += float(metric)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three layers, one run: does it work?")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default 5)")
    parser.add_argument(
        "--edges",
        type=int,
        default=60,
        help="edges that ACDC starts from on the large model (default 60; 0: not at all)",
    )
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    repeats, edges = (1, 30) if args.quick else (args.repeats, args.edges)
    hf = random_gpt2(n_layer=3) if args.quick else random_gpt2()
    model = interp.load_model(hf)
    pairs = pair_differing_from(0)
    for seed in range(1, 8):
        pairs = pairs + pair_differing_from(0, seed=seed)
    ids = torch.tensor([list(prompt) for both in zip(pairs.clean, pairs.corrupted, strict=True) for prompt in both])
    right, wrong = (tokens[0] for tokens in (pairs.answers, pairs.distractors))
    if not args.quick:
        wait_for_quiet()
    timed = interleaved(
        {
            "eap": lambda: interp.discover(model, pairs, "eap", progress=False, max_tokens=10**6),
            "plain": lambda: plain_passes(hf, ids, right, wrong),
        },
        repeats,
    )
    scored = timed["eap"].result.n_edges
    cost, work = (ratio_of(timed, "eap", "plain", clock) for clock in ("wall", "cpu"))
    print(heading(f"Circuits: GPT-2 small's size, {model.n_layers} layers, medians of {repeats}"))
    row = [f"EAP, {scored} edges, {len(pairs)} pairs", f"{timed['eap'].median:.2f} s"]
    row += [
        f"3 forward and 2 backward passes: {timed['plain'].median:.2f} s",
        f"{cost:.2f}× their time (work {work:.2f}×)",
    ]
    rows = [[*row, ""]]
    print(row, file=sys.stderr, flush=True)

    one = pairs[:1]
    layers = 2 if args.quick else 4
    small = interp.load_model(random_gpt2(n_layer=layers, n_head=4, n_embd=256))
    cases = [(small, f"{layers} layers of 4 heads, d_model 256, every edge", None)]
    if edges:
        top = interp.discover(model, one, "eap", progress=False).top(n_edges=edges)
        cases.append((model, f"{model.n_layers} layers of GPT-2 small, EAP's top {edges} edges", top))
    for used, name, within in cases:
        if within is None:
            ends = interp.patch(used, one, interp.grid("resid_pre", layers=[0], positions=[0]), progress=False)
            threshold = 0.01 * abs(float((ends.clean - ends.corrupted).mean()))
        else:
            threshold = 0.5 * float(np.median([abs(score) for score in within.scores().values()]))
        nothing = Resolved((), (), {})
        asked = Experiment(used, Runs(used.encode(one)), nothing, interp.logit_diff, "acdc")
        run = partial(acdc, asked, within, threshold, {}, Options(progress=False))
        timed = interleaved({"batched": run, "single": partial(run, ahead=1)}, repeats)
        batched, single = timed["batched"].result, timed["single"].result
        assert batched.edges == single.edges
        trials = f"{single.n_edges} of {single.meta['tested']} stay, {batched.meta['trials']} trials"
        row = [f"ACDC, {name} ({trials})", f"{timed['batched'].median:.2f} s"]
        row += [
            f"one at a time: {timed['single'].median:.2f} s",
            verdict(timed, "single", "batched", 3),
            "the same circuit",
        ]
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    print(table(["job", "interp", "against", "ratio", "agreement"], rows))


if __name__ == "__main__":
    main()
