"""Experiments of mechanistic interpretability on unmodified HuggingFace models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import tasks
from .edits import Edit
from .effects import Effects
from .metrics import kl, log_prob, logit_diff, prob, rank
from .models.loading import load_model
from .models.model import Model
from .pairs import PromptPairs
from .patching import comprehensive_activation_patching, patch
from .paths import path_patch
from .plan import Plan, features, grid, heads, neurons, sets
from .seeds import set_seed
from .sites import Site
from .views import View

if TYPE_CHECKING:
    from .ablation import ablate
    from .attribution import attribute
    from .circuits import Circuit, attribution_graph, discover, evaluate_circuit, iterative_pruning, run_circuit
    from .collect import collect_activations
    from .corpora import corpus
    from .direct import direct_effects
    from .lens import logit_lens
    from .plots import plot_activation_patching_results, plot_attention, plot_circuit_graph, plot_features
    from .saes import SparseAutoencoder, evaluate_sae, load_sae, save_sae, train_sae
    from .steering import steer, steering_vector
    from .tracing import causal_trace

#: Names that are imported when they are first asked for, and the room that has them: bokeh and networkx are slow to import.
_LATER = {
    "Circuit": ".circuits",
    "SparseAutoencoder": ".saes",
    "ablate": ".ablation",
    "attribute": ".attribution",
    "attribution_graph": ".circuits",
    "causal_trace": ".tracing",
    "collect_activations": ".collect",
    "corpus": ".corpora",
    "direct_effects": ".direct",
    "discover": ".circuits",
    "evaluate_circuit": ".circuits",
    "evaluate_sae": ".saes",
    "iterative_pruning": ".circuits",
    "load_sae": ".saes",
    "logit_lens": ".lens",
    "plot_activation_patching_results": ".plots",
    "plot_attention": ".plots",
    "plot_circuit_graph": ".plots",
    "plot_features": ".plots",
    "run_circuit": ".circuits",
    "save_sae": ".saes",
    "steer": ".steering",
    "steering_vector": ".steering",
    "train_sae": ".saes",
}

__all__ = [
    "Circuit",
    "Edit",
    "Effects",
    "Model",
    "Plan",
    "PromptPairs",
    "Site",
    "SparseAutoencoder",
    "View",
    "ablate",
    "attribute",
    "attribution_graph",
    "causal_trace",
    "collect_activations",
    "comprehensive_activation_patching",
    "corpus",
    "direct_effects",
    "discover",
    "evaluate_circuit",
    "evaluate_sae",
    "features",
    "grid",
    "heads",
    "iterative_pruning",
    "kl",
    "load_model",
    "load_sae",
    "log_prob",
    "logit_diff",
    "logit_lens",
    "neurons",
    "patch",
    "path_patch",
    "plot_activation_patching_results",
    "plot_attention",
    "plot_circuit_graph",
    "plot_features",
    "prob",
    "rank",
    "run_circuit",
    "save_sae",
    "set_seed",
    "sets",
    "steer",
    "steering_vector",
    "tasks",
    "train_sae",
]


#: Rooms that have more than the names above, as `interp.plots.plot_circuit_matrix`.
_ROOMS = ("circuits", "lens", "plots", "saes")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
