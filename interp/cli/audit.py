"""`interp audit NAME…`: an audit as a command."""

from __future__ import annotations

import argparse

import interp

HELP = """Prove every read, write and law of edges of a model.

Prints a table for each model; the exit status is 1 if any check fails. Of a model at hand: model.audit()."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("models", nargs="+", metavar="NAME", help="hub id, local folder or bundled name")
    parser.add_argument("--dtype", default=None, help="float32, bfloat16, …")
    parser.add_argument("--attn-implementation", default=None, help="eager, sdpa, …")


def run(options: argparse.Namespace) -> int:
    """Audit the models named."""
    passed = True
    for name in options.models:
        report = interp.load_model(name, dtype=options.dtype, attn_implementation=options.attn_implementation).audit()
        print(report)
        passed &= report.ok
    return 0 if passed else 1
