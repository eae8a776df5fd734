"""Dictionaries on disk, in SAELens's own folders, and its pretrained releases."""

from __future__ import annotations

import json
import secrets
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, PlanError
from ..files import path_of
from ..models.model import Model
from ..sites import KIND, Site
from .library import Dictionary, is_training, is_transcoder, sae_lens
from .views import OVER_BATCHES, centred, describe, inference, named_site, site_of

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"


def save_sae(sae: Dictionary, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a dictionary as SAELens reads it, `SAE.load_from_disk(folder)`: whole or not at all.

    Args:
        sae: trained, or in the form that is used.
        metadata: more to keep with it, as plain data; a "layer" and a "component", or a "site", say where it belongs.

    Returns:
        The folder.

    Raises:
        PlanError: a dictionary that is in training, or metadata that is no plain data. CheckpointError: it cannot be written,
            or the folder holds something else.

    Examples:
        >>> sorted(file.name for file in interp.save_sae(sae, "sae").iterdir())
        ['cfg.json', 'sae_weights.safetensors']
    """
    place = path_of(folder, CheckpointError, "folder")
    if place.exists() and any(place.iterdir() if place.is_dir() else [place]) and not (place / CONFIG).exists():
        raise CheckpointError(f"{place} is there and holds no dictionary; give another folder")
    inference(sae)  # refuses one that is in training
    for key, value in added(sae, dict(metadata or {})).items():
        sae.cfg.metadata[key] = value
    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        write = getattr(sae, "save_inference_model" if is_training(sae) else "save_model")
        write(temporary)
        if place.exists():  # folders are not exchanged in one step: the old one steps aside
            old = place.with_name(f".{place.name}.{secrets.token_hex(4)}.old")
            place.rename(old)
            temporary.rename(place)
            shutil.rmtree(old)
        else:
            temporary.rename(place)
    except OSError as error:
        raise CheckpointError(f"cannot write the dictionary to {place}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def added(sae: Dictionary, metadata: dict[str, Any]) -> dict[str, Any]:
    """What is saved of where a dictionary belongs, by our names and by SAELens's. PlanError: no plain data."""
    try:
        json.dumps(metadata)
    except TypeError as error:
        raise PlanError(f"metadata is plain data (numbers, text, lists, dictionaries): {error}") from None
    if "site" not in metadata and {"layer", "component"} <= set(metadata):
        metadata["site"] = str(Site(metadata["component"], layer=metadata["layer"]))
    known = metadata.get("site") or sae.cfg.metadata.get("site")
    if known:
        site = Site.parse(str(known))
        metadata["site"] = str(site)
        hook = KIND[site.kind].hook
        if is_transcoder(sae):
            metadata["hook_name_out"] = f"blocks.{site.layer}.hook_mlp_out"
            hook = "ln2.hook_normalized"  # what SAELens's own transcoders call an MLP's input
        if hook and not sae.cfg.metadata.get("hook_name"):
            metadata["hook_name"] = f"blocks.{site.layer}.{hook}"
    return metadata


def load_sae(name: str | Path, model: Model | None = None) -> Dictionary:
    """A dictionary in the form that is used: from a folder of SAELens, or a pretrained release as "release/id".

    Args:
        model: refuse one that does not fit it.

    Returns:
        A SAELens object, whose site is known where its hook's name means one (`interp.saes.site_of`).

    Raises:
        CheckpointError: nothing there, a folder that is damaged, or one of a dictionary in training. PlanError: it does not
            fit the model.

    Warns:
        UserWarning: its activations were those of a model whose weights TransformerLens had changed.

    Examples:
        >>> folder = interp.save_sae(sae, "sae")
        >>> str(interp.saes.site_of(interp.load_sae(folder, model)))
        'L8.resid_post'
    """
    place = path_of(name, CheckpointError, "name")
    made = from_folder(place) if place.is_dir() else from_release(str(name))
    metadata = made.cfg.metadata
    if not metadata.get("site"):
        hooks = (metadata.get("hf_hook_name"), metadata.get("hook_name"))
        if found := next(filter(None, (named_site(str(hook)) for hook in hooks if hook)), None):
            metadata["site"] = str(found)
    if is_transcoder(made) and (match := named_site(str(metadata.get("hook_name_out") or ""))):
        metadata["site"], metadata["site_out"] = f"L{match.layer}.mlp_in", f"L{match.layer}.mlp_out"
    if centred(made):
        warnings.warn(
            f"{name} was trained on a model whose writing weights TransformerLens had centred: on the plain model the mean of "
            "each token's activation is taken off before it is encoded",
            stacklevel=2,
        )
    if model is not None:
        fits(made, model)
    return made


def from_folder(place: Path) -> Dictionary:
    """A folder that SAELens or `save_sae` wrote. CheckpointError: it is not, or is damaged, or is of one in training."""
    for file in (CONFIG, WEIGHTS):
        if not (place / file).exists():
            raise CheckpointError(f"{place} is no folder of a dictionary: it has no {file}")
    try:
        config = json.loads((place / CONFIG).read_text())
        architecture = str(config.get("architecture", "standard"))
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{place / CONFIG} cannot be read: {error}; it is damaged, copy it again") from error
    if architecture in OVER_BATCHES or config.get("normalize_activations") == "expected_average_only_in":
        raise CheckpointError(
            f"{place} holds a {architecture} dictionary in the form that is trained: interp.save_sae, or SAELens's "
            "save_inference_model, writes the form that is used"
        )
    try:
        made: Dictionary = sae_lens().SAE.load_from_disk(str(place))
    except Exception as error:
        raise CheckpointError(
            f"{place} cannot be loaded as a {architecture} dictionary ({type(error).__name__}: {error}); if its weights are "
            "damaged, copy them again"
        ) from error
    return made


def from_release(name: str) -> Dictionary:
    """One of SAELens's pretrained releases, "release/id". CheckpointError: no folder and no release of that name."""
    release, _, own = name.partition("/")
    known = sae_lens().loading.pretrained_saes_directory.get_pretrained_saes_directory()
    if release not in known or not own:
        near = [one for one in known if name.split("/")[0][:8].lower() in one.lower()][:5]
        hint = f"; releases like it: {', '.join(near)}" if near else ""
        raise CheckpointError(
            f"{name!r} is no folder, and no pretrained dictionary of SAELens as 'release/id' ({len(known)} releases){hint}"
        )
    ids = known[release].saes_map
    if own not in ids:
        shown = ", ".join(list(ids)[:5])
        raise CheckpointError(f"release {release!r} has no {own!r}; it has {len(ids)}, such as {shown}")
    try:
        made: Dictionary = sae_lens().SAE.from_pretrained(release, own)
    except Exception as error:
        raise CheckpointError(
            f"{name} cannot be fetched ({type(error).__name__}: {error}); it comes from a model hub: without one, give the "
            "folder of a copy"
        ) from error
    return made


def fits(sae: Dictionary, model: Model) -> None:
    """Refuse a dictionary of another model. PlanError: its width, or its site, is not the model's."""
    site = Site("mlp_in", layer=site_of(sae).layer) if is_transcoder(sae) else site_of(sae)
    width = model.width_of(model.require(site))
    if width != sae.cfg.d_in:
        trained = sae.cfg.metadata.get("model_name")
        raise PlanError(
            f"{describe(sae)} (of {trained or 'another model'}) does not fit {site} of {model.name}, which has {width} numbers"
        )
