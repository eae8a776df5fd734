"""Pictures: standalone Bokeh pages. The only room that imports bokeh."""

from ..packages import require

require("bokeh.plotting", "pictures")

from .attention import plot_attention
from .circuit import plot_circuit_graph, plot_circuit_matrix
from .curves import plot_faithfulness, plot_pruning
from .features import plot_features
from .heatmap import plot_activation_patching_results
from .page import Figure
from .readings import plot_direct_effects, plot_logit_lens
from .text import plot_tokens

__all__ = [
    "Figure",
    "plot_activation_patching_results",
    "plot_attention",
    "plot_circuit_graph",
    "plot_circuit_matrix",
    "plot_direct_effects",
    "plot_faithfulness",
    "plot_features",
    "plot_logit_lens",
    "plot_pruning",
    "plot_tokens",
]
