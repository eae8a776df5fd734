"""The command line, `interp` or `python -m interp`: one word for each thing that is done most, and a page of help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from ..errors import InterpError

#: The words, in the order of the help, each a module of this room with `HELP`, `add(parser)` and `run(options)`.
COMMANDS = ("audit", "patch", "circuit", "runs", "report")

EPILOG = """
models     a hub id (gpt2-medium), a local folder, or the bundled smollm2-135m, which needs no hub

examples
  interp patch                               the bundled model, indirect objects: a report under artifacts/
  interp patch --model gpt2-medium --task greater_than --n 16 --device cuda
  interp circuit --model gpt2 --n 64         found in four ways, evaluated, drawn
  interp audit gpt2 smollm2-135m             is every activation the one that its name says?
  interp runs --status finished              what track_experiment has kept
  interp report ioi.nc circuit.json --out page.html

`interp COMMAND --help` says what a command takes. In Python: import interp.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. Wrong input is told in one line."""
    parser = argparse.ArgumentParser(
        prog="interp",
        description="Experiments of mechanistic interpretability on unmodified HuggingFace models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    words = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = command(name)
        summary = module.HELP.partition("\n")[0]
        module.add(
            words.add_parser(
                name, help=summary, description=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter
            )
        )
    options = parser.parse_args(arguments)
    try:
        found = command(options.command).run(options)
    except InterpError as error:
        print(f"interp {options.command}: {error}", file=sys.stderr)
        return 2
    return found if isinstance(found, int) else 0


def command(name: str) -> ModuleType:
    """The module of a word."""
    return import_module(f".{name}", __name__)


def call(name: str, arguments: Sequence[str] | None = None) -> object:
    """What one command gives, called without its word, as a recipe does. InterpError: wrong input."""
    module = command(name)
    parser = argparse.ArgumentParser(description=module.HELP, formatter_class=argparse.RawDescriptionHelpFormatter)
    module.add(parser)
    return module.run(parser.parse_args(arguments))
