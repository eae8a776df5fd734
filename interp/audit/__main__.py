"""`python -m interp.audit NAME…`: audit models and print a table for each; exit status 1 if any check fails."""

from __future__ import annotations

import argparse
import sys

from ..models.loading import load_model


def main(arguments: list[str] | None = None) -> int:
    """Audit the models named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m interp.audit", description=main.__doc__)
    parser.add_argument("models", nargs="+", help="hub id, local folder or bundled name")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--attn-implementation", default=None)
    options = parser.parse_args(arguments)
    passed = True
    for name in options.models:
        report = load_model(name, dtype=options.dtype, attn_implementation=options.attn_implementation).audit()
        print(report)
        passed &= report.ok
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
