"""A dictionary as a view: its features at the site that it was trained on, written as x + D(f' − f).

1. `inference` gives the form that encodes each token by itself: a threshold takes the place of a batch's top k.
2. `site_of` says which site that is: the saved one, or the one that the name of its hook means.
3. `view_of` makes the view of SAELens's weights; `error_view` that of what the dictionary does not explain.
"""

from __future__ import annotations

import copy
import re
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..errors import PlanError, SiteError
from ..sites import Site
from ..views import View
from .library import Dictionary, checked, is_training, is_transcoder, sae_lens
from .readers import FORMS, NORMS, read_error, read_features

#: Architectures whose training form chooses features over a whole batch, so that it says nothing of one token.
OVER_BATCHES = ("batchtopk", "matryoshka_batchtopk", "batchtopk_transcoder")
#: Which form of `readers` an architecture has in use.
FORM = {
    "standard": "relu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu": "jumprelu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "gated": "gated",
    "topk": "topk",
}
#: Modules of a HuggingFace block, by the end of their path, whose output is a site.
MODULES = {"": "resid_post", "mlp": "mlp_out", "self_attn": "attn_out", "attn": "attn_out", "attention": "attn_out"}
_HF = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.(\w+))?$")


def inference(sae: Dictionary) -> Dictionary:
    """The form in which a dictionary is used, without a change of what it computes; the same object where it is in it.

    Raises:
        PlanError: one that is in training, or whose features depend on the batch for want of a threshold.
    """
    if not is_training(checked(sae)):
        return sae
    name = sae.cfg.architecture()
    if name in OVER_BATCHES and not float(sae.state_dict()["topk_threshold"]):
        raise PlanError(
            f"this {name} dictionary has no threshold yet, so its features are not those of a token: train_sae "
            "calibrates it; or load one that was trained"
        )
    if sae.cfg.normalize_activations == "expected_average_only_in":
        raise PlanError(
            f"this {name} dictionary is in training: its inputs are scaled by what the trainer measures; "
            "train_sae(sae, …) folds that into the weights"
        )
    config = sae.cfg.get_inference_sae_cfg_dict()
    state = {key: value.detach().clone() for key, value in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    made: Dictionary = sae_lens().SAE.from_dict(copy.deepcopy(config))
    made.load_state_dict(state)
    return made


def site_of(sae: Dictionary) -> Site:
    """The site whose activation a dictionary reads.

    Raises:
        PlanError: it says nothing of it, or names what is no site here.
    """
    metadata = checked(sae).cfg.metadata
    for name in filter(None, (metadata.get("site"), metadata.get("hf_hook_name"), metadata.get("hook_name"))):
        if (found := named_site(str(name))) is not None:
            return found
    named = metadata.get("hook_name")
    what = f"its hook {named!r} is no site here" if named else "it does not say where it belongs"
    raise PlanError(f"{describe(sae)}: {what}; give the site, e.g. site='L8.resid_post'")


def named_site(name: str) -> Site | None:
    """The site that the name of a hook means: a site's own text, TransformerLens's, or the path of a module."""
    try:
        return Site.parse(name)
    except SiteError:
        match = _HF.search(name)
    if match and (match[2] or "") in MODULES:
        return Site(MODULES[match[2] or ""], layer=int(match[1]))
    return None


def describe(sae: Dictionary) -> str:
    """A dictionary in messages."""
    what = "" if is_transcoder(sae) else " dictionary"
    return f"the {sae.cfg.architecture()}{what} of {sae.cfg.d_sae} features over {sae.cfg.d_in} numbers"


#: The views of dictionaries that are alive, by site and name, for the weights that they had.
_VIEWS: WeakKeyDictionary[Dictionary, dict[tuple[str, str], tuple[object, View]]] = WeakKeyDictionary()


def state_of(sae: Dictionary) -> object:
    """What changes when a dictionary does: it may be trained on, or its weights exchanged, after a view of it was made."""
    weights = sae.state_dict().items()
    return (
        sae.cfg.normalize_activations,
        *((name, value.data_ptr(), value._version, float(value.detach().double().sum())) for name, value in weights),
    )


def name_at(site: Site, what: str = "sae") -> str:
    """What a dictionary's view is called, apart from those at other sites: "sae8", "sae8_mlp_out"."""
    return f"{what}{site.layer}" + ("" if site.kind == MODULES[""] else f"_{site.kind}")


def view_of(sae: Dictionary, site: str | Site | None = None, name: str | None = None) -> View:
    """The features of a dictionary as a view: `view.site(unit=5)` is one of them, "L8.sae8[5]".

    What is read is f, what the dictionary's own encoder makes of a token; where it scales each token by its norm
    ("layer_norm"), f in units of the activation, so that D times it is what is added. A write adds D(f' − f): what the
    dictionary does not explain stays. One dictionary has one view as long as its weights stay, so that sites of it are equal.

    Raises:
        PlanError: a transcoder (it reads one site and writes another), or a dictionary whose site is not known.
    """
    if is_transcoder(checked(sae)):
        raise PlanError(f"{describe(sae)} writes another site than it reads; use interp.attribution_graph")
    at = site_of(sae) if site is None else Site.parse(site)
    name = name or name_at(at)
    made, state = _VIEWS.setdefault(sae, {}), state_of(sae)
    known, view = made.get((str(at), name), (None, None))
    if view is None or known != state:
        used = inference(sae)
        tensors, by_part = tensors_of(used)
        view = View(name, at, used.cfg.d_sae, read_features, decoder=decoder_of(used), tensors=tensors, by_part=by_part)
        made[str(at), name] = (state, view)
    return view


def error_view(sae: Dictionary, site: str | Site | None = None) -> View:
    """What a dictionary does not explain, x − x̂, as a view of `d_in` parts: set to 0 it leaves the reconstruction.

    Raises:
        PlanError: as `view_of`.
    """
    used = inference(sae)
    at = site_of(sae) if site is None else Site.parse(site)
    tensors = {**tensors_of(used)[0], "features": decoder_of(used), "offset": used.b_dec.detach().float()}
    return View(name_at(at, "error"), at, used.cfg.d_in, read_error, decoder=torch.eye(used.cfg.d_in), tensors=tensors)


def centred(sae: Dictionary) -> bool:
    """Whether it was trained on a model whose writing weights TransformerLens had centred: it reads activations without their
    mean over features."""
    options = sae.cfg.metadata.get("model_from_pretrained_kwargs") or {}
    return bool(options.get("center_writing_weights"))


def decoder_of(sae: Dictionary) -> Tensor:
    """D `[feature, d_out]` in fp32: what a feature of activation 1 adds."""
    decoder = sae.W_dec.detach().float()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        decoder = decoder / decoder.norm(dim=-1, keepdim=True)
    return decoder


def tensors_of(sae: Dictionary) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What `readers` needs of a dictionary in use, in fp32, and which of it has a row for each feature.

    Raises:
        PlanError: an architecture or a norm whose features are no function of one token here.
    """
    architecture, norm = sae.cfg.architecture(), sae.cfg.normalize_activations
    if architecture not in FORM or norm not in NORMS:
        raise PlanError(
            f"{describe(sae)}, normalize_activations={norm!r}: its features are no sites here; architectures that are: "
            f"{', '.join(FORM)}, with the norms {', '.join(NORMS)}"
        )
    form = FORM[architecture]
    state = {key: value.detach().float() for key, value in sae.state_dict().items()}
    from_bias = bool(getattr(sae.cfg, "apply_b_dec_to_input", False)) and not is_transcoder(sae)
    tensors = {
        "form": torch.tensor(FORMS.index(form)),
        "norm": torch.tensor(NORMS.index(norm)),
        "centred": torch.tensor(int(centred(sae))),
        "encoder": state["W_enc"].T.contiguous(),
        "center": state["b_dec"] if from_bias else state["W_enc"].new_zeros(sae.cfg.d_in),
        "bias": state["b_gate" if form == "gated" else "b_enc"],
    }
    if form == "gated":
        tensors |= {"gain": state["r_mag"].exp(), "shift": state["b_mag"]}
        return tensors, ("encoder", "bias", "gain", "shift")
    if form == "jumprelu":
        return {**tensors, "threshold": state["threshold"]}, ("encoder", "bias", "threshold")
    if form == "relu":
        return tensors, ("encoder", "bias")
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        length = state["W_dec"].norm(dim=-1)
        tensors |= {"encoder": tensors["encoder"] * length.unsqueeze(-1), "bias": tensors["bias"] * length}
    return {**tensors, "k": torch.tensor(int(getattr(sae.cfg, "k", 0)))}, ()
