"""What is made of activations where the model runs, so that little comes back: tokens, sums, lens, direct effects.

Standard library and torch only: these functions are shipped by source to a remote server. A program asks for one of
them in `readout`, a dictionary with `kind`:

    "tokens"  `rows`, `columns` [token]: the activations that are read, at these tokens alone; `top`: the so many largest numbers
              of each, and under "top" which they are
    "sums"    `rows`, `columns`, `place` [token], `places`: sums over the tokens of each place, fp32
    "lens"    `layers`, `rows`, `columns`, `next` [token] (-1: none), `top`: what each layer's stream says comes next; of the
              last layer that is what the model says
    "direct"  `by_source`: parts of the answers' logits at the scored rows' answer positions
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..metrics import gather
from ..models.layout import Envoy, affine, affine_parts, at, part_index

if TYPE_CHECKING:
    from .program import Program
    from .state import Run


def readout(model: Envoy, run: Run) -> dict[str, Any]:
    """What a program's `readout` asks for, after the walk through the blocks."""
    spec = run.program["readout"]
    if spec["kind"] == "lens":
        return lens(model, run, spec)
    if spec["kind"] == "direct":
        return direct(model, run, spec)
    reads: dict[tuple[int, str], Tensor] = {}
    top: dict[tuple[int, str], Tensor] = {}
    for site, value in run.kept.items():
        chosen = value[spec["rows"].to(value.device), spec["columns"].to(value.device)]
        if spec["kind"] == "sums":
            total = chosen.new_zeros(spec["places"], *chosen.shape[1:], dtype=torch.float32)
            chosen = total.index_add_(0, spec["place"].to(value.device), chosen.float())
        elif spec.get("top") is not None:
            chosen, top[site] = chosen.flatten(1).topk(spec["top"])
        reads[site] = chosen
    return {"reads": reads, "top": top} if top else {"reads": reads}


def lens_rows(run: Run, hidden: Tensor) -> Tensor:
    """What enters the final norm: the stream behind each layer asked for, as rows below one another."""
    return torch.cat([run.kept[layer, "resid_post"].to(hidden.device) for layer in run.program["readout"]["layers"]])


