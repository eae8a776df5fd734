"""Loading: a plain HuggingFace model inside an nnsight model, with the facts and taps of its family."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from ..errors import ArchitectureError
from ..journal import experiment
from .adapters import refuse_more_than_layers, unwrapped
from .bundled import ensure_bundled
from .checkpoints import ids_only, read_checkpoint, wrapped
from .families import FAMILIES, Family, find_family
from .infer import infer_family, placed
from .layout import Envoy, Taps, at, rotates_by_length, sizes
from .model import Model
from .packages import BUNDLED
from .supported import both_ways, refuse_unsupported, without_fused

#: Options that may hold a password: no error repeats them.
SECRETS = ("token", "proxies")


@experiment
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
        model: a hub id, a local folder (of a model, or of a PEFT adapter), a bundled name (`"smollm2-135m"`), or a
            HuggingFace module already in memory, with the adapters that it holds.
        tokenizer: for a module in memory (left out, prompts must be token ids), or in place of the checkpoint's own.
        device: where the weights go; the GPU when there is one and neither this nor `device_map` is given.
        dtype: float type; default fp32 on a CPU, the checkpoint's own elsewhere.
        device_map: passed to accelerate, e.g. `"auto"` to spread layers over several GPUs.
        attn_implementation: `"eager"`, `"sdpa"`, …; default transformers' own choice.
        backend: `"local"`, `"simulated"`, `"ndif"`, or the address of an NDIF deployment of your own.
        prefix: text put before every string prompt; a bundled model brings the one that it needs.
        revision: of a hub model.
        check: run one short forward that checks every read (where the weights are in this process).
        options: `allow_missing=True` goes on, with a warning, where the checkpoint lacks weights and random numbers stand in
            for them; all others are passed to `from_pretrained` (`quantization_config`, …). Those that say where and how to
            read (`token`, `cache_dir`, `subfolder`, `local_files_only`, `trust_remote_code`, …) reach config, tokenizer and
            weights.

    Raises:
        ModelNotFoundError: nothing under that name, or not the whole of a model. ArchitectureError: no row for this
            architecture and none could be inferred, or options that do not go together. AuditError: a traced run does not
            give the plain model's logits, or none can follow the row. BackendError: no such backend, or one that cannot
            hold this model.

    Warns:
        UserWarning: kinds of sites that failed the check, which are refused from then on; no tokenizer; random weights.

    Examples:
        >>> model = interp.load_model("smollm2-135m")  # or "gpt2", a folder, a HuggingFace module in memory
        >>> model.n_layers, model.n_heads, model.d_model
        (30, 9, 576)
    """
    from transformers import ProcessorMixin

    from ..audit import audit, check_reads
    from ..engine.backends import Local, make_backend
    from ..engine.estimate import estimate
    from ..generation import generate
    from ..running import run

    if isinstance(tokenizer, ProcessorMixin):  # of a vision model: it would take a prompt for a picture
        tokenizer = getattr(tokenizer, "tokenizer", None)
    given = {
        "model": model, "tokenizer": tokenizer, "device": device, "dtype": dtype, "device_map": device_map, "backend": backend,
        "attn_implementation": attn_implementation, "prefix": prefix, "revision": revision, "check": check, **options,
    }  # fmt: skip
    name, note, allow_missing = str(model), "", bool(options.pop("allow_missing", False))
    hf: Envoy = model
    source: Any = model
    if isinstance(model, torch.nn.Module):
        told = {"device": device, "dtype": dtype, "device_map": device_map, "attn_implementation": attn_implementation}
        hf = source = unwrapped(model)
        name = _in_memory(hf, told | options)
    elif name in BUNDLED:
        entry = BUNDLED[name]
        prefix = entry.prefix if prefix is None else prefix
        note, source = entry.quantisation, ensure_bundled(name)
    nn: Envoy = None
    commit = ""
    if isinstance(model, torch.nn.Module):
        backend = make_backend(backend, source)
    else:
        told = {"revision": revision, "attn_implementation": attn_implementation}
        options |= {option: value for option, value in told.items() if value is not None}
        for option in {"cache_dir", "offload_folder"} & set(options):  # a worker process has a folder of its own
            options[option] = str(Path(options[option]).expanduser().absolute())
        backend = make_backend(backend, source, options)
        placed = {"device": device, "dtype": dtype, "device_map": device_map}
        hf, tokenizer, commit = read_checkpoint(
            source, tokenizer, not backend.weights_here, allow_missing=allow_missing, options=options, **placed
        )
        if not backend.weights_here:
            nn, hf = hf, hf._module
    if prefix and tokenizer is None:
        raise ArchitectureError(
            f"prefix={prefix!r} needs a tokenizer, and this model has none: load_model(..., tokenizer=)"
        )
    refuse_unsupported(name, hf, backend.weights_here)
    if check and isinstance(model, torch.nn.Module) and hasattr(model, "peft_config") and hf is not model:
        refuse_more_than_layers(model, hf)
    family = _row(name, hf)
    if nn is None:
        known = tokenizer or ids_only(int(hf.config.get_text_config().vocab_size))
        where = {} if getattr(hf, "hf_device_map", None) is not None else {"device": hf.device}  # where it is, it stays
        nn = wrapped(hf, tokenizer=known, task="text-generation", **where)
    taps, revision = make_taps(hf, family), revision or commit
    functions = (audit, generate, run, estimate)
    made = Model(name, hf, nn, tokenizer, family, taps, backend, prefix or "", revision, note, *functions, again(given))
    if check and isinstance(backend, Local):
        check_reads(made)
    return made


