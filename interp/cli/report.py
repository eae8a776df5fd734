"""`interp report FILE…`: a page of records, as a command."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import InterpError

HELP = """Make one page of records: effects (.nc), circuits (.json), folders of runs or dictionaries.

The page stands alone: contents, sentences, pictures, tables, provenance, code that runs. In Python: interp.report()."""


def add(parser: argparse.ArgumentParser) -> None:
    """Its options."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="what was saved by effects.save, circuit.to_json, …")
    parser.add_argument("--out", default="report.html", help="the page (default report.html)")
    parser.add_argument("--title", default=None, help="its title (default: made of the files' names)")


def run(options: argparse.Namespace) -> int:
    """Write the page."""
    from ..reports import report

    items = [(Path(name).stem, read(Path(name).expanduser())) for name in options.files]
    title = options.title or ", ".join(name for name, _ in items)
    print(report(items, options.out, title=title))
    return 0


def read(path: Path) -> object:
    """What stands in a file or folder.

    Raises:
        InterpError: nothing there, or nothing of ours.
    """
    if path.suffix == ".nc":
        from ..effects import Effects

        return Effects.load(path)
    if path.suffix == ".json":
        from ..circuits import Circuit

        return Circuit.from_json(path)
    if (path / "metrics.jsonl").exists() or (path / "config.json").exists():
        from ..tracking import Run

        return Run(path)
    if path.is_dir():
        from ..saes import load_sae

        return load_sae(str(path))
    raise InterpError(
        f"{path} is nothing that a report can show: give effects (.nc), circuits (.json) or a run's folder"
    )
