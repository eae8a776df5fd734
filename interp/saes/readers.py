"""What dictionaries compute of a token, as functions of plain tensors: they run wherever the model does.

torch only: these functions travel to a remote server by source. Tensors `t` are those of `interp.saes.views.tensors_of`; a
form is the number of its name in `FORMS`, since tensors are all that travels.
"""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
FORMS = ("relu", "jumprelu", "gated", "topk")
#: What a dictionary does to each token before its encoder, and takes back behind its decoder.
NORMS = ("none", "layer_norm", "constant_norm_rescale")


def entering(x: Tensor, t: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """What the encoder reads of x `[…, d_in]`, and the token's scale and mean that were taken off."""
    x = x.float()
    scale, mean = x.new_ones(1), x.new_zeros(1)
    if int(t["norm"]) == 1 or int(t["centred"]):
        mean = x.mean(-1, keepdim=True)
        x = x - mean
    if int(t["norm"]) == 1:
        scale = x.std(-1, keepdim=True)
        x = x / (scale + 1e-5)
    elif int(t["norm"]) == 2:
        scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        x = x / scale
    return x - t["center"], scale, mean


def read_features(x: Tensor, t: Tensors) -> Tensor:
    """Activations `[…, part]` of the features that are asked for, in fp32 and in units of x."""
    entered, scale, _ = entering(x, t)
    before = entered @ t["encoder"].T + t["bias"]
    form = int(t["form"])
    if form == 0:
        return torch.relu(before) * scale
    if form == 1:
        return torch.relu(before) * (before > t["threshold"]) * scale
    if form == 2:
        magnitude = entered @ t["encoder"].T * t["gain"] + t["shift"]
        return torch.relu(magnitude) * (before > 0) * scale
    largest = before.topk(int(t["k"]), dim=-1)  # which are among the k is seen from all of them
    kept = torch.zeros_like(before).scatter(-1, largest.indices, largest.values.relu())
    return kept[..., t["part"]] * scale


def read_error(x: Tensor, t: Tensors) -> Tensor:
    """What the dictionary does not explain, x − x̂ `[…, part]`."""
    _, scale, mean = entering(x, t)
    found = read_features(x, {**t, "part": torch.arange(len(t["features"]), device=x.device)})
    error = x.float() - (found @ t["features"] + t["offset"] * scale + mean)
    return error[..., t["part"]]


def read_cut(x: Tensor, t: Tensors) -> Tensor:
    """The features that are cut, and the error if it is, as one part: `[row, position, 1, width]`."""
    every = {**t, "part": torch.arange(len(t["features"]), device=x.device)}
    parts = [read_features(x, every)[..., t["cut"]]]
    if int(t["with_error"]):
        parts.append(read_error(x, {**t, "part": torch.arange(x.shape[-1], device=x.device)}))
    return torch.cat(parts, dim=-1).unsqueeze(-2)
