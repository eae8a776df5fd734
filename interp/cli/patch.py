"""`interp patch`: the study by patching as a command."""

from __future__ import annotations

import argparse
from pathlib import Path

import interp

from .common import add_model, loaded

HELP = """Activation patching of one model: a task, its heads, and one fact.

Three experiments, each written as effects (.nc), a page (.html) and, where Chromium is installed, a picture (.png):

    grid        every component at every layer and position, mean over the task's pairs
    heads       every attention head at every layer, all positions at once
    fact        the same grid for one pair of prompts: the city of the Eiffel Tower against that of the Colosseum

and what the four strongest heads attend to. index.html is the report of all; summary.md has the strongest cells and the times."""

OUT = Path("artifacts/activation_patching")


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    add_model(parser, OUT)
    parser.add_argument("--task", default="ioi", help="ioi, facts, greater_than, pronouns, agreement or induction")
    parser.add_argument("--n", type=int, default=8, help="pairs of prompts (default 8)")
    parser.add_argument("--components", nargs="+", default=["resid_pre", "attn_out", "mlp_out"])
    parser.add_argument("--direction", default="noising", choices=["noising", "denoising"])
    parser.add_argument("--schedule", default="auto", help="auto, naive, rows, growing or prefix: the same numbers")


def run(options: argparse.Namespace) -> Path:
    """Run the study; the folder that holds its results."""
    return interp.studies.patching_study(
        loaded(options),
        options.out,
        task=options.task,
        n=options.n,
        seed=options.seed,
        components=options.components,
        direction=options.direction,
        schedule=options.schedule,
    )
