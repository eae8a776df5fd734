"""Tracking: what runs log and keep, in folders of their own and, where it is asked for, at Weights & Biases.

The only room that imports wandb, and that in a process of its own (`child.py`).
"""

from .history import Run, Runs, runs
from .tracker import Tracker, track_experiment

__all__ = ["Run", "Runs", "Tracker", "runs", "track_experiment"]
