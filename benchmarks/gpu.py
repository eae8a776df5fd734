"""A sweep on the largest random Llama that fits the GPU, in fp32 and bf16, beside one forward pass per patch.

python benchmarks/gpu.py [--quick]
"""

from __future__ import annotations

import argparse
import gc

import numpy as np
import torch
from common import heading, interleaved, pair_differing_from, ratio_of, table
from transformers import LlamaConfig, LlamaForCausalLM

import interp

#: name, layers, d_model, heads, key/value heads, d_mlp
SHAPES = (
    ("Llama 3.1 8B", 32, 4096, 32, 8, 14336),
    ("Llama 2 7B", 32, 4096, 32, 32, 11008),
    ("Llama 3.2 3B", 28, 3072, 24, 8, 8192),
    ("Llama 3.2 1B", 16, 2048, 32, 8, 8192),
)
QUICK = ("tiny", 3, 64, 4, 2, 128)
VOCAB, POSITIONS = 32000, 32


def random_llama(
    shape: tuple[str, int, int, int, int, int], device: str, dtype: torch.dtype
) -> tuple[LlamaForCausalLM, int]:
    """A model of this shape, made where it stays, and how many parameters it has."""
    _, layers, d_model, heads, kv_heads, d_mlp = shape
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=d_model, intermediate_size=d_mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    return model, sum(weight.numel() for weight in model.parameters())


def size_of(shape: tuple[str, int, int, int, int, int]) -> int:
    """About how many parameters a shape has."""
    _, layers, d_model, heads, kv_heads, d_mlp = shape
    return layers * d_model * (2 * d_model + 2 * d_model * kv_heads // heads + 3 * d_mlp) + 2 * VOCAB * d_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, one run, on a CPU if need be: does it work?"
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default 5)")
    parser.add_argument(
        "--every", type=int, default=8, help="layers that one forward per patch runs (default every 8th)"
    )
    args = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not args.quick:
        raise SystemExit("benchmarks/gpu.py needs a CUDA device; --quick tries it without")
    device, repeats = "cuda" if cuda else "cpu", 1 if args.quick else args.repeats
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        free = torch.cuda.mem_get_info()[0] if cuda else 0
        fits = [shape for shape in SHAPES if size_of(shape) * dtype.itemsize <= 0.7 * free]
        shape = QUICK if args.quick or not fits else fits[0]
        hf, parameters = random_llama(shape, device, dtype)
        model = interp.load_model(hf)
        pairs = pair_differing_from(0, POSITIONS, VOCAB)
        every = 1 if args.quick else args.every
        some = interp.grid("resid_pre", layers=range(0, model.n_layers, every))
        held = torch.cuda.memory_allocated() if cuda else 0
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        timed = interleaved(
            {
                "interp": lambda m=model, p=pairs: interp.patch(m, p, interp.grid("resid_pre"), progress=False),
                "naive": lambda m=model, p=pairs, s=some: interp.patch(m, p, s, schedule="naive", progress=False),
            },
            repeats,
            {"naive": model.n_layers / len(some.layers or ())},
        )
        ours, naive = (timed[name].result.values for name in ("interp", "naive"))
        error = float(np.abs(ours.sel(layer=naive["layer"]).values - naive.values).max())
        peak = f"{(torch.cuda.max_memory_allocated() - held) / 2**30:.1f} GB" if cuda else "–"
        rows.append([
            f"{shape[0]}, {parameters / 1e9:.1f}·10⁹ parameters, {str(dtype).removeprefix('torch.')}",
            f"{ours.sizes['layer'] * ours.sizes['position']}", f"{timed['interp'].median:.2f} s",
            f"{timed['naive'].median:.1f} s", f"**{ratio_of(timed, 'naive', 'interp'):.1f}×**", f"{error:.0e}", peak,
        ])  # fmt: skip
        del hf, model, timed
        gc.collect()
    name = torch.cuda.get_device_name() if cuda else "no GPU"
    print(heading(f"GPU: residual sweep, one pair of {POSITIONS} tokens, {name}, medians of {repeats}"))
    print(
        table(["model", "patches", "interp", "one forward per patch", "ratio", "apart", "memory above weights"], rows)
    )


if __name__ == "__main__":
    main()
