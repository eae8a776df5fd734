"""A transcoder: what an MLP does, by features that read its input and write its output; beside PCA and a linear map.

    python recipes/train_transcoder.py                             # the bundled model, layer 8, 400,000 tokens
    python recipes/train_transcoder.py --layer 12 --tokens 100000 --texts my_folder

SAELens uses transcoders and trains none; this one is trained by its trainer on rows `[input | target]` and saved as its
`JumpReLUTranscoder` (`--out`/transcoder). The table says how much of the MLP's output each explains on held-out documents,
and what the model loses with it in the MLP's place.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

import interp


def main(argv: Sequence[str] | None = None) -> Path:
    """Collect, train, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--width", type=int, default=4, help="features for each number of the stream")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--held", type=int, default=30, help="documents that are held out")
    parser.add_argument("--eval-tokens", type=int, default=12_000)
    parser.add_argument("--texts", help="a folder of .txt files instead of presidential addresses and Moby-Dick")
    parser.add_argument("--out", type=Path, default=Path("artifacts/train_transcoder"))
    args = parser.parse_args(argv)
    interp.set_seed(0)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    model = interp.load_model(args.model)
    texts = interp.corpus(args.texts) if args.texts else interp.corpus("sotu") + interp.corpus("moby-dick")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    train, held = [[texts[i] for i in part] for part in (order[: -args.held], order[-args.held :])]
    kinds = ["mlp_in", "mlp_out"]
    stored = interp.collect_activations(
        model, train, args.layer, kinds, to_disk=args.out / "acts", context=128, dtype="bfloat16",
        drop=("prefix", "massive"), tokens=int(1.05 * args.tokens) + 16_384,
    )  # fmt: skip
    say(f"{len(stored):,} tokens collected")
    site = f"L{args.layer}.mlp_out"
    sae = interp.SparseAutoencoder(model, site, "transcoder", d_sae=args.width * model.d_model, k=args.k)
    say(f"trained: {interp.train_sae(sae, stored, tokens=args.tokens, checkpoint=args.out / 'run')}")
    interp.save_sae(sae, args.out / "transcoder")
    x, y = (next(stored.shards(f"L{args.layer}.{kind}")).float() for kind in kinds)
    made = {"transcoder": sae, "linear map": interp.saes.linear(x, y), "PCA-32 of the output": interp.saes.pca(y, 32)}
    table = {}
    for name, other in made.items():
        table[name] = interp.evaluate_sae(model, other, held, site=site, tokens=args.eval_tokens).to_dict()
        say(f"{name} evaluated")
    found = pd.DataFrame(table).T.drop(columns="site").astype(float)
    found.to_csv(args.out / "table.csv")
    print(found.round(3).T.to_string())
    say(f"written to {args.out}")
    out: Path = args.out
    return out


if __name__ == "__main__":
    main()
