"""The README does what it says: its blocks run and print what stands behind `#`, its links and those of the docs lead
somewhere, and the pages of families and of claims say what is so."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

import interp

from .families import EAGER, SUPPORTED, UNSUPPORTED
from .oracle.configs import FAMILIES
from .tools.family_table import END, PAGE, START, audited, family_lines

ROOT = Path(interp.__file__).parents[1]
README = ROOT / "README.md"
BUNDLED = "smollm2-135m"
TEXT = README.read_text(encoding="utf-8")
TABLE = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
CLAIMS = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
#: Rows with one model each among the tests' families, so that auditing it writes the whole line.
SINGLE = ("gpt2", "gptj", "gpt_oss", "opt")


def blocks() -> list[tuple[int, str]]:
    """The README's Python blocks, with the line of the file at which each begins."""
    found = re.finditer(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [(TEXT.count("\n", 0, match.start(1)), match[1]) for match in found]


def expected(block: str) -> list[str]:
    """What a block says that its calls of print show."""
    return [line.split("  # ", 1)[1] for line in block.splitlines() if line.strip().startswith("print(")]


def test_blocks_print_what_they_say(bundled: interp.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled model is the one that other tests have loaded, by this very call."""
    monkeypatch.chdir(tmp_path)
    load = interp.load_model
    here = ((BUNDLED,), ("gpt2",))  # no hub answers in tests
    monkeypatch.setattr(
        interp, "load_model", lambda *of, **more: bundled if of in here and not more else load(*of, **more)
    )
    names: dict[str, object] = {}
    assert len(blocks()) > 5
    for line, block in blocks():
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):  # the empty lines make tracebacks name the README's own
            exec(compile("\n" * line + block, str(README), "exec"), names)
        assert shown.getvalue().splitlines() == expected(block), f"README.md, block at line {line + 1}"
    assert {path.name for path in tmp_path.iterdir()} == {
        "ioi.nc", "ioi.html", "circuit.html", "circuit.json", "attention.html", "sae", "artifacts", "ioi_report.html",
    }  # fmt: skip


def test_table_has_every_family_and_no_failure() -> None:
    for family in SUPPORTED:
        assert f"`{FAMILIES[family][0]}`" in TABLE, f"{family} is not in the table: make families"
    for family in UNSUPPORTED:
        assert f"\n- `{FAMILIES[family][0]}`:" in TABLE, f"{family} is not among the refused: make families"
    assert "FAILED" not in TABLE
    for passed, checks in re.findall(r"\| (\d+) / (\d+) \|", TABLE):
        assert passed == checks
    assert "| `smollm2-135m` | llama | 30 |" in TABLE


@pytest.mark.parametrize("family", SINGLE)
def test_table_is_what_the_audit_writes(family: str) -> None:
    assert family not in EAGER
    (line,) = family_lines([audited(family)])
    assert line in TABLE, f"the audit now says {line}: make families"


@pytest.mark.parametrize(
    "page",
    [README, *sorted(ROOT.glob("docs/**/*.md")), ROOT / "recipes" / "README.md", ROOT / "benchmarks" / "README.md"],
    ids=lambda page: f"{page.parent.name}/{page.name}",
)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if heading:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert heading in anchors, f"{page.name} links to {target}; {file.name} has {anchors}"


def test_commands_of_the_claims_name_tests_that_exist() -> None:
    for command in re.findall(r"`pytest ([^`]+)`", CLAIMS):
        for path in (part for part in re.split(" -[km] ", command)[0].split() if not part.startswith("-")):
            assert (ROOT / path).exists(), f"`pytest {command}`"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)", TEXT + CLAIMS)) <= {*targets}


def test_pictures_are_small() -> None:
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size <= 150_000, f"{picture.name} makes every clone larger"
