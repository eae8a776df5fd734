"""Experiments of mechanistic interpretability on unmodified HuggingFace models."""

from . import tasks
from .effects import Effects
from .metrics import kl, log_prob, logit_diff, prob, prob_diff, rank
from .models.model import Model, load_model
from .pairs import PromptPairs
from .patching import comprehensive_activation_patching, patch
from .plan import Plan, grid, heads, neurons, sets
from .seeds import set_seed
from .sites import Site

__all__ = [
    "Effects",
    "Model",
    "Plan",
    "PromptPairs",
    "Site",
    "comprehensive_activation_patching",
    "grid",
    "heads",
    "kl",
    "load_model",
    "log_prob",
    "logit_diff",
    "neurons",
    "patch",
    "prob",
    "prob_diff",
    "rank",
    "set_seed",
    "sets",
    "tasks",
]
