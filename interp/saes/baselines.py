"""What a dictionary is compared with, in its own form: a linear map as pairs of ReLU features, one for each sign."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import PlanError
from .library import Dictionary, sae_lens


def signed(read: Tensor, write: Tensor, center: Tensor, offset: Tensor) -> Dictionary:
    """x ↦ (x − center)·read·write + offset as a dictionary of 2k features (`read [d_in, k]`, `write [k, d_out]`)."""
    library = sae_lens()
    d_in, k = read.shape
    square = d_in == write.shape[1] and bool(torch.equal(center, offset))
    if square:
        made = library.StandardSAE(library.StandardSAEConfig(d_in=d_in, d_sae=2 * k))
    else:
        config = library.TranscoderConfig(d_in=d_in, d_sae=2 * k, d_out=write.shape[1], apply_b_dec_to_input=False)
        made = library.Transcoder(config)
    with torch.no_grad():
        made.W_enc.copy_(torch.cat([read, -read], dim=1))
        made.W_dec.copy_(torch.cat([write, -write]))
        made.b_dec.copy_(offset)
        made.b_enc.copy_(torch.zeros(2 * k) if square else -center @ torch.cat([read, -read], dim=1))
    found: Dictionary = made
    return found


def pca(rows: Tensor, k: int) -> Dictionary:
    """The first k principal components of activations `[row, d]`, as a dictionary of 2k features. PlanError: k above d."""
    if not 1 <= k <= rows.shape[1]:
        raise PlanError(f"k={k} components of {rows.shape[1]} numbers: k is 1 to {rows.shape[1]}")
    x = rows.double()
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    top = vectors[:, -k:].float()
    return signed(top, top.T.contiguous(), mean.float(), mean.float())


def linear(inputs: Tensor, targets: Tensor) -> Dictionary:
    """The linear map by least squares from `inputs [row, d_in]` to `targets [row, d_out]`, as a transcoder."""
    x, y = inputs.double(), targets.double()
    centers = x.mean(0), y.mean(0)
    solved = torch.linalg.lstsq(x - centers[0], y - centers[1]).solution.float()
    eye = torch.eye(y.shape[1])
    return signed(solved, eye, centers[0].float(), centers[1].float())
