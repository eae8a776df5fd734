"""Studies: several experiments on one model that belong together, written into a folder with a report. The commands
`interp patch` and `interp circuit`, and the recipes, are calls of these."""

from .circuits import circuit_study
from .patching import aligned_pairs, patching_study

__all__ = ["aligned_pairs", "circuit_study", "patching_study"]
