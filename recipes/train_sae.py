"""A sparse autoencoder on the residual stream: trained, evaluated on held-out documents, compared, looked at.

    python recipes/train_sae.py                                    # the bundled model, layer 8, 400,000 tokens
    python recipes/train_sae.py --architecture batchtopk --tokens 200000 --texts my_folder

Texts are presidential addresses and Moby-Dick (public domain, fetched by npm), or a folder of .txt files; the last `--held`
documents are held out. Activations are kept in shards, so that a second dictionary on them runs no model.

Written to `--out`: the dictionary as SAELens loads it (`sae/`), table.csv and summary.md with the dictionary beside an
untrained one and principal components, features.html with what the features stand for, and the activations (`acts/`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import interp

COMPONENTS = (32, 64, 128)  # of PCA, to compare with


def documents(texts: str | None, held: int) -> tuple[list[str], list[str]]:
    """Texts to train on, and those that are held out: the last of a seeded order."""
    listed = interp.corpus(texts) if texts else interp.corpus("sotu") + interp.corpus("moby-dick")
    order = torch.randperm(len(listed), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [listed[i] for i in order]
    return shuffled[:-held], shuffled[-held:]


def compared(site: interp.Site, stored: Any, untrained: object) -> dict[str, object]:
    """An untrained dictionary of the same shape, and principal components of the first shard's tokens."""
    few = next(stored.shards(str(site))).float()
    made: dict[str, object] = {f"PCA-{k}": interp.saes.pca(few, k) for k in COMPONENTS}
    return {"untrained": untrained, **made}


def main(argv: Sequence[str] | None = None) -> Path:
    """Collect, train, evaluate, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=8)
    parser.add_argument("--architecture", default="topk")
    parser.add_argument("--width", type=int, default=4, help="features for each number of the stream")
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--held", type=int, default=30, help="documents that are held out")
    parser.add_argument("--eval-tokens", type=int, default=12_500)
    parser.add_argument("--texts", help="a folder of .txt files instead")
    parser.add_argument("--features", type=int, default=100, help="features on the page")
    parser.add_argument("--out", type=Path, default=Path("artifacts/train_sae"))
    args = parser.parse_args(argv)
    interp.set_seed(0)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:6.0f} s  {text}", flush=True)

    model = interp.load_model(args.model)
    site = interp.Site("resid_post", layer=args.layer)
    train, held = documents(args.texts, args.held)
    say(f"{len(train)} documents to train on, {len(held)} held out")
    stored = interp.collect_activations(
        model, train, args.layer, "resid_post", to_disk=args.out / "acts", context=128, dtype="bfloat16",
        drop=("prefix", "massive"), tokens=int(1.05 * args.tokens) + 16_384,
    )  # fmt: skip
    say(f"{len(stored):,} tokens collected")
    k = {"k": args.k} if interp.saes.ARCHITECTURES[args.architecture].sparsity == "k" else {}
    made = [
        interp.SparseAutoencoder(model, site, args.architecture, d_sae=args.width * model.d_model, **k, **more)
        for more in ({}, {"normalize_activations": "none"})
    ]
    sae, untrained = made
    trained = interp.train_sae(sae, stored, tokens=args.tokens, checkpoint=args.out / "run")
    trained.history.to_csv(args.out / "history.csv", index=False)
    say(f"trained: {trained}")
    interp.save_sae(sae, args.out / "sae")
    rows = {}
    for name, other in {args.architecture: sae, **compared(site, stored, untrained)}.items():
        try:
            rows[name] = interp.evaluate_sae(model, other, held, site=site, tokens=args.eval_tokens).to_dict()
        except interp.errors.PlanError as error:  # an untrained one may have no threshold yet
            say(f"{name}: {error}")
            continue
        say(f"{name} evaluated")
    table = pd.DataFrame(rows).T.drop(columns="site").astype(float)
    table.to_csv(args.out / "table.csv")
    (args.out / "summary.md").write_text(table.round(4).to_markdown() + "\n")
    print(table.round(3).T.to_string())
    loaded = interp.load_sae(args.out / "sae", model)
    density = interp.evaluate_sae(model, loaded, held, tokens=args.eval_tokens, loss_tokens=256).density
    busy = [int(i) for i in density.argsort(descending=True) if density[i] < 0.1][: args.features]
    interp.plot_features(model, loaded, [text[:5000] for text in held], features=busy).save(args.out / "features.html")
    say(f"written to {args.out}")
    out: Path = args.out
    return out


if __name__ == "__main__":
    main()
