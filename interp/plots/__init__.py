"""Pictures: standalone Bokeh pages. The only room that imports bokeh."""

from .attention import plot_attention
from .heatmap import plot_activation_patching_results
from .page import Figure

__all__ = ["Figure", "plot_activation_patching_results", "plot_attention"]
