"""Attribution patching: `interp.attribute` beside one forward pass per patch, by hand in nnsight and with PyTorch hooks.

python benchmarks/attribution.py [--quick] [--every N]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import nnsight
import numpy as np
import torch
from common import (
    POSITIONS,
    THREADS,
    heading,
    interleaved,
    pair_differing_from,
    random_gpt2,
    table,
    verdict,
    wait_for_quiet,
)

import interp

KINDS = ("resid_pre", "attn_out", "mlp_out")
Cells = list[tuple[int, int, int]]  # kind, layer, position


def module_of(block: Any, kind: str) -> Any:
    """The module whose input (resid_pre) or output carries a site; HF modules and nnsight's envoys alike."""
    return {"resid_pre": block, "attn_out": block.attn, "mlp_out": block.mlp}[kind]


def with_nnsight(nn: Any, pairs: interp.PromptPairs, cells: Cells) -> Callable[[], torch.Tensor]:
    """One trace per patch; the corrupted run's activations are there beforehand."""
    clean, corrupted = torch.tensor(list(pairs.clean)), torch.tensor(list(pairs.corrupted))
    right, wrong = pairs.answers[0], pairs.distractors[0]
    blocks = nn.transformer.h
    with torch.no_grad(), nn.trace(corrupted):
        source = nnsight.save([])
        for block in blocks:
            source.append((block.input, block.attn.output[0], block.mlp.output))

    @torch.no_grad()
    def loop() -> torch.Tensor:
        out = []
        for kind, layer, at in cells:
            block, new = blocks[layer], source[layer][kind]
            with nn.trace(clean):
                if kind == 0:
                    block.input[:, at] = new[:, at]
                elif kind == 1:
                    block.attn.output[0][:, at] = new[:, at]
                else:
                    block.mlp.output[:, at] = new[:, at]
                logits = nn.output.logits[0, -1]
                score = (logits[right] - logits[wrong]).save()
            out.append(score)
        return torch.stack(out)

    return loop


