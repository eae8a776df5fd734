"""Checkpoints: a folder or a hub's name becomes a module and a tokenizer, read with transformers' own options."""

from __future__ import annotations

import logging
import pickle
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import nnsight
import torch

from ..errors import ArchitectureError, InterpError, ModelNotFoundError
from .adapters import unwrapped
from .packages import BUNDLED
from .sources import EVERYWHERE, FINDING, as_folder, base_of_adapter, checked_source, file_of

#: How transformers says that a checkpoint is not one that it can load as a language model.
_UNKNOWN = ("not recognize this architecture", "Unrecognized configuration class", "Unrecognized model")
_UNTRUSTED = "`trust_remote_code=True`"
#: Any one of these makes a tokenizer; without one transformers builds some families' from nothing, with an empty vocabulary.
_TOKENIZER_FILES = (
    "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip


def read_checkpoint(
    source: Any,
    tokenizer: object,
    remote: bool,
    *,
    device: object,
    dtype: object,
    device_map: Any,
    allow_missing: bool,
    options: dict[str, Any],
) -> tuple[Any, object, str]:
    """The HuggingFace model (a weightless nnsight one when remote), the tokenizer or None, the commit or revision read."""
    from transformers import AutoConfig
    from transformers.utils.hub import resolve_revision

    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ArchitectureError(f"dtype={dtype!r} is no type of torch; use 'float32', 'bfloat16', 'auto', …")
    where = {name: options[name] for name in EVERYWHERE if options.get(name) is not None}
    source = checked_source(source, where)
    finding = {name: where[name] for name in ("revision", "token", "local_files_only", "cache_dir") if name in where}
    if (revision := resolve_revision(source, **finding)) is not None:
        where["revision"] = revision  # one commit for all three, though the branch may move meanwhile
    commit = str(getattr(revision, "resolved", revision) or "")
    with _told(source):  # an unknown architecture is told before its tokenizer or weights are looked for
        if (base := base_of_adapter(source, where)) is not None:
            if remote:
                raise ArchitectureError(
                    f"{source} is an adapter for {base}, and a server knows whole models: merge it into the weights and give the "
                    "name under which the server has the result"
                )
            placed = {"device": device, "dtype": dtype, "device_map": device_map}
            return _read_adapted(source, base, tokenizer, allow_missing=allow_missing, options=options, **placed)
        config = options.get("config") or AutoConfig.from_pretrained(source, **where)
        tokenizer = tokenizer or _read_tokenizer(source, config, where)
        if remote:
            return _weightless(source, config, tokenizer, dtype, options), tokenizer, commit
        if device is None and device_map is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = torch.float32 if str(device) == "cpu" and "quantization_config" not in options else "auto"
        if device_map is None and (options.get("quantization_config") or getattr(config, "quantization_config", None)):
            device_map = {"": str(device)}  # quantised weights are put where they are quantised, and cannot be moved
        placed = {"dtype": dtype, "device_map": device_map}
        hf = _read_weights(source, _reader(config), {**options, **where, **placed}, allow_missing)
        return hf if device_map is not None else hf.to(device), tokenizer, commit


@contextmanager
def _told(source: object) -> Iterator[None]:
    """What transformers raises while it reads a checkpoint, as one of our errors."""
    try:
        yield
    except InterpError:
        raise
    except ValueError as error:
        if _UNTRUSTED in str(error):
            raise ArchitectureError(
                f"{source} brings code of its own, which runs only where you trust it: read that code, then load it with "
                "trust_remote_code=True"
            ) from error
        if not any(text in str(error) for text in _UNKNOWN):
            raise
        raise ArchitectureError(
            f"{source} holds no causal language model that transformers knows: {_first_line(error)}"
        ) from error
    except OSError as error:
        if as_folder(source) is not None:
            raise ModelNotFoundError(f"the model folder {source} cannot be read: {_first_line(error)}") from error
        raise ModelNotFoundError(
            f"no model {str(source)!r}: not a local folder, not a bundled name ({', '.join(BUNDLED)}), and the hub "
            f"could not give it ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_adapted(
    source: Any, base: str, tokenizer: object, *, allow_missing: bool, options: dict[str, Any], **placed: object
) -> tuple[object, object, str]:
    """The model that an adapter is for, with the adapter's layers in it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelNotFoundError(f"{source} is an adapter for {base}: install peft to load it") from error
    where = {name: options[name] for name in EVERYWHERE if options.get(name) is not None}
    if tokenizer is None and any(file_of(source, name, where) for name in _TOKENIZER_FILES):
        tokenizer = _read_tokenizer(source, None, where)
    told = {name: value for name, value in options.items() if name not in ("subfolder", "revision", "code_revision")}
    try:
        hf, tokenizer, commit = read_checkpoint(
            base, tokenizer, False, allow_missing=allow_missing, options=told, **placed
        )
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"the adapter {source} is for {base}, which cannot be loaded: {error}") from error
    finding = {name: where[name] for name in FINDING if name in where}
    try:
        with warnings.catch_warnings():
            if not allow_missing:
                warnings.filterwarnings("error", message=".*Found missing adapter keys")
            return unwrapped(PeftModel.from_pretrained(hf, source, **finding).eval()), tokenizer, commit
    except ArchitectureError:
        raise
    except (RuntimeError, ValueError, UserWarning) as error:
        raise ModelNotFoundError(f"the adapter {source} does not fit {base}: {_first_line(error)}") from error


def _read_tokenizer(source: object, config: object, where: dict[str, Any]) -> object:
    """The checkpoint's own tokenizer; None, with a warning, where it has none.

    Raises:
        ModelNotFoundError: there is one, but it cannot be built.
    """
    from transformers import AutoTokenizer

    written = "gguf_file" in where or "AutoTokenizer" in (getattr(config, "auto_map", None) or {})
    if not written and not any(file_of(source, name, where) for name in _TOKENIZER_FILES):
        warnings.warn(
            f"{source} has no tokenizer files: prompts and answers must be token ids, or give load_model(..., tokenizer=)",
            stacklevel=5,
        )
        return None
    reason = "its vocabulary is empty"
    folder = as_folder(source)
    if folder is not None and "gguf_file" in where:  # for this file alone transformers looks into no subfolder
        source, where = folder / where.get("subfolder", ""), {**where, "subfolder": ""}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **where)
    except Exception as error:  # whatever a tokenizer's own code raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    else:
        if len(tokenizer) > len(tokenizer.all_special_ids):
            return tokenizer
    raise ModelNotFoundError(
        f"the tokenizer of {source} cannot be built ({reason}); install or add what it lacks, or give "
        "load_model(..., tokenizer=)"
    )


def _reader(config: object) -> Any:
    """transformers' class for a model with a head over the vocabulary: of text, or of text beside pictures or sound.

    The one that the checkpoint was saved from is preferred; text models of vision checkpoints have classes of their own.
    """
    import transformers

    readers = [
        (getattr(transformers, f"AutoModelFor{kind}"), getattr(transformers, f"MODEL_FOR_{mapping}_MAPPING"))
        for kind, mapping in (
            ("CausalLM", "CAUSAL_LM"),
            ("ImageTextToText", "IMAGE_TEXT_TO_TEXT"),
            ("MultimodalLM", "MULTIMODAL_LM"),
        )
    ]
    able = [(auto, mapping[type(config)]) for auto, mapping in readers if type(config) in mapping]
    saved = getattr(config, "architectures", None) or []
    exact = [auto for auto, made in able if getattr(made, "__name__", "") in saved]
    return (exact or [auto for auto, _ in able] or [transformers.AutoModelForCausalLM])[0]


def _read_weights(source: object, reader: Any, options: dict[str, object], allow_missing: bool) -> Any:
    """The module with its weights. Raises ModelNotFoundError where some would be random numbers, unless they may be."""
    from safetensors import SafetensorError

    asked = allow_missing or bool(options.get("ignore_mismatched_sizes"))
    options = {**options, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        loaded: Any = reader.from_pretrained(source, **options)
    except (SafetensorError, pickle.UnpicklingError, struct.error, EOFError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
            raise
        raise ModelNotFoundError(f"the weights of {source} cannot be read: {_first_line(error)}") from error
    hf, info = loaded
    absent = sorted(info["missing_keys"])
    unfit = [f"{name} {tuple(has)}, not {tuple(wants)}" for name, has, wants in sorted(info["mismatched_keys"])]
    if absent or unfit:
        parts = [
            f"{text} {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for text, names in (("missing:", absent), ("of another shape:", unfit))
            if names
        ]
        saved = ", ".join(getattr(hf.config, "architectures", None) or ["an unnamed class"])
        said = f"{source} does not hold all weights of a {type(hf).__name__}: {'; '.join(parts)}"
        if not (allow_missing if absent else asked):
            raise ModelNotFoundError(
                f"{said}. It was saved from {saved}, and transformers would fill the gaps with random numbers: give a "
                "whole checkpoint, or load_model(..., allow_missing=True) to go on with them"
            )
        warnings.warn(f"{said}; they are random numbers", stacklevel=5)
    return hf


def _weightless(source: object, config: Any, tokenizer: object, dtype: object, options: dict[str, object]) -> object:
    """The nnsight model without weights whose requests a server understands."""
    if dtype is not None:
        options = {**options, "dtype": dtype}
    for option in {"subfolder", "gguf_file"} & set(options):
        warnings.warn(
            f"a server knows {source} by its id and revision alone: {option}={options[option]!r} is read here, not there",
            stacklevel=5,
        )
    known = tokenizer or ids_only(int(config.get_text_config().vocab_size))
    parts: dict[str, object] = {"task": "text-generation", "tokenizer": known}
    if _reader(config).__name__ != "AutoModelForCausalLM":
        parts |= {"task": "image-text-to-text", "processor": known}
    nn = wrapped(str(source), **parts, **options)
    # What is left here travels with each request: nothing of it but the trust is a server's business, least of all a token.
    nn.kwargs = {name: value for name, value in nn.kwargs.items() if name == "trust_remote_code"}
    return nn


def wrapped(source: object, **options: object) -> Any:
    """The nnsight model of a module or a name. It makes a pipeline, which lists a hundred classes where ours is none of them."""
    logger = logging.getLogger("transformers.pipelines.base")
    silent, logger.disabled = logger.disabled, True
    try:
        return nnsight.TransformersModel(source, **options)
    finally:
        logger.disabled = silent


def ids_only(vocab_size: int) -> object:
    """A stand-in tokenizer for a model without one; nnsight wants some tokenizer to exist."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<{index}>": index for index in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<0>")), unk_token="<0>", pad_token="<0>"
    )
