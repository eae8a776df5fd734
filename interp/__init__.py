"""Experiments of mechanistic interpretability on unmodified HuggingFace models."""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, tasks
    from .ablation import ablate
    from .attribution import attribute
    from .circuits import Circuit, attribution_graph, discover, evaluate_circuit, iterative_pruning, run_circuit
    from .collect import collect_activations
    from .corpora import corpus
    from .direct import direct_effects
    from .edits import Edit
    from .effects import Effects
    from .lens import logit_lens
    from .metrics import kl, log_prob, logit_diff, prob, rank
    from .models.loading import load_model
    from .models.model import Model
    from .pairs import PromptPairs
    from .patching import comprehensive_activation_patching, patch
    from .paths import path_patch
    from .plan import Plan, features, grid, heads, neurons, sets
    from .plots import (
        plot_activation_patching_results,
        plot_attention,
        plot_circuit_graph,
        plot_direct_effects,
        plot_faithfulness,
        plot_features,
        plot_logit_lens,
        plot_tokens,
    )
    from .reports import report
    from .saes import SparseAutoencoder, evaluate_sae, load_sae, save_sae, train_sae
    from .seeds import set_seed
    from .sites import Site
    from .steering import steer, steering_vector
    from .submitting import Job, jobs, remote_status, submit
    from .tracing import causal_trace
    from .tracking import runs, track_experiment
    from .views import View

#: Public names, and the room that each is imported from when it is first asked for: nothing heavy is imported before.
_LATER = {
    "Circuit": ".circuits",
    "Edit": ".edits",
    "Effects": ".effects",
    "Job": ".submitting",
    "Model": ".models.model",
    "Plan": ".plan",
    "PromptPairs": ".pairs",
    "Site": ".sites",
    "SparseAutoencoder": ".saes",
    "View": ".views",
    "ablate": ".ablation",
    "attribute": ".attribution",
    "attribution_graph": ".circuits",
    "causal_trace": ".tracing",
    "collect_activations": ".collect",
    "comprehensive_activation_patching": ".patching",
    "corpus": ".corpora",
    "direct_effects": ".direct",
    "discover": ".circuits",
    "evaluate_circuit": ".circuits",
    "evaluate_sae": ".saes",
    "features": ".plan",
    "grid": ".plan",
    "heads": ".plan",
    "iterative_pruning": ".circuits",
    "jobs": ".submitting",
    "kl": ".metrics",
    "load_model": ".models.loading",
    "load_sae": ".saes",
    "log_prob": ".metrics",
    "logit_diff": ".metrics",
    "logit_lens": ".lens",
    "neurons": ".plan",
    "patch": ".patching",
    "path_patch": ".paths",
    "plot_activation_patching_results": ".plots",
    "plot_attention": ".plots",
    "plot_circuit_graph": ".plots",
    "plot_direct_effects": ".plots",
    "plot_faithfulness": ".plots",
    "plot_features": ".plots",
    "plot_logit_lens": ".plots",
    "plot_tokens": ".plots",
    "prob": ".metrics",
    "rank": ".metrics",
    "remote_status": ".submitting",
    "report": ".reports",
    "run_circuit": ".circuits",
    "runs": ".tracking",
    "save_sae": ".saes",
    "set_seed": ".seeds",
    "sets": ".plan",
    "steer": ".steering",
    "steering_vector": ".steering",
    "submit": ".submitting",
    "track_experiment": ".tracking",
    "train_sae": ".saes",
}

__all__ = [
    "Circuit",
    "Edit",
    "Effects",
    "Job",
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
    "errors",
    "evaluate_circuit",
    "evaluate_sae",
    "features",
    "grid",
    "heads",
    "iterative_pruning",
    "jobs",
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
    "plot_direct_effects",
    "plot_faithfulness",
    "plot_features",
    "plot_logit_lens",
    "plot_tokens",
    "prob",
    "rank",
    "remote_status",
    "report",
    "run_circuit",
    "runs",
    "save_sae",
    "set_seed",
    "sets",
    "steer",
    "steering_vector",
    "submit",
    "tasks",
    "track_experiment",
    "train_sae",
]


def __getattr__(name: str) -> Any:
    """A public name, or a room: `interp.plots`, `interp.errors`."""
    if name in _LATER:
        value = getattr(import_module(_LATER[name], __name__), name)
    elif name.startswith("_") or find_spec(f"{__name__}.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        value = import_module(f".{name}", __name__)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "circuits", "errors", "lens", "plots", "saes"})
