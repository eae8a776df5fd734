"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import interp

if TYPE_CHECKING:
    from interp import Model


def add_model(parser: argparse.ArgumentParser, out: Path) -> None:
    """Which model, where it runs, and where results go."""
    parser.add_argument(
        "--model", default="smollm2-135m", help="hub id, local folder or bundled name (default smollm2-135m)"
    )
    parser.add_argument("--device", default=None, help="cpu, cuda, cuda:1, …; the GPU where there is one")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, …; fp32 on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=lambda text: Path(text).expanduser(), default=out, help=f"folder of results (default {out})"
    )


def loaded(options: argparse.Namespace) -> Model:
    """The model that was asked for; the seed is set before."""
    interp.set_seed(options.seed)
    print(f"loading {options.model} …", flush=True)
    model = interp.load_model(options.model, device=options.device, dtype=options.dtype)
    print(model)
    return model
