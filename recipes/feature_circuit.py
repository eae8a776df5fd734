"""A circuit of features: three dictionaries trained on one stream of activations, and what of them agreement rests on.

    python recipes/feature_circuit.py                              # the bundled model, layers 10, 16 and 22, 32 pairs
    python recipes/feature_circuit.py --layers 8 12 --tokens 100000 --texts my_folder

Activations of all layers are collected at once, and the dictionaries trained side by side. Nodes are features and what each
dictionary does not explain, scored by integrated gradients on pairs of sentences whose verb must agree with its subject; edges
between neighbouring dictionaries by vector-Jacobian products (Marks et al. 2024).

Written to `--out`: the dictionaries (`L10/`, …), circuit.json, faithfulness.csv, and pages of the circuit and of its features.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import interp


def main(argv: Sequence[str] | None = None) -> Path:
    """Collect, train, discover, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 16, 22])
    parser.add_argument("--n", type=int, default=32, help="pairs")
    parser.add_argument("--top", type=int, default=100, help="nodes of the circuit")
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--texts", help="a folder of .txt files instead of presidential addresses")
    parser.add_argument("--out", type=Path, default=Path("artifacts/feature_circuit"))
    args = parser.parse_args(argv)
    interp.set_seed(0)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    model = interp.load_model(args.model)
    out: Path = args.out
    texts = interp.corpus(args.texts or "sotu")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    stored = interp.collect_activations(
        model, [texts[i] for i in order], args.layers, "resid_post", to_disk=out / "acts", context=128,
        dtype="bfloat16", drop=("prefix", "massive"), tokens=int(1.05 * args.tokens) + 16_384,
    )  # fmt: skip
    say(f"{len(stored):,} tokens collected at {len(args.layers)} layers")
    saes = [interp.SparseAutoencoder(model, f"L{layer}.resid_post", k=args.k) for layer in args.layers]
    say(f"trained:\n{interp.train_sae(saes, stored, tokens=args.tokens, checkpoint=out / 'run')}")
    for layer, sae in zip(args.layers, saes, strict=True):
        interp.save_sae(sae, out / f"L{layer}")
    pairs = interp.tasks.agreement(model.tokenizer, n=args.n, seed=0)
    circuit = interp.discover(model, pairs, "eap-ig", "feature", saes=saes, top=args.top)
    circuit.to_json(out / "circuit.json")
    say(f"{circuit}")
    for errors in (False, True):
        evaluation = interp.evaluate_circuit(model, pairs, circuit, errors=errors)
        name = "faithfulness_with_errors.csv" if errors else "faithfulness.csv"
        evaluation.curve.to_csv(out / name, index=False)
        say(
            f"{name}: full {evaluation.full:.3f}, empty {evaluation.empty:.3f}\n{evaluation.curve.round(3).to_string()}"
        )
    interp.plot_circuit_graph(circuit).save(out / "circuit.html")
    few = [texts[i][:5000] for i in order[:12]]  # what the pages of features show
    for layer, sae in zip(args.layers, saes, strict=True):
        units = sorted(circuit.kept(f"L{layer}.sae{layer}", "")[0])
        if units:
            interp.plot_features(model, sae, few, features=units).save(out / f"features_L{layer}.html")
    say(f"written to {out}")
    return out


if __name__ == "__main__":
    main()
