"""Loading: a plain HuggingFace model inside an nnsight model, with the facts and taps of its family."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import nnsight
import torch

from ..errors import ArchitectureError, ModelNotFoundError
from .bundled import ensure_bundled
from .families import FAMILIES, Family, find_family
from .infer import infer_family
from .model import Model
from .packages import BUNDLED
from .views import at, rotates_by_length, sizes

#: How transformers says that a folder's architecture is not one that it can load as a language model.
UNKNOWN_ARCHITECTURE = ("not recognize this architecture", "Unrecognized configuration class", "Unrecognized model")


def load_model(
    model: str | os.PathLike[str] | torch.nn.Module,
    tokenizer: Any = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    backend: Any = "local",
    prefix: str | None = None,
    revision: str | None = None,
    check: bool = True,
    **options: Any,
) -> Model:
    """Load a causal language model as it is, for experiments.

    Args:
        model: a hub id, a local folder, a bundled name (`"smollm2-135m"`), or a HuggingFace module already in memory.
        tokenizer: for a module in memory (left out, prompts must be token ids), or in place of the checkpoint's own.
        device: where the weights go; the GPU when there is one and neither this nor `device_map` is given.
        dtype: float type; default fp32 on a CPU, the checkpoint's own elsewhere.
        device_map: passed to accelerate, e.g. `"auto"` to spread layers over several GPUs.
        attn_implementation: `"eager"`, `"sdpa"`, …; default transformers' own choice.
        backend: `"local"`, `"simulated"`, `"ndif"`, or the address of an NDIF deployment of your own.
        prefix: text put before every string prompt; a bundled model brings the one that it needs.
        revision: of a hub model.
        check: run one short forward that checks every read (where the weights are in this process).
        options: passed to `from_pretrained` (`quantization_config`, `trust_remote_code`, …).

    Raises:
        ModelNotFoundError: nothing under that name. ArchitectureError: no row for this architecture and none could be
            inferred, or options that do not go together. AuditError: a traced run does not give the plain model's logits, or
            none can follow the row. BackendError: no such backend, or one that cannot hold this model.

    Warns:
        UserWarning: kinds of sites that failed the check; they are refused from then on.
    """
    from ..engine.backends import Local, make_backend

    name, note = str(model), ""
    hf: Any = model
    source: Any = model
    if isinstance(model, torch.nn.Module):
        told = {"device": device, "dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        name = _in_memory(model, told | options)
        if prefix and tokenizer is None:
            raise ArchitectureError(
                f"prefix={prefix!r} needs the module's tokenizer: load_model(module, tokenizer=...)"
            )
    elif name in BUNDLED:
        entry = BUNDLED[name]
        prefix = entry.prefix if prefix is None else prefix
        note, source = entry.quantisation, ensure_bundled(name)
    backend = make_backend(backend, source)
    nn: Any = None
    if not isinstance(model, torch.nn.Module):
        remote = not backend.weights_here
        hf, tokenizer = _from_pretrained(
            source, tokenizer, remote, device, dtype, device_map, attn_implementation, revision, options
        )
        if remote:
            nn, hf = hf, hf._module
    hf.eval()
    family = _row(name, hf).for_config(hf.config)
    if nn is None:
        known = tokenizer or _ids_only(int(hf.config.get_text_config().vocab_size))
        nn = nnsight.TransformersModel(hf, tokenizer=known, task="text-generation")
    loaded = Model(
        name=name,
        hf=hf,
        nn=nn,
        tokenizer=tokenizer,
        family=family,
        taps=make_taps(hf, family),
        backend=backend,
        prefix=prefix or "",
        revision=revision or getattr(hf.config, "_commit_hash", None) or "",
        note=note,
    )
    if check and isinstance(backend, Local):
        from ..audit import check_reads

        check_reads(loaded)
    return loaded


def _in_memory(module: Any, asked: dict[str, Any]) -> str:
    """The name of a HuggingFace module that is in memory already; what is asked of it must be what it is."""
    if not hasattr(module, "config"):
        raise ArchitectureError(
            f"a {type(module).__name__} is no HuggingFace language model: it has no config that says how it is built; "
            "give a transformers model, a hub id, a folder or a bundled name"
        )
    weight = next(module.parameters())
    own = {
        "device": {str(weight.device), weight.device.type},
        "dtype": {str(weight.dtype), str(weight.dtype).removeprefix("torch."), "auto"},
        "attn_implementation": {str(getattr(module.config, "_attn_implementation", None))},
    }
    for option, value in asked.items():
        if value is not None and str(value) not in own.get(option, ()):
            raise ArchitectureError(
                f"{option}={value!r} does not go with a module in memory, which is used as it is ({weight.dtype} on "
                f"{weight.device}): change the module before (.to(...), from_pretrained(...)), or give its folder or hub id"
            )
    return getattr(module.config, "name_or_path", "") or type(module).__name__


def _row(name: str, hf: Any) -> Family:
    """The row of the table for this architecture, or one inferred from the names of its modules."""
    row = find_family(hf.config.model_type) or infer_family(hf)
    if row is None:
        known = ", ".join(sorted(kind for family in FAMILIES for kind in family.model_types))
        raise ArchitectureError(
            f"{name} is of architecture {hf.config.model_type!r}, which has no row in interp/models/families.py, and its "
            f"modules resemble none that has. Known: {known}. Add a row (paths of its taps, in forward order), then "
            "run `python -m interp.audit` on the model: it tells which taps are right."
        )
    return row


def make_taps(hf: Any, family: Family) -> dict[str, Any]:
    """The facts of one model as a plain dictionary: sizes read off its modules, paths from its family's row.

    Raises:
        ArchitectureError: a path of the row that this model does not have, or an unsupported variant.
    """
    config = hf.config.get_text_config()
    if getattr(config, "do_layer_norm_before", True) is False:
        raise ArchitectureError(
            f"{config.model_type} with do_layer_norm_before=False normalises the stream itself after each block, "
            "so it has no residual stream to patch; use a pre-norm checkpoint"
        )
    try:
        block = at(hf, family.layers)[0]
        n_layers = len(at(hf, family.layers))
        for path in filter(None, (family.embed, family.norm, family.head)):
            at(hf, path)
        embed = at(hf, family.embed)
        d_vocab = int(embed.num_embeddings if hasattr(embed, "num_embeddings") else embed.weight.shape[0])
        for path in filter(None, (*family.qkv, family.o, family.mlp, family.down, family.norm1, family.norm2)):
            at(block, path)
    except (AttributeError, IndexError) as error:
        raise ArchitectureError(
            f"{type(hf).__name__} does not have the modules that the row {family.name!r} names: {error}; "
            "correct the row in interp/models/families.py"
        ) from error
    n_heads = int(config.num_attention_heads)
    d_model, width = sizes(at(block, family.o))
    if family.qkv_layout == "separate":
        n_kv = sizes(at(block, family.qkv[1]))[0] * n_heads // width
    elif family.qkv_layout == "interleaved":
        n_kv = n_heads
    else:
        total, _ = sizes(at(block, family.qkv[0]))
        n_kv = (total - width) * n_heads // (2 * width)
    taps: dict[str, Any] = {item.name: getattr(family, item.name) for item in fields(family)}
    for unneeded in ("model_types", "variants", "note", "missing"):
        del taps[unneeded]
    taps.update(
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=int(n_kv),
        d_model=int(d_model),
        d_head=int(width) // n_heads,
        d_mlp=sizes(at(block, family.down))[1] if family.down else None,
        d_vocab=d_vocab,
        attention=getattr(config, "_attn_implementation", None),
        rotary=tuple(name for name, module in hf.named_modules() if rotates_by_length(module)),
        branch=family.number(config, family.branch),
        logit_scale=family.number(config, family.logit_scale),
    )
    return taps


def _from_pretrained(
    source: Any,
    tokenizer: Any,
    remote: bool,
    device: Any,
    dtype: Any,
    device_map: Any,
    attn_implementation: str | None,
    revision: str | None,
    options: dict[str, Any],
) -> tuple[Any, Any]:
    """The HuggingFace model, or when remote a weightless nnsight model that servers know, and the tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if isinstance(source, os.PathLike) or os.sep in str(source)[:1] or str(source).startswith((".", "~")):
        source = Path(source).expanduser()
        if not (source / "config.json").is_file():
            raise ModelNotFoundError(
                f"{source} is not a model folder (no config.json); give a folder written by save_pretrained, a hub "
                f"id, or a bundled name: {', '.join(BUNDLED)}"
            )
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ArchitectureError(f"dtype={dtype!r} is no type of torch; use 'float32', 'bfloat16', 'auto', …")
    common = {} if revision is None else {"revision": revision}
    if attn_implementation is not None:
        options = {**options, "attn_implementation": attn_implementation}
    try:  # an unknown architecture is told before its tokenizer or weights are looked for
        asked = {name: options[name] for name in ("trust_remote_code", "gguf_file") if name in options}
        AutoConfig.from_pretrained(source, **common, **asked)
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(source, **common)
        if remote:
            if dtype is not None:
                options = {**options, "dtype": dtype}
            nn = nnsight.TransformersModel(
                str(source), task="text-generation", tokenizer=tokenizer, **common, **options
            )
            return nn, tokenizer
        if device is None and device_map is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype is None:
            dtype = torch.float32 if str(device) == "cpu" and "quantization_config" not in options else "auto"
        hf = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, device_map=device_map, **common, **options)
        return hf if device_map is not None else hf.to(device), tokenizer
    except ValueError as error:
        if not any(text in str(error) for text in UNKNOWN_ARCHITECTURE):
            raise
        raise ArchitectureError(
            f"{source} holds no causal language model that transformers knows: {str(error).splitlines()[0]}"
        ) from error
    except OSError as error:
        raise ModelNotFoundError(
            f"no model {str(source)!r}: not a local folder, not a bundled name ({', '.join(BUNDLED)}), and the hub "
            f"could not give it ({str(error).splitlines()[0]})"
        ) from error


def _ids_only(vocab_size: int) -> Any:
    """A stand-in tokenizer for a module given without one; nnsight wants some tokenizer to exist."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocab = {f"<{index}>": index for index in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="<0>")), unk_token="<0>", pad_token="<0>"
    )