@contextmanager
def hooked(module: Any, kind: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """For a while `change` sees a site's activation, and what it returns takes its place."""

    def before(_: Any, args: Any) -> Any:
        new = change(args[0])
        return None if new is None else (new, *args[1:])

    def after(_: Any, args: Any, out: Any) -> Any:
        new = change(out[0] if isinstance(out, tuple) else out)
        return None if new is None else (new, *out[1:]) if isinstance(out, tuple) else new

    handle = module.register_forward_pre_hook(before) if kind == "resid_pre" else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def activations(
    hf: Any, ids: torch.Tensor, leaf: bool = False
) -> tuple[torch.Tensor, dict[tuple[int, int], torch.Tensor]]:
    """Last logits `[d_vocab]` and every site's activation by (kind, layer), with plain hooks."""
    kept: dict[tuple[int, int], torch.Tensor] = {}
    from contextlib import ExitStack

    with ExitStack() as stack:
        for layer, block in enumerate(hf.transformer.h):
            for number, kind in enumerate(KINDS):

                def keep(x: torch.Tensor, site: tuple[int, int] = (number, layer)) -> torch.Tensor:
                    kept[site] = x.detach().requires_grad_(True) if leaf and site == (0, 0) else x
                    return kept[site]

                stack.enter_context(hooked(module_of(block, kind), kind, keep))
        logits = hf(input_ids=ids).logits[0, -1]
    return logits, kept


def with_hooks(hf: Any, pairs: interp.PromptPairs, cells: Cells) -> Callable[[], torch.Tensor]:
    """One plain forward pass with a PyTorch hook per patch."""
    clean, corrupted = torch.tensor(list(pairs.clean)), torch.tensor(list(pairs.corrupted))
    right, wrong = pairs.answers[0], pairs.distractors[0]
    with torch.no_grad():
        _, source = activations(hf, corrupted)

    @torch.no_grad()
    def loop() -> torch.Tensor:
        out = []
        for kind, layer, at in cells:

            def patch(x: torch.Tensor, new: torch.Tensor = source[kind, layer], at: int = at) -> torch.Tensor:
                x = x.clone()
                x[:, at] = new[:, at]
                return x

            with hooked(module_of(hf.transformer.h[layer], KINDS[kind]), KINDS[kind], patch):
                logits = hf(input_ids=clean).logits[0, -1]
            out.append(logits[right] - logits[wrong])
        return torch.stack(out)

    return loop


def gradients_by_hand(hf: Any, pairs: interp.PromptPairs) -> np.ndarray:
    """What attribution patching must give, from plain hooks and autograd: `[kind, layer, position]`."""
    clean, corrupted = torch.tensor(list(pairs.clean)), torch.tensor(list(pairs.corrupted))
    with torch.no_grad():
        _, source = activations(hf, corrupted)
    logits, base = activations(hf, clean, leaf=True)
    metric = logits[pairs.answers[0]] - logits[pairs.distractors[0]]
    found = torch.autograd.grad(metric, list(base.values()))
    out = np.zeros((len(KINDS), len(hf.transformer.h), clean.shape[1]))
    for ((kind, layer), x), gradient in zip(base.items(), found, strict=True):
        out[kind, layer] = float(metric) + ((source[kind, layer] - x) * gradient).sum(-1)[0].detach().numpy()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three layers, one run: does it work?")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default 5)")
    parser.add_argument("--every", type=int, default=1, help="the loops do every Nth patch, and their times are scaled")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    repeats, every = (1, 9) if args.quick else (args.repeats, args.every)
    hf = random_gpt2(n_layer=3) if args.quick else random_gpt2()
    model = interp.load_model(hf)
    pairs = pair_differing_from(0)
    layers = min(10, model.n_layers)
    plan = interp.grid(list(KINDS), layers=range(layers))
    cells = [(kind, layer, at) for kind in range(3) for layer in range(layers) for at in range(POSITIONS)]
    chosen = cells[every // 2 :: every]
    scale = len(cells) / len(chosen)
    if not args.quick:
        wait_for_quiet()
    timed = interleaved(
        {
            "atp": lambda: interp.attribute(model, pairs, plan).values.values[..., 0],
            "nnsight": with_nnsight(model.nn, pairs, chosen),
            "hooks": with_hooks(hf, pairs, chosen),
            "exact": lambda: interp.patch(model, pairs, plan, progress=False).values.values[..., 0],
        },
        repeats,
        {"nnsight": scale, "hooks": scale},
    )
    by_hand = gradients_by_hand(hf, pairs)[:, :layers]
    estimate, exact = timed["atp"].result, timed["exact"].result
    rows = []
    for loop, name in (("nnsight", "naive nnsight, a trace per patch"), ("hooks", "plain PyTorch, a hook per patch")):
        row = [f"AtP, {len(cells)} sites", f"{timed['atp'].median:.3f} s", f"{name}: {timed[loop].median:.2f} s"]
        error = np.abs(timed[loop].result.numpy() - np.array([exact[cell] for cell in chosen])).max()
        rows.append([*row, verdict(timed, loop, "atp", 120), f"loop and `interp.patch` {error:.0e} apart"])
    print(
        heading(
            f"Attribution: GPT-2 small's size, {model.n_layers} layers × {POSITIONS} positions, medians of {repeats}"
        )
    )
    print(table(["job", "interp", "against", "ratio", "agreement"], rows))
    correlation = np.corrcoef(estimate.ravel(), exact.ravel())[0, 1]
    print(
        f"\n`attribute` and gradients taken by hand with plain hooks: {np.abs(estimate - by_hand).max():.0e} apart. "
        f"Estimates and exact patches correlate {correlation:.2f} (random weights, every token differs)."
    )
    if every > 1:
        print(f"The loops ran every {every}th patch; their times are scaled to all.")


if __name__ == "__main__":
    main()
