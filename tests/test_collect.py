"""`interp.collect_activations` against activations that plain hooks read from each text alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import interp.collect
import interp.shards
from interp import Model, PromptPairs
from interp.collect import collect_activations
from interp.errors import CheckpointError, PairsError, PlanError, SiteError
from interp.shards import StoredActivations
from tests.families import activation, has, loaded, oracle_of, words

TEXTS = words(9, 3, 7, 1, 9, 5, 12, 2)


def wanted(family: str, kind: str, layer: int, texts: list[list[int]] = TEXTS) -> Tensor:
    return torch.cat([activation(family, text, kind, layer) for text in texts])


def calls_of(module: torch.nn.Module) -> tuple[list[torch.Size], Any]:
    """The shapes of a module's outputs, as they come, and what stops the recording."""
    seen: list[torch.Size] = []

    def record(_: torch.nn.Module, args: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).shape)

    return seen, module.register_forward_hook(record).remove


@pytest.mark.parametrize("family", ["gpt2", "llama_gqa", "gemma2", "gpt_neox", "opt", "phi3", "falcon_new", "mixtral"])
def test_every_kind_at_every_layer(family: str) -> None:
    model = loaded(family)
    kinds = [kind for kind in has(family) if kind != "pattern"]
    found = collect_activations(model, TEXTS, [0, -1], kinds, batch_tokens=30)
    assert len(found) == 2 * len(kinds) - 1  # one embedding
    for kind in kinds:
        for layer in (0, 2):
            name = "embed" if kind == "embed" else f"L{layer}.{kind}"
            want = wanted(family, kind, layer)
            assert found[name].shape == want.shape, name
            assert torch.allclose(found[name], want, atol=2e-5, rtol=1e-5), name


@pytest.mark.parametrize(("kind", "layer", "blocks", "whole"), [
    ("embed", 0, 0, 0), ("resid_pre", 1, 1, 1), ("z", 1, 2, 1), ("mlp_out", 1, 2, 1), ("resid_post", 1, 2, 2),
    ("resid_post", 2, 3, 3),
])  # fmt: skip
def test_nothing_runs_behind_the_last_needed_layer(kind: str, layer: int, blocks: int, whole: int) -> None:
    """`blocks` begin and `whole` of them end; the final norm and the head never run."""
    model, oracle = loaded("llama_gqa"), oracle_of("llama_gqa")
    begun: list[int] = []
    hooks = [
        block.input_layernorm.register_forward_hook(lambda *_, n=number: begun.append(n))
        for number, block in enumerate(model.hf.model.layers)
    ]
    ended = [calls_of(block) for block in model.hf.model.layers]
    head, stop = calls_of(model.hf.lm_head)
    norm, stop_norm = calls_of(model.hf.model.norm)
    got = collect_activations(model, TEXTS[:1], layer, kind)
    for hook in hooks:
        hook.remove()
    for remove in (stop, stop_norm, *(stop for _, stop in ended)):
        remove()
    assert torch.allclose(got, oracle.read(TEXTS[0], kind, layer), atol=1e-5)
    assert begun == list(range(blocks)) and sum(len(seen) for seen, _ in ended) == whole
    assert not head and not norm


def test_batches_are_of_similar_length_and_within_the_budget() -> None:
    model = loaded("gpt2")
    seen, stop = calls_of(model.hf.transformer.wte)
    collect_activations(model, TEXTS, 0, "resid_pre", batch_tokens=20)
    stop()
    assert [tuple(shape[:2]) for shape in seen] == [(1, 12), (2, 9), (2, 7), (3, 3)]


