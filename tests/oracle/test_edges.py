"""Edges of the oracle: all cut is the source run, each one is path patching in three passes."""

from __future__ import annotations

import pytest
import torch

from .edges import all_edges, contributions, edges, path, paths, receivers, senders
from .test_oracle import CLEAN, CORRUPTED, assert_equal, distinct_families, oracle_of

EDGE_FAMILIES = (
    "gpt2",
    "llama_gqa",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_neox",
    "olmo2",
    "bloom",
    "falcon",
    "opt",
)


@distinct_families
def test_all_edges_cut_is_the_source_run(family: str) -> None:
    o = oracle_of(family)
    every, source = all_edges(o), o.run(CORRUPTED)
    assert_equal(edges(o, CLEAN, CORRUPTED, every), source)
    assert_equal(edges(o, CLEAN, CORRUPTED, [edge for edge in every if edge[1] == "logits"]), source)
    assert_equal(edges(o, CLEAN, CLEAN, every), o.run(CLEAN))
    given = contributions(o, CLEAN)
    if o.names.post1 and o.part(0, "o").bias is None:
        shares = torch.stack([given[f"L0.H{head}"] for head in range(o.n_heads)])
        assert_equal(shares.sum(0), o.read(CLEAN, "attn_out", 0))


@pytest.mark.parametrize("family", EDGE_FAMILIES)
def test_each_edge_is_the_three_pass_path(family: str) -> None:
    o = oracle_of(family)
    base, kv = o.run(CLEAN), o.n_kv_heads - 1
    chosen = [("embed", "L0.H3.q"), ("embed", "logits"), ("L0.H1", f"L1.H{kv}.k"), ("L0.H0", f"L2.H{kv}.v")]
    chosen += [("L0.mlp", "L2.mlp"), ("L1.H3", "L2.H1.q"), ("L1.mlp", "logits"), ("L2.H2", "logits")]
    chosen += [("L0.H2@7", "L1.mlp"), ("L0.H2", "L2.H0.k@7")]
    chosen += [] if o.names.parallel else [("L1.H0", "L1.mlp")]
    by_path = paths(o, CLEAN, CORRUPTED, [([sender], [receiver]) for sender, receiver in chosen])
    for edge, logits in zip(chosen, by_path, strict=True):
        one = edges(o, CLEAN, CORRUPTED, [edge])
        assert_equal(one, logits)
        assert (one - base).abs().max() > 1e-3, edge
    assert set(all_edges(o)) >= set(chosen[:8])
    same_layer = ("L1.H0", "L1.mlp") in all_edges(o)
    assert same_layer is not o.names.parallel


@pytest.mark.parametrize("family", EDGE_FAMILIES)
def test_paths_through_mlps(family: str) -> None:
    o = oracle_of(family)
    heads = [name for name in senders(o) if "mlp" not in name]
    through = path(o, CLEAN, CORRUPTED, heads, ["logits"], through_mlps=True)
    assert_equal(through, o.run(CORRUPTED))
    assert (through - path(o, CLEAN, CORRUPTED, heads, ["logits"])).abs().max() > 0.01
    assert_equal(path(o, CLEAN, CORRUPTED, senders(o), receivers(o)), o.run(CORRUPTED))
