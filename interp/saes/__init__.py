"""Dictionaries: sparse autoencoders and transcoders, trained by SAELens on activations that `interp` collects, and used as
sites. SAELens is imported when it is first needed, and in this room alone."""

from .baselines import linear, pca
from .evaluate import SAEReport, evaluate_sae
from .files import load_sae, save_sae
from .make import ARCHITECTURES, SparseAutoencoder
from .train import Trained, train_sae
from .views import error_view, inference, site_of, view_of

__all__ = [
    "ARCHITECTURES",
    "SAEReport",
    "SparseAutoencoder",
    "Trained",
    "error_view",
    "evaluate_sae",
    "inference",
    "linear",
    "load_sae",
    "pca",
    "save_sae",
    "site_of",
    "train_sae",
    "view_of",
]
