"""The pages under docs/ do what they say: their Python blocks run in order and print what stands behind `#`."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import interp

DOCS = Path(interp.__file__).parents[1] / "docs"
#: Pages whose blocks stand on their own.
PAGES = (
    "add-a-view.md", "add-a-method.md", "add-a-family.md", "dictionaries.md", "tracking.md", "pictures.md", "reports.md",
    "facts.md", "attribution.md",
)  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run_and_print_what_they_say(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    names: dict[str, object] = {}
    assert len(blocks) > 1
    for block in blocks:
        line, shown = text.count("\n", 0, block.start(1)), io.StringIO()
        said = [part.split("  # ", 1)[1] for part in block[1].splitlines() if part.strip().startswith("print(")]
        with contextlib.redirect_stdout(shown):
            exec(compile("\n" * line + block[1], str(DOCS / page), "exec"), names)
        assert shown.getvalue().splitlines() == said, f"{page}, block at line {line + 1}"
