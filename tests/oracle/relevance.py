"""Relevance patching (Jafari et al. 2025) on a Llama, written out by hand: a forward pass whose autograd is the rule's.

Scales of norms and attention patterns are constants, an activation is x times the constant f(x)/x, and half of each product of a
gated MLP is one. Shares no code with the library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(layers: int, hidden_units: int) -> LlamaForCausalLM:
    """Random and wide: 4 heads over 2 of keys and values, 24 features, 60 tokens."""
    sizes = {"hidden_size": 24, "intermediate_size": hidden_units, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    hf = LlamaForCausalLM(LlamaConfig(vocab_size=60, num_hidden_layers=layers, **sizes)).eval()
    with torch.no_grad():
        for weight in hf.parameters():
            weight.mul_(8) if weight.ndim > 1 else weight.add_(0.2 * torch.randn_like(weight))
    return hf


def norm(module: Any, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * x * scale.detach()


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def attention(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, live: dict[str, Tensor]) -> Tensor:
    module, d_head = layer.self_attn, layer.self_attn.head_dim
    q, k, v = (
        part(x).unflatten(-1, (-1, d_head)).transpose(1, 2) for part in (module.q_proj, module.k_proj, module.v_proj)
    )
    q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    scores = q @ k.transpose(-1, -2) * d_head**-0.5
    length = x.shape[1]
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf"))
    live["z"] = (scores.softmax(-1).detach() @ v).transpose(1, 2).flatten(2)
    return module.o_proj(live["z"])


def mlp(layer: Any, x: Tensor, live: dict[str, Tensor]) -> Tensor:
    module = layer.mlp
    gate, up = module.gate_proj(x), module.up_proj(x)
    active = gate * (torch.nn.functional.silu(gate) / gate).detach()
    product = active * up
    live["neuron"] = product / 2 + (product / 2).detach()
    return module.down_proj(live["neuron"])


def forward(model: Any, ids: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Logits of the last position, and the live tensors of each block: resid_pre, attn_out, resid_mid, z, neuron, mlp_out."""
    x = model.model.embed_tokens(ids).detach().requires_grad_(True)
    cos, sin = (part[:, None] for part in model.model.rotary_emb(x, torch.arange(ids.shape[1])[None]))
    blocks = []
    for layer in model.model.layers:
        live: dict[str, Tensor] = {"resid_pre": x}
        live["attn_out"] = attention(layer, norm(layer.input_layernorm, x), cos, sin, live)
        live["resid_mid"] = x + live["attn_out"]
        live["mlp_in"] = norm(layer.post_attention_layernorm, live["resid_mid"])
        live["mlp_out"] = mlp(layer, live["mlp_in"], live)
        x = live["resid_mid"] + live["mlp_out"]
        blocks.append(live)
    return model.lm_head(norm(model.model.norm, x))[:, -1], blocks
