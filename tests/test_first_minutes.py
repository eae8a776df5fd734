"""The person's five quick starts, and the README's first lines, pasted into a fresh process with nothing but this package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import interp

ROOT = Path(interp.__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
#: What stands before the second quick start of the README in a session of its own.
BEGUN = """
import interp
interp.set_seed(0)
model = interp.load_model("smollm2-135m")
pairs = interp.tasks.ioi(model.tokenizer, n=4, template=0, order="ABBA")
"""


def block(heading: str) -> str:
    """The Python block behind a heading."""
    part = README.split(f"### {heading}")[1]
    found = re.search(r"^```python\n(.*?)^```$", part, re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


CASES = {
    "first": re.search(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)[1].replace(
        '"gpt2"', '"smollm2-135m"'
    ),  # type: ignore[index]
    "inside": block("1 · Look inside"),
    "patch": block("2 · Patch").replace(
        "pairs = ", "import interp\nmodel = interp.load_model('smollm2-135m')\npairs = ", 1
    ),
    "circuit": BEGUN + block("3 · Find a circuit"),
    "dictionary": BEGUN + block("4 · Train a dictionary, steer with it"),
    "keep": BEGUN
    + "effects = interp.patch(model, pairs, interp.heads('z', layers=[20, 23]))\n"
    + "circuit = interp.discover(model, pairs)\nscore = interp.evaluate_circuit(model, pairs, circuit, fractions=[0.01])\n"
    + block("5 · Keep, compare, send to a colleague").replace("('component', 'layer', 'position', 'pair')", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_each_quick_start_runs_by_itself(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CASES[name]], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shown = [line for line in CASES[name].splitlines() if line.strip().startswith("print(")]
    assert len(done.stdout.splitlines()) >= len(shown)
