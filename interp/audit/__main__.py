"""`python -m interp.audit NAME…`: the same as `interp audit NAME…`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Audit the models named on the command line; 1 if any check fails."""
    from ..cli import main as command

    return command(["audit", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
