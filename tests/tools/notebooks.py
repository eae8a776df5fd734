"""Strips the notebooks of recipes/ of their outputs, runs them, and writes rendered copies: `make notebooks`.

    python -m tests.tools.notebooks            # strip them all, then run them and write docs/tutorials/*.md
    python -m tests.tools.notebooks --strip    # strip only: after editing in Jupyter, before a commit

The notebooks are the source. A copy has the text that cells wrote, and pictures as PNG.
"""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
TUTORIALS = ROOT / "docs" / "tutorials"
PICTURES = TUTORIALS / "img"
NAMES = ("colab_setup", "tour", "exploratory")
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
#: What a notebook's metadata keeps.
KEPT = ("kernelspec", "language_info", "colab")
LARGEST = 150_000  # bytes of a picture

#: Runs before the first cell of a copy: figures also come as PNG.
WITH_PICTURES = """
from IPython import get_ipython
get_ipython().display_formatter.formatters["image/png"].for_type_by_name(
    "interp.plots.page", "Figure", lambda figure: figure.png(scale=1)
)
"""


def read(name: str) -> NotebookNode:
    """A notebook of recipes/ by its name without the suffix."""
    return nbformat.read(RECIPES / f"{name}.ipynb", as_version=4)


def stripped(notebook: NotebookNode) -> NotebookNode:
    """The notebook without outputs, counts, and what editors leave in its metadata."""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags")
        cell.metadata = NotebookNode({"tags": tags} if tags else {})
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kept = {key: value for key, value in notebook.metadata.items() if key in KEPT}
    notebook.metadata = NotebookNode(kept | {"kernelspec": KERNEL, "language_info": {"name": "python"}})
    return notebook


def text_of(notebook: NotebookNode) -> str:
    """The notebook as it stands in git."""
    return nbformat.writes(notebook, indent=1) + "\n"


def with_settings(notebook: NotebookNode, settings: Mapping[str, object]) -> NotebookNode:
    """A cell that sets these names, behind the one that is tagged "parameters".

    Raises:
        ValueError: no such cell, or a name that it does not set.
    """
    for place, cell in enumerate(notebook.cells):
        if "parameters" in cell.metadata.get("tags", ()):
            if unknown := [name for name in settings if not re.search(rf"^{name} = ", cell.source, re.MULTILINE)]:
                raise ValueError(f"the notebook's parameters are not {', '.join(unknown)}")
            source = "\n".join(f"{name} = {value!r}" for name, value in settings.items())
            notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
            return notebook
    raise ValueError('the notebook has no cell that is tagged "parameters"')


def executed(notebook: NotebookNode, folder: Path, *, pictures: bool = False, timeout: float = 600) -> NotebookNode:
    """Run all cells with `folder` as the working directory and for all that Jupyter itself writes.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    own = folder / ".jupyter"
    own.mkdir(exist_ok=True)
    private = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "TMPDIR")
    settings = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONPATH": str(ROOT)} | dict.fromkeys(private, str(own))
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        client = NotebookClient(
            notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
        )
        if pictures:
            notebook.cells.insert(0, nbformat.v4.new_code_cell(WITH_PICTURES))
        client.execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
        if pictures and notebook.cells[0].source == WITH_PICTURES:
            notebook.cells.pop(0)
    return notebook


def said(cell: NotebookNode) -> str:
    """What a cell wrote, as text: without pictures, and without what went to stderr."""
    parts = []
    for output in cell.get("outputs", ()):
        if output.output_type == "stream" and output.name == "stdout":
            parts.append(output.text)
        elif output.output_type in ("display_data", "execute_result") and "image/png" not in output.data:
            parts.append(output.data.get("text/plain", ""))
    return "\n".join(part.rstrip() for part in parts if part.strip())


def small(png: bytes) -> bytes:
    """A picture packed as well as PNG can be; only one that is too large has 256 colours, which coarsens scales a little."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    for one in (picture, picture.quantize(256, dither=Image.Dither.NONE)):
        out = io.BytesIO()
        one.save(out, "PNG", optimize=True)
        if len(out.getvalue()) <= LARGEST:
            break
    return out.getvalue()


def links(text: str) -> str:
    """Links from recipes/ as links from docs/tutorials/: to pages of docs/, and to the copies of notebooks."""
    text = re.sub(r"\]\(\.\./docs/", "](../", text)
    return re.sub(r"\]\((\w+)\.ipynb", r"](\1.md", text)


def markdown(name: str, notebook: NotebookNode) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as a page of markdown, and its pictures by file name."""
    lines, pictures = [], {}
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != "code":
            lines += [links(cell.source), ""]
            if number == 0:
                note = f"This page is `recipes/{name}.ipynb` with what it wrote. Run it, and the pictures answer the mouse."
                lines += [f"*{note}*", ""]
            continue
        lines += ["```python", cell.source, "```", ""]
        if text := said(cell):
            lines += ["```text", text, "```", ""]
        for output in cell.outputs:
            if png := output.get("data", {}).get("image/png"):
                file = f"{name}-{len(pictures) + 1}.png"
                pictures[file] = small(base64.b64decode(png))
                title = re.sub(r"^Figure\((['\"])(.*)\1\)$", r"\2", output.data.get("text/plain", "picture"))
                lines += [f"![{title}](img/{file})", ""]
    return "\n".join(lines).rstrip() + "\n", pictures


def rendered(name: str) -> tuple[str, dict[str, bytes]]:
    """Run a notebook and give its copy: the page, and its pictures by file name."""
    folder = Path(tempfile.mkdtemp(prefix="interp-notebook-"))
    try:
        return markdown(name, executed(read(name), folder, pictures=True))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main(arguments: list[str]) -> None:
    """Strip the notebooks; then, unless --strip is given, run them and write the copies."""
    for name in NAMES:
        (RECIPES / f"{name}.ipynb").write_text(text_of(stripped(read(name))), encoding="utf-8")
    for name in () if "--strip" in arguments else NAMES:
        print(f"running {name}", flush=True)
        page, pictures = rendered(name)
        PICTURES.mkdir(parents=True, exist_ok=True)
        for old in PICTURES.glob(f"{name}-*.png"):
            old.unlink()
        for file, data in pictures.items():
            if len(data) > LARGEST:
                raise SystemExit(f"{file} has {len(data):,} bytes: more than {LARGEST:,} make every clone larger")
            (PICTURES / file).write_bytes(data)
        (TUTORIALS / f"{name}.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
