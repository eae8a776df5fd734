"""`python -m interp`: the same as the command `interp`."""

import sys

from .cli import main

sys.exit(main())
