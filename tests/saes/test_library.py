"""SAELens is imported when it is needed, by this room alone, and leaves the process as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import interp

RUN = """
import os, sys, warnings
warnings.filterwarnings("ignore")
import interp, interp.saes
assert "sae_lens" not in sys.modules and "transformer_lens" not in sys.modules
streams, before = (sys.stdout, sys.stderr), dict(os.environ)
interp.SparseAutoencoder(d_model=8, d_hidden=16)
assert "sae_lens" in sys.modules
assert (sys.stdout, sys.stderr) == streams, "the streams are those of before"
assert dict(os.environ) == before, set(os.environ) ^ set(before)
"""


def test_the_import_leaves_nothing_behind() -> None:
    root = Path(interp.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", RUN], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr, "and says nothing"