def again(given: Mapping[str, object]) -> dict[str, object]:
    """A call of `load_model` that another process can make: no password in it; nothing for a module in memory."""
    model, backend = given["model"], given["backend"]
    if isinstance(model, torch.nn.Module):
        return {}
    folder = Path(str(model)).expanduser()
    named = backend if isinstance(backend, str) else getattr(backend, "host", None) or "ndif"
    kept = {option: value for option, value in given.items() if option not in SECRETS}
    return kept | {"model": str(folder.resolve() if folder.is_dir() else model), "backend": named}


def _in_memory(module: Envoy, asked: dict[str, Any]) -> str:
    """The name of a HuggingFace module that is in memory already; what is asked of it must be what it is."""
    if not hasattr(getattr(module, "config", None), "get_text_config"):
        raise ArchitectureError(
            f"a {type(module).__name__} is no HuggingFace language model: it has no config of transformers that says how it "
            "is built; give a transformers model, a hub id, a folder or a bundled name"
        )
    weight = next(module.parameters())
    own = {
        "device": {str(weight.device), weight.device.type},
        "dtype": {str(weight.dtype), str(weight.dtype).removeprefix("torch."), "auto"},
        "attn_implementation": {str(getattr(module.config, "_attn_implementation", None))},
    }
    for option, value in asked.items():
        if value is not None and str(value) not in own.get(option, ()):
            shown = "…" if option in SECRETS else repr(value)
            raise ArchitectureError(
                f"{option}={shown} does not go with a module in memory, which is used as it is ({weight.dtype} on "
                f"{weight.device}): change the module before (.to(...), from_pretrained(...)), or give its folder or hub id"
            )
    return getattr(module.config, "name_or_path", "") or type(module).__name__


def _row(name: str, hf: Envoy) -> Family:
    """The row of the table for this architecture, or one inferred from the names of its modules."""
    config = hf.config.get_text_config()
    row = find_family(config.model_type) or infer_family(hf)
    if row is None and _masked(hf):
        raise ArchitectureError(both_ways(name, type(hf).__name__))
    if row is None:
        known = ", ".join(sorted(kind for family in FAMILIES for kind in family.model_types))
        raise ArchitectureError(
            f"{name} is of architecture {config.model_type!r}, which has no row in interp/models/families.py, and its "
            f"modules resemble none that has. Known: {known}. Add a row (paths of its taps, in forward order), then "
            "run `python -m interp.audit` on the model: it tells which taps are right."
        )
    row = placed(row.for_config(config), hf)
    if row.unsupported:
        raise ArchitectureError(f"{name} is a variant of {row.name} that cannot be used: {row.unsupported}")
    return without_fused(row, getattr(config, "_attn_implementation", None))


def _masked(hf: Envoy) -> bool:
    """Whether this is a model that fills masks, used as such: an encoder, though transformers may call it a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return hf.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(hf.config, "is_decoder", False)


def factor(config: Envoy, name: str) -> float:
    """What a configuration multiplies with under a name such as "logit_scale" or "1/logits_scaling"; 1 for none."""
    value = getattr(config, name.removeprefix("1/"), None) if name else None
    number = 1.0 if value is None else float(value)
    return 1 / number if name.startswith("1/") else number


def make_taps(hf: Envoy, family: Family) -> Taps:
    """The facts of one model as a plain dictionary: sizes read off its modules, paths from its family's row.

    Raises:
        ArchitectureError: a path of the row that this model does not have, or an unsupported variant.
    """
    config = hf.config.get_text_config()
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
    taps: Any = {item.name: getattr(family, item.name) for item in fields(family)}
    for unneeded in ("model_types", "variants", "note", "missing", "unsupported"):
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
        branch=factor(config, family.branch),
        logit_scale=factor(config, family.logit_scale),
    )
    return taps