def lens(model: Envoy, run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Top tokens and the next token's rank, `[layer, token, …]`, through the model's own norm, head and softcap."""
    head = at(model, run.taps["head"])
    hidden = head.input
    by_layer = hidden.unflatten(0, (len(spec["layers"]), -1))  # [layer, row, position, d_model]
    chosen = by_layer[:, spec["rows"].to(hidden.device), spec["columns"].to(hidden.device)]
    head.input = chosen.flatten(0, 1).unsqueeze(1)
    logits = model.output.logits[:, 0].float().unflatten(0, chosen.shape[:2])
    log_total = logits.logsumexp(-1, keepdim=True)
    top = logits.topk(spec["top"], dim=-1)
    following = spec["next"].to(logits.device)
    of_next = logits.gather(-1, following.clamp(min=0).expand(logits.shape[:2]).unsqueeze(-1))
    return {
        "token": top.indices.cpu(),
        "logit": top.values.cpu(),
        "probability": (top.values - log_total).exp().cpu(),
        "next_rank": (logits > of_next).sum(-1).cpu(),
        "next_probability": (of_next - log_total).exp()[..., 0].cpu(),
        "next_loss": (log_total - of_next)[..., 0].cpu(),
    }


def chosen_rows(weight: Tensor, program: Program) -> Tensor:
    """Direction in the head's input that the logit difference reads `[row, d_model]`, fp32; means over sets."""
    direction = torch.zeros((), device=weight.device)
    for tokens, sign in ((program["answers"], 1), (program["distractors"], -1)):
        if tokens is not None:
            ids = tokens.to(weight.device).reshape(len(tokens), -1)
            rows = weight[ids.clamp(min=0)].float() * (ids >= 0).unsqueeze(-1)
            direction = direction + sign * rows.sum(1) / (ids >= 0).sum(1, keepdim=True)
    return direction


def difference(values: Tensor, program: Program) -> Tensor:
    """Answers minus distractors (where there are any) of `values [row, d_vocab]`: `[row]`."""
    answers, distractors = program["answers"], program["distractors"]
    assert answers is not None
    out = gather(values, answers.to(values.device), "mean")
    return out if distractors is None else out - gather(values, distractors.to(values.device), "mean")


def direct(model: Envoy, run: Run, spec: dict[str, Any]) -> dict[str, Any]:
    """Parts of the logit difference at the answer positions, norms frozen at their values in this run.

    A frozen norm is linear, so what a component adds to the logit difference is its dot product with one vector: the
    direction that the head reads, pulled back through the final norm (and a component's own post-norm).
    """
    taps, program, kept = run.taps, run.program, run.kept
    head = at(model, taps["head"])
    rows, columns = program["scored"], program["at"]

    def here(layer: int, kind: str) -> Tensor:
        value = kept[layer, kind]
        return value[rows.to(value.device), columns.to(value.device)]

    def pull_back(norm: Envoy, x: Tensor, through: Tensor) -> tuple[Tensor, Tensor]:
        """A direction in a norm's output, as one in its input at x `[row, d_model]`, and what the norm's bias adds."""
        scale, weight, bias, centred = affine_parts(norm, x)
        through = through.to(weight.device)
        read = through * weight * scale
        added = (through * bias).sum(-1)
        return (read - read.mean(-1, keepdim=True) if centred else read), added

    def dot(part: Tensor, through: Tensor) -> Tensor:
        return torch.einsum("r...m,rm->r...", part.float(), through.to(part.device)).cpu()

    final = here(taps["n_layers"] - 1, "resid_post")
    norm = at(model, taps["norm"])
    unembedding, head_bias = affine(head, norm(final))
    direction = chosen_rows(unembedding, program) * taps["logit_scale"]
    read, norm_bias = pull_back(norm, final, direction)
    parts: dict[str, Any] = {"embed": dot(here(0, "resid_pre"), read), "norm_bias": norm_bias.cpu()}
    parts.update(head_out=[], attn_bias=[], mlp_out=[], source=[])
    index = part_index(taps, "z")
    for layer in range(taps["n_layers"]):
        block = at(model, taps["layers"])[layer]
        z = here(layer, "z")
        weight, bias = affine(at(block, taps["o"]), z.flatten(1))
        by_head = weight[:, index.to(z.device)].permute(1, 2, 0)  # [head, d_head, d_model]
        heads = torch.einsum("rhd,hdm->rhm", z, by_head)
        constant = torch.zeros_like(heads[:, 0]) if bias is None else bias.expand_as(heads[:, 0])
        inner, added = read.to(heads.device) * taps["branch"], heads.new_zeros(len(heads))
        if taps["post_attn"]:
            inner, added = pull_back(at(block, taps["post_attn"]), heads.sum(1) + constant, inner)
        parts["head_out"].append(dot(heads, inner))
        parts["attn_bias"].append(dot(constant, inner) + added.float().cpu())
        parts["mlp_out"].append(dot(here(layer, "mlp_out"), read))
        if spec["by_source"]:
            pattern = kept[layer, "pattern"]
            pattern = pattern[rows.to(pattern.device), :, columns.to(pattern.device)]  # [row, head, key]
            value = kept[layer, "v"][rows.to(pattern.device)]
            value = value.repeat_interleave(taps["n_heads"] // taps["n_kv_heads"], dim=2)
            reach = torch.einsum("hdm,rm->rhd", by_head.float(), inner)
            parts["source"].append(torch.einsum("rhk,rkhd,rhd->rk", pattern.float(), value.float(), reach).cpu())
    hidden = head.input
    head.input = hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(1)
    logits = head.output[:, 0].float() * taps["logit_scale"]
    added = logits.new_zeros(1) if head_bias is None else head_bias.float() * taps["logit_scale"]
    parts["head_bias"] = difference(added.expand_as(logits), program).cpu()
    made = {name: torch.stack(part, dim=1) if isinstance(part, list) and part else part for name, part in parts.items()}
    return {"parts": made, "metric": difference(logits, program).cpu()}