def test_positions() -> None:
    model, oracle, texts = loaded("gpt2"), oracle_of("gpt2"), words(9, 4, 6)
    each = [oracle.read(text, "mlp_out", 1) for text in texts]
    last = collect_activations(model, texts, 1, "mlp_out", positions="last")
    assert torch.allclose(last, torch.stack([part[-1] for part in each]), atol=1e-5)
    some, index = collect_activations(model, texts, 1, "mlp_out", positions=[-1, 0, 2], index=True)
    assert torch.allclose(some, torch.cat([part[[-1, 0, 2]] for part in each]), atol=1e-5)
    assert index.tolist() == [[n, p] for n, text in enumerate(texts) for p in (len(text) - 1, 0, 2)]
    padded = collect_activations(model, texts, 1, "mlp_out", padded=True)
    assert padded.shape == (3, 9, 32)
    for row, part in zip(padded, each, strict=True):
        assert torch.allclose(row[: len(part)], part, atol=1e-5) and bool(row[len(part) :].isnan().all())
    stacked = collect_activations(model, texts, 1, "z", positions=[-1, 0], padded=True)
    assert stacked.shape == (3, 2, 4, 8)
    assert torch.allclose(stacked[:, 0], torch.stack([oracle.read(t, "z", 1)[-1] for t in texts]), atol=1e-5)
    with pytest.raises(PairsError, match="text 1 has 4 tokens, so no position 5"):
        collect_activations(model, texts, 1, positions=5)


def test_prefix_is_left_out_unless_asked_for() -> None:
    """Strings have the prefix in front when they run; its activations come back only with `keep_prefix`."""
    model, oracle = replace(loaded("gpt2"), prefix="<bos>"), oracle_of("gpt2")
    texts = ["the cat was happy", "John sold a ball to Mary"]
    ids = [[1, *model.tokenizer(text)["input_ids"]] for text in texts]
    each = [oracle.read(prompt, "resid_post", 1) for prompt in ids]
    without = collect_activations(model, texts, 1)
    assert torch.allclose(without, torch.cat([part[1:] for part in each]), atol=1e-5)
    kept = collect_activations(model, texts, 1, keep_prefix=True)
    assert torch.allclose(kept, torch.cat(each), atol=1e-5)
    taken = collect_activations(model, ids, 1)  # token ids are taken as they are
    assert torch.allclose(taken, torch.cat(each), atol=1e-5)
    first = collect_activations(model, texts, 1, positions=0)
    assert torch.allclose(first, torch.stack([part[0] for part in each]), atol=1e-5)
    cut, index = collect_activations(model, texts, 1, max_length=3, index=True)
    assert torch.allclose(cut, torch.cat([part[1:3] for part in each]), atol=1e-5)
    assert index.tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]
    pairs = PromptPairs(texts, None)
    assert torch.equal(collect_activations(model, pairs, 1), without)
    one = collect_activations(model, texts[0], 1, dtype=torch.float16)
    assert one.dtype == torch.float16 and torch.allclose(one.float(), without[:4], atol=1e-2)


def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interp.collect, "BATCHES", 1)


def test_a_stream_reads_texts_as_they_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch)
    taken: list[int] = []

    def texts() -> Iterator[list[int]]:
        for number, text in enumerate(TEXTS):
            taken.append(number)
            yield text

    steps = collect_activations(loaded("gpt2"), texts(), [0, 1], "mlp_out", batch_tokens=15, stream=True, index=True)
    assert taken == []
    first, index = next(steps)
    assert 0 < len(taken) < len(TEXTS)
    rest = list(steps)
    assert len(rest) >= 3 and taken == list(range(len(TEXTS)))
    for name, layer in (("L0.mlp_out", 0), ("L1.mlp_out", 1)):
        whole = torch.cat([first[name], *(values[name] for values, _ in rest)])
        assert torch.allclose(whole, wanted("gpt2", "mlp_out", layer), atol=1e-5)
    places = torch.cat([index, *(part for _, part in rest)])
    assert places.tolist() == [[n, p] for n, text in enumerate(TEXTS) for p in range(len(text))]


