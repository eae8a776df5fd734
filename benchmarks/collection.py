"""Collecting activations: `interp.collect_activations` beside SAELens's ActivationsStore, the MLP's output at layer 6.

python benchmarks/collection.py [--quick]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import (
    THREADS,
    heading,
    hooked_transformer,
    interleaved,
    random_gpt2,
    table,
    tokenizer,
    verdict,
    wait_for_quiet,
)
from datasets import Dataset
from sae_lens import ActivationsStore
from sae_lens.load_model import HookedProxyLM

import interp

CONTEXT, LAYER, BATCH = 128, 6, 4


def store_loop(model: Any, hook: str, texts: list[list[int]], d_model: int) -> Callable[[], torch.Tensor]:
    """SAELens's store over the same tokens, batch after batch, without the shuffling that training adds."""

    def loop() -> torch.Tensor:
        store = ActivationsStore(
            model=model,
            dataset=dataset,
            streaming=False,
            hook_name=hook,
            hook_head_index=None,
            context_size=CONTEXT,
            d_in=d_model,
            n_batches_in_buffer=8,
            total_training_tokens=1,
            store_batch_size_prompts=BATCH,
            train_batch_size_tokens=BATCH * CONTEXT,
            prepend_bos=False,
            normalize_activations="none",
            device=torch.device("cpu"),
            dtype="float32",
            sequence_separator_token=None,
        )
        return torch.cat([store.get_raw_llm_batch()[0] for _ in range(len(texts) // BATCH)])

    dataset = Dataset.from_dict({"tokens": texts})
    return loop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few texts, one run: does it work?")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs (default 7)")
    parser.add_argument("--texts", type=int, default=32, help=f"texts of {CONTEXT} tokens (default 32)")
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    repeats, count = (1, 8) if args.quick else (args.repeats, args.texts)
    hf = random_gpt2()
    model = interp.load_model(hf)
    texts = np.random.default_rng(0).integers(model.vocab_size, size=(count, CONTEXT)).tolist()
    proxied = random_gpt2()  # its hooks stay on: not the module that we run

    jobs = {
        "interp": lambda: interp.collect_activations(model, texts, layer=LAYER, component="mlp_out", progress=False),
        "ActivationsStore": store_loop(hooked_transformer(hf), f"blocks.{LAYER}.hook_mlp_out", texts, model.d_model),
        "ActivationsStore on the HF module": store_loop(
            HookedProxyLM(proxied, tokenizer()), f"transformer.h.{LAYER}.mlp", texts, model.d_model
        ),
    }
    if not args.quick:
        wait_for_quiet()
    timed = interleaved(jobs, repeats)
    tokens = count * CONTEXT
    rows = []
    largest = float(timed["interp"].result.abs().max())
    for name in jobs:
        error = float((timed[name].result - timed["interp"].result).abs().max()) / largest
        row = [name, f"{timed[name].median:.2f} s", f"{tokens / timed[name].median:.0f}"]
        rows.append([*row, verdict(timed, name, "interp", 1.0) if "Store" in name else "", f"{error:.0e}"])
    title = f"Collection: mlp_out of layer {LAYER} of {model.n_layers}, {count} texts of {CONTEXT} tokens, medians of {repeats}"
    print(heading(title))
    print(table(["", "time", "tokens/s", "theirs / ours", "difference / largest value"], rows))


if __name__ == "__main__":
    main()
