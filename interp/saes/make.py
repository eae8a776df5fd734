"""`SparseAutoencoder`: a dictionary of SAELens to train, by the name of its architecture."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NamedTuple

import torch

from ..errors import PlanError
from ..models.model import Model
from ..sites import Site
from .library import Dictionary, sae_lens, whole

#: What says how sparse architectures are whose active features are counted.
COUNTED = "k"


class Architecture(NamedTuple):
    """Which classes of SAELens an architecture is, and what says how sparse it is, with its default."""

    name: str  # of its classes, before "TrainingSAE" and "TrainingSAEConfig"
    sparsity: str  # "k", or the coefficient of its penalty
    default: float


#: What `SparseAutoencoder` makes. Coefficients are for inputs scaled to a mean norm of √d_in, as the trainer scales them.
ARCHITECTURES = {
    "topk": Architecture("TopK", "k", 32),
    "batchtopk": Architecture("BatchTopK", "k", 32),
    "matryoshka": Architecture("MatryoshkaBatchTopK", "k", 32),
    "gated": Architecture("Gated", "l1_coefficient", 5.0),
    "standard": Architecture("Standard", "l1_coefficient", 5.0),
    "jumprelu": Architecture("JumpReLU", "l0_coefficient", 1.0),
    "transcoder": Architecture("", "k", 32),
}
#: How inputs are scaled while a dictionary is trained; what is folded into the weights afterwards.
SCALED = "expected_average_only_in"


def SparseAutoencoder(
    model: Model | None = None,
    site: str | Site | None = None,
    architecture: str | None = None,
    *,
    d_model: int | None = None,
    d_hidden: int | None = None,
    d_sae: int | None = None,
    k: int | None = None,
    sparsity_coef: float | None = None,
    **options: Any,
) -> Dictionary:
    """A dictionary to train: a `TrainingSAE` of SAELens, nothing of ours.

    Args:
        model, site: where it belongs, e.g. "L8.resid_post"; its width is that of the site, and it is saved with both.
            A "transcoder" reads what the MLP of the layer receives, and writes `mlp_out`.
        architecture: "topk" (Gao et al. 2024; the default with a model), "batchtopk" (Bussmann et al. 2024), "matryoshka"
            (Bussmann et al. 2025), "gated" and "jumprelu" (Rajamanoharan et al. 2024), "standard" (ReLU and L1, the default
            without a model), "transcoder" (Dunefsky et al. 2024). jumprelu needs far more tokens than the others.
        d_model: its width, where no model is given.
        d_sae, d_hidden: how many features; 4 × the width by default.
        k: features of a token that are active, where that is chosen (32 by default).
        sparsity_coef: the coefficient of the penalty, where there is one.
        options: of SAELens's configuration of that architecture. Weights are drawn from torch's generator (`set_seed`).

    Raises:
        PlanError: an unknown architecture, sizes that cannot be, or options that do not go together. TypeError: an option
            that the architecture does not have.

    Examples:
        >>> sae = interp.SparseAutoencoder(model, "L8.resid_post", d_sae=128, k=8)
        >>> sae.cfg.d_in, sae.cfg.d_sae
        (576, 128)
    """
    name = architecture or ("standard" if model is None or sparsity_coef is not None else "topk")
    if name not in ARCHITECTURES:
        raise PlanError(f"unknown architecture {name!r}; they are: {', '.join(ARCHITECTURES)}")
    given_sizes = {"d_model": d_model, "d_sae": d_sae, "d_hidden": d_hidden, "k": k}
    d_model, d_sae, d_hidden, k = (None if n is None else whole(n, key) for key, n in given_sizes.items())
    at, d_in, facts = place_of(model, site, d_model, name)
    if d_sae is not None and d_hidden is not None and d_sae != d_hidden:
        raise PlanError(f"d_sae={d_sae} and d_hidden={d_hidden} are the same number; give one of them")
    size = d_sae or d_hidden or 4 * d_in
    given = settings(name, size, k, sparsity_coef, options)
    if name == "transcoder":
        from .transcoder import make

        made: Dictionary = make(d_in=d_in, d_sae=size, **{"d_out": d_in, **given})
    else:
        sae_lens()
        import sae_lens.saes as forms

        prefix = ARCHITECTURES[name].name
        config = getattr(forms, f"{prefix}TrainingSAEConfig")
        known = [part.name for part in fields(config)]
        if unknown := [option for option in given if option not in known]:
            raise TypeError(f"{name} dictionaries have no option {unknown[0]!r}; they have {', '.join(known)}")
        made = getattr(forms, f"{prefix}TrainingSAE")(config(d_in=d_in, d_sae=size, **given))
    if at is not None:
        facts |= {"site": str(at)} if name != "transcoder" else {"site": f"L{at.layer}.mlp_in", "site_out": str(at)}
    for key, value in facts.items():
        made.cfg.metadata[key] = value
    return made


def place_of(
    model: Model | None, site: str | Site | None, d_model: int | None, name: str
) -> tuple[Site | None, int, dict[str, str]]:
    """(site, width, what is saved of the model) of a dictionary.

    Raises:
        PlanError: no width, or a width that is not the site's. SiteError: a site that the model does not have.
    """
    at = None if site is None else Site.parse(site)
    if model is None:
        if d_model is None or d_model < 1:
            raise PlanError("SparseAutoencoder needs a model and a site, or d_model=")
        return at, d_model, {}
    if at is None:
        raise PlanError("SparseAutoencoder was given a model and no site; give e.g. 'L8.resid_post'")
    if name == "transcoder" and at != Site("mlp_out", layer=at.layer):
        raise PlanError(f"a transcoder stands for an MLP: give 'L{at.layer or 0}.mlp_out', not {site!r}")
    at = model.require(at)
    width = model.width_of(at)
    if d_model is not None and d_model != width:
        raise PlanError(f"d_model={d_model}, but {at} of {model.name} has {width} numbers; leave d_model out")
    return at, width, {"model_name": model.name, "revision": model.revision}


def settings(name: str, size: int, k: int | None, coefficient: float | None, options: dict[str, Any]) -> dict[str, Any]:
    """The options of SAELens's configuration.

    Raises:
        PlanError: what cannot be, or does not belong to the architecture.
    """
    sparsity, default = ARCHITECTURES[name].sparsity, ARCHITECTURES[name].default
    if size < 1:
        raise PlanError(f"d_sae={size}: a dictionary has 1 feature or more")
    if (k is not None) > (sparsity == COUNTED):
        raise PlanError(f"k={k} is of no use to {name!r}; its sparsity is set by sparsity_coef= ({sparsity})")
    if (coefficient is not None) > (sparsity != COUNTED):
        raise PlanError(f"sparsity_coef={coefficient} is of no use to {name!r}; its sparsity is set by k=")
    value = k if k is not None else coefficient if coefficient is not None else default
    if sparsity == COUNTED and not 1 <= value <= size:
        raise PlanError(f"k={value} active features of d_sae={size}: k is 1 to d_sae")
    if not value >= 0:
        raise PlanError(f"sparsity_coef={value}: it is 0 or more")
    value = int(value) if sparsity == COUNTED else float(value)
    made = {"normalize_activations": SCALED, sparsity: value, **options}
    if sparsity == COUNTED and made["normalize_activations"] in ("layer_norm", "constant_norm_rescale"):
        raise PlanError(
            f"normalize_activations={made['normalize_activations']!r} with {name!r}: its loss for dead features is not "
            f"defined then; leave it at {SCALED!r}, or take 'standard', 'gated' or 'jumprelu'"
        )
    if made["normalize_activations"] == "covariance_whitening":
        raise PlanError(
            "normalize_activations='covariance_whitening' is SAELens's own trainer's; here it is 'none' or scaled"
        )
    if name == "matryoshka" and "matryoshka_widths" not in made:
        made["matryoshka_widths"] = sorted({max(1, size // 8), max(1, size // 2), size})
    if isinstance(made.get("dtype"), torch.dtype):
        made["dtype"] = str(made["dtype"]).removeprefix("torch.")
    return made
