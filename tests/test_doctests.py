"""Examples of docstrings: each runs behind the lines at the top of the reference, and gives what it says."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import interp

ROOT = Path(interp.__file__).parent
REFERENCE = ROOT.parent / "docs" / "reference"
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS


def examples() -> Iterator[tuple[str, str]]:
    """Every docstring of the library that has an example, by file and name."""
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ">>>" in (
                ast.get_docstring(node) or ""
            ):
                yield f"{path.relative_to(ROOT)}::{getattr(node, 'name', '')}", ast.get_docstring(node) or ""


EXAMPLES = dict(examples())


@pytest.fixture(scope="module")
def names(bundled: interp.Model) -> dict[str, Any]:
    """What the lines at the top of the reference make; the bundled model is the one that other tests have loaded."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", (REFERENCE / "index.md").read_text("utf-8"), re.M | re.S)
    made: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interp, "load_model", lambda name: {"smollm2-135m": bundled}[name])
        exec(block, made)
    return made


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", EXAMPLES)
def test_example(where: str, names: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(EXAMPLES[where], dict(names), where, where, 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append)
    assert not said, "".join(said)


def test_every_public_name_has_an_example() -> None:
    without = [
        name
        for name in interp.__all__
        if not inspect.ismodule(thing := getattr(interp, name)) and ">>>" not in (inspect.getdoc(thing) or "")
    ]
    assert not without, without


def test_examples_stand_where_the_reference_shows_them() -> None:
    """A section of its name, in the plural: otherwise the page has it as plain text."""
    for where, text in EXAMPLES.items():
        assert re.search(r"^Examples:\n    >>> ", text, re.MULTILINE), where
