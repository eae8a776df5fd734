"""The command line: help that one reads, wrong input in one line, and each word does what its function in Python does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import interp
from interp.cli import COMMANDS, main
from tests.families import loaded, words
from tests.plots.browser import Page


def test_the_help_is_one_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert len(said.splitlines()) <= 50 and max(map(len, said.splitlines())) <= 110
    for name in COMMANDS:
        assert f"\n    {name}" in said and f"interp {name}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_each_word_has_a_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0 and f"usage: interp {name}" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom interp.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'nnsight', 'bokeh', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_python_m_and_the_script_are_this() -> None:
    done = subprocess.run([sys.executable, "-m", "interp", "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.startswith("usage: interp")
    pyproject = Path(interp.__file__).parents[1] / "pyproject.toml"
    assert '[project.scripts]\ninterp = "interp.cli:main"' in pyproject.read_text()


def test_wrong_input_is_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in (
        ["report", str(tmp_path / "nothing.nc")],
        ["report", str(tmp_path / "nothing.txt")],
        ["report", str(tmp_path / "empty")],
        ["audit", str(tmp_path / "empty")],
        ["patch", "--model", str(tmp_path / "empty"), "--out", str(tmp_path / "out")],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith(f"interp {arguments[0]}: ") and str(tmp_path) in said
    assert not (tmp_path / "out").exists()


def test_a_task_that_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = loaded("gpt2")
    monkeypatch.setattr(interp, "load_model", lambda *_, **__: model)
    assert main(["patch", "--task", "nonsense", "--out", str(tmp_path / "out")]) == 2
    assert "no task 'nonsense'; there are ioi" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_audit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[object] = []
    model = loaded("gpt2")
    monkeypatch.setattr(interp, "load_model", lambda name, **more: asked.append((name, more)) or model)
    assert main(["audit", "one", "--dtype", "float32"]) == 0
    assert asked == [("one", {"dtype": "float32", "attn_implementation": None})]
    assert "checks, all passed" in capsys.readouterr().out


def test_runs_lists_what_was_tracked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--root", str(tmp_path)]) == 0
    assert f"no runs in {tmp_path}" in capsys.readouterr().out
    for name in ("first", "second"):
        with interp.track_experiment(experiment_name=name, root=tmp_path) as tracker:
            tracker.log({"loss": 0.25})
    assert main(["runs", "--root", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "first" in said and "second" in said and "finished" in said and "0.25" in said
    assert main(["runs", "--root", str(tmp_path), "--name", "sec"]) == 0
    assert "first" not in capsys.readouterr().out
    assert main(["runs", "--root", str(tmp_path), "--csv", "--status", "failed"]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 1


def test_report_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], chromium: str) -> None:
    model, prompts = loaded("llama_gqa"), words(5, 5)
    pairs = interp.PromptPairs([prompts[0]], [prompts[1]], [7], [8])
    interp.patch(model, pairs, interp.heads("z")).save(tmp_path / "heads.nc")
    interp.discover(model, pairs, progress=False).top(n_edges=20).to_json(tmp_path / "circuit.json")
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "heads.nc"), str(tmp_path / "circuit.json"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    with Page(out) as page:
        assert page.errors == [] and page.network == []
        assert page.evaluate("[...document.querySelectorAll('h2')].map((h) => h.textContent)") == ["heads", "circuit"]
