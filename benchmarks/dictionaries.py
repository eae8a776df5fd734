"""Training dictionaries: collecting to shards and training on them, beside SAELens's own store and trainer through its HF proxy.

python benchmarks/dictionaries.py [--quick]

Both stop at the layer. Ours collects to disk, then trains; a second dictionary trains on what is stored. Memory is the peak of a
process of its own that collects and trains on 1 × and 4 × the tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch
from common import THREADS, heading, interleaved, random_gpt2, table, tokenizer, verdict, wait_for_quiet

import interp

CONTEXT, LAYER, BATCH, K = 128, 6, 512, 32


def texts_of(count: int) -> list[list[int]]:
    """Rows of random tokens."""
    return torch.randint(50257, (count, CONTEXT), generator=torch.Generator().manual_seed(0)).tolist()


def ours(model: interp.Model, texts: list[list[int]], folder: str, d_sae: int) -> Any:
    """Collect to shards, and train one dictionary."""
    acts = interp.collect_activations(
        model, texts, LAYER, "resid_post", to_disk=folder, context=CONTEXT, progress=False
    )
    return second(model, acts, len(texts) * CONTEXT, d_sae)


def second(model: interp.Model, acts: Any, tokens: int, d_sae: int) -> Any:
    """A dictionary on stored activations."""
    sae = interp.SparseAutoencoder(model, f"L{LAYER}.resid_post", d_sae=d_sae, k=K)
    return interp.train_sae(sae, acts, tokens=tokens // BATCH * BATCH, progress=False)


def theirs(hf: Any, texts: list[list[int]], d_sae: int) -> Any:
    """SAELens's store through its HF proxy, and its trainer, on the same tokens."""
    from datasets import Dataset
    from sae_lens import ActivationsStore, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.load_model import HookedProxyLM

    hook = f"transformer.h.{LAYER}"
    proxy = HookedProxyLM(hf, tokenizer(), hook_names=[hook])
    width, tokens = hf.config.n_embd, len(texts) * CONTEXT // BATCH * BATCH
    store = ActivationsStore(
        model=proxy, dataset=Dataset.from_dict({"tokens": texts}), streaming=False, hook_name=hook, hook_head_index=None,
        context_size=CONTEXT, d_in=width, n_batches_in_buffer=16, total_training_tokens=tokens, store_batch_size_prompts=16,
        train_batch_size_tokens=BATCH, prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
        dtype="float32", sequence_separator_token=None,
    )  # fmt: skip
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=d_sae, k=K))
    config = SAETrainerConfig(total_training_samples=tokens, train_batch_size_samples=BATCH, lr=2e-3, lr_end=2e-4)
    return SAETrainer(config, sae, data_provider=iter(store)).fit()


def peak(count: int, quick: bool) -> float:
    """Peak memory, GB, of a process that collects and trains."""
    command = [sys.executable, __file__, "--count", str(count), *(["--quick"] if quick else [])]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure(count: int, hf: Any, d_sae: int) -> None:
    """In a process of its own: collect and train, and say the peak."""
    import resource

    with tempfile.TemporaryDirectory() as folder:
        ours(interp.load_model(hf), texts_of(count), folder, d_sae)
    print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, few tokens: does it work?")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    hf = random_gpt2(n_layer=8, n_embd=48, n_head=4) if args.quick else random_gpt2()
    d_sae = 2 * hf.config.n_embd
    if args.count:
        measure(args.count, hf, d_sae)
        return
    interp.saes.library.sae_lens()
    model, texts = interp.load_model(hf), texts_of(40 if args.quick else 128)
    wait_for_quiet()
    with tempfile.TemporaryDirectory() as kept:
        acts = interp.collect_activations(
            model, texts, LAYER, "resid_post", to_disk=kept, context=CONTEXT, progress=False
        )

        def first() -> Any:
            with tempfile.TemporaryDirectory() as folder:
                return ours(model, texts, folder, d_sae)

        runs = {
            "first": first,
            "second": lambda: second(model, acts, len(texts) * CONTEXT, d_sae),
            "SAELens": lambda: theirs(hf, texts, d_sae),
        }
        timed = interleaved(runs, 2 if args.quick else args.repeats)
    least = {"first": 0.95, "second": 2.0}
    rows = [
        [
            name,
            f"{statistics.median(one.wall):.2f} s",
            verdict(timed, "SAELens", name, least[name]) if name in least else "",
        ]
        for name, one in timed.items()
    ]
    print(heading(f"Dictionaries: {len(texts) * CONTEXT:,} tokens of layer {LAYER}, {d_sae} features"))
    print(table(["", "median", "SAELens's time / this"], rows))
    one, four = (peak(count, args.quick) for count in (len(texts), 4 * len(texts)))
    print(f"\npeak memory: {one:.2f} GB, with 4 × the tokens {four:.2f} GB ({four / one:.3f}×)")


if __name__ == "__main__":
    main()