def test_shards_on_disk_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch)
    model, folder = loaded("gpt2"), tmp_path / "acts"
    options: dict[str, Any] = {"layer": 1, "component": ["mlp_out", "z"], "to_disk": folder}
    written = interp.shards.write_atomically
    count = 0

    def stop_at_third(path: Path, data: bytes) -> None:
        nonlocal count
        count += path.suffix == ".safetensors"
        if count == 3:
            raise OSError(28, "No space left on device")
        written(path, data)

    monkeypatch.setattr(interp.shards, "write_atomically", stop_at_third)
    with pytest.raises(CheckpointError, match=r"No space left on device; the 2 shards before stay whole"):
        collect_activations(model, TEXTS, batch_tokens=15, **options)
    monkeypatch.setattr(interp.shards, "write_atomically", written)
    half = StoredActivations.open(folder)
    assert len(half.facts["shards"]) == 2 and 0 < len(half) < sum(map(len, TEXTS))
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    seen, stop = calls_of(model.hf.transformer.wte)
    stored = collect_activations(model, TEXTS, **options)  # batches as they were begun
    stop()
    assert sum(rows for rows, *_ in seen) < len(TEXTS)
    assert all((folder / name).stat().st_mtime_ns == time for name, time in before.items())
    assert len(stored) == sum(map(len, TEXTS)) and stored.names == ("L1.mlp_out", "L1.z")
    assert torch.allclose(stored.load(), wanted("gpt2", "mlp_out", 1), atol=1e-5)
    assert torch.allclose(stored.load("L1.z"), wanted("gpt2", "z", 1), atol=1e-5)
    assert stored.load("index").tolist() == [[n, p] for n, text in enumerate(TEXTS) for p in range(len(text))]
    whole = collect_activations(model, TEXTS, 1, "mlp_out", batch_tokens=15)
    assert torch.equal(stored.load("L1.mlp_out"), whole)
    seen, stop = calls_of(model.hf.transformer.wte)
    assert len(collect_activations(model, TEXTS, **options)) == len(stored)
    stop()
    assert not seen


def test_a_folder_of_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_windows(monkeypatch)
    model, folder = loaded("gpt2"), tmp_path / "acts"
    options: dict[str, Any] = {"batch_tokens": 15, "to_disk": folder}
    collect_activations(model, TEXTS, 1, **options)
    with pytest.raises(CheckpointError, match=r"its sites is \['L1.resid_post'\], this run's is \['L2.resid_post'\]"):
        collect_activations(model, TEXTS, 2, **options)
    with pytest.raises(CheckpointError, match="of other texts: shard 0 is not that of texts 0"):
        collect_activations(model, words(9, 3, 7, 1, 9, 5, 12, 2, seed=1), 1, **options)
    with pytest.raises(CheckpointError, match="of more texts"):
        collect_activations(model, TEXTS[:4], 1, **options)
    with pytest.raises(CheckpointError, match="batch_tokens is 15, this run's is 30"):
        collect_activations(model, TEXTS, 1, batch_tokens=30, to_disk=folder)
    other: Model = replace(loaded("gpt2"), hf=loaded("gpt_neo").hf)
    with pytest.raises(CheckpointError, match="its weights is"):
        collect_activations(other, TEXTS, 1, **options)
    (folder / "activations-00001.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"cannot read .*activations-00001"):
        StoredActivations.open(folder).load()
    with pytest.raises(CheckpointError, match="no activations in"):
        StoredActivations.open(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write activations"):
        collect_activations(model, TEXTS, 1, to_disk=tmp_path / "file" / "acts")


def test_what_is_refused() -> None:
    model = loaded("gpt2")
    with pytest.raises(PlanError, match="'pattern' cannot be collected"):
        collect_activations(model, TEXTS, 0, "pattern")
    with pytest.raises(SiteError, match="layer 3"):
        collect_activations(model, TEXTS, 3)
    with pytest.raises(PlanError, match="exclude each other"):
        collect_activations(model, TEXTS, 1, stream=True, padded=True)
    with pytest.raises(PlanError, match="no text"):
        collect_activations(model, [], 1)
    for options, message in [
        ({"component": "blocks.1.hook_mlp_out"}, "names a layer"),
        ({"batch_tokens": -1}, "batch_tokens=-1"),
        ({"max_length": 0}, "max_length=0"),
        ({"dtype": "float17"}, "dtype='float17' is no type of torch"),
    ]:
        with pytest.raises(PlanError, match=message):
            collect_activations(model, TEXTS, **{"layer": 1, **options})
    with pytest.raises(PairsError, match=r"text 0 is the one id 5; a prompt is a string, a list of ids"):
        collect_activations(model, [5, 6], 1)
    assert collect_activations(model, TEXTS, np.int64(1), dtype="float16").dtype is torch.float16
    with pytest.raises(PlanError, match="positions='first'"):
        collect_activations(model, TEXTS, 1, positions="first")
    with pytest.raises(PairsError, match="text of pair 1 has no tokens"):
        collect_activations(model, ["the cat", ""], 1)
