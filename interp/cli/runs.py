"""`interp runs`: what was tracked, as a table."""

from __future__ import annotations

import argparse

HELP = """List the runs that interp.track_experiment has kept.

Newest last: name, when, status, how long, and the last value of each metric. In Python: interp.runs()."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("--root", default="artifacts/runs", help="the folder of runs (default artifacts/runs)")
    parser.add_argument("--status", default=None, help="running, finished, failed or unfinished alone")
    parser.add_argument("--name", default=None, help="runs whose name holds this text")
    parser.add_argument("--csv", action="store_true", help="all columns, as CSV")


def run(options: argparse.Namespace) -> int:
    """Print the table of runs."""
    from ..tracking import runs

    table = runs(root=options.root)
    if options.status is not None:
        table = table[table["status"] == options.status]
    if options.name is not None:
        table = table[table["name"].str.contains(options.name, regex=False)]
    if options.csv:
        print(table.to_csv(index=False), end="")
    elif not len(table):
        print(f"no runs in {options.root}")
    else:
        print(table.to_string(index=False, max_colwidth=60))
    return 0
