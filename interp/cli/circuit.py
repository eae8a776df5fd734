"""`interp circuit`: the study of a circuit as a command."""

from __future__ import annotations

import argparse
from pathlib import Path

import interp

from .common import add_model, loaded

HELP = """The circuit of indirect objects: found in four ways, evaluated, drawn.

"Then, Mary and John went to the shop. John gave a ring to" -> " Mary"; in the corrupted prompt the last name is Mary, so
that John is right. Four rankings are found, and circuits of their best edges are run with all else corrupted:

    EAP           edge attribution patching: Δ · gradient at the clean run
    EAP-IG        gradients averaged over `--steps` inputs between clean and corrupted
    exact nodes   every head and MLP and the embedding patched by itself; a circuit has all edges between the nodes that it keeps
    random        edges in a random order: the floor

index.html is the report; beside it curves.csv, sizes.csv, summary.md, the circuit as JSON, and pages of the faithfulness
curves, of the smallest EAP-IG circuit that reaches `--target` with its heads' attention, and of its strongest edges."""

OUT = Path("artifacts/ioi_circuit")


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_model(parser, OUT)
    parser.add_argument("--n", type=int, default=32, help="pairs of prompts (default 32)")
    parser.add_argument("--steps", type=int, default=5, help="interpolation points of EAP-IG (default 5)")
    parser.add_argument("--target", type=float, default=0.85, help="faithfulness that a circuit should reach")


def run(options: argparse.Namespace) -> Path:
    """Run the study; the folder that holds its results."""
    return interp.studies.circuit_study(
        loaded(options), options.out, n=options.n, steps=options.steps, target=options.target, seed=options.seed
    )
