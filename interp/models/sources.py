"""Where the files of a checkpoint are: a folder on this machine, or a name on a hub."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import ModelNotFoundError
from .packages import BUNDLED

#: Options that say where a checkpoint is and how it may be read: config, tokenizer and weights each need all of them.
EVERYWHERE = (
    "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code", "revision", "code_revision", "proxies",
    "force_download", "gguf_file",
)  # fmt: skip
#: Those of them that find a single file on a hub.
FINDING = ("token", "cache_dir", "subfolder", "local_files_only", "revision", "proxies")
_ADAPTER = "adapter_config.json"


def as_folder(source: Any) -> Path | None:
    """The folder that a name means (`~` expanded), or None where it is a hub's id."""
    said = str(source)
    if isinstance(source, os.PathLike) or said.startswith((os.sep, ".", "~")) or (said and Path(said).is_dir()):
        return Path(source).expanduser()
    return None


def checked_source(source: Any, where: dict[str, Any]) -> Any:
    """A folder with what makes it a model, or a hub's id as it is."""
    folder = as_folder(source)
    if folder is None:
        return source
    wanted = folder / where.get("subfolder", "") / where.get("gguf_file", "config.json")
    if not wanted.is_file() and not (wanted.parent / _ADAPTER).is_file():
        raise ModelNotFoundError(
            f"{wanted.parent} is not a model folder (no {wanted.name}); give a folder written by save_pretrained, a hub "
            f"id, or a bundled name: {', '.join(BUNDLED)}"
        )
    return folder


def file_of(source: Any, name: str, where: dict[str, Any]) -> str | None:
    """The path of one file of a checkpoint, or None where it has no such file."""
    from transformers.utils import cached_file

    finding = {option: where[option] for option in FINDING if option in where}
    quiet = dict.fromkeys(("_raise_exceptions_for_missing_entries", "_raise_exceptions_for_connection_errors"), False)
    return cached_file(source, name, **finding, **quiet)


def base_of_adapter(source: Any, where: dict[str, Any]) -> str | None:
    """The name of the model that an adapter is for, where the checkpoint is one; a folder may hold both."""
    folder = as_folder(source)
    if folder is not None and (folder / where.get("subfolder", "") / "config.json").is_file():
        return None
    if "gguf_file" in where or (path := file_of(source, _ADAPTER, where)) is None:
        return None
    base = json.loads(Path(path).read_text()).get("base_model_name_or_path")
    if not base:
        raise ModelNotFoundError(
            f"the adapter {source} does not say which model it is for: load that, put the adapter on it with "
            "peft.PeftModel.from_pretrained(hf_model, adapter), and give load_model the result"
        )
    return str(base)
