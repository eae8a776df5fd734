"""Rows of tokens cut from documents: what is collected of them, against each row run alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import interp
import interp.collect
from interp.collect import collect_activations
from interp.errors import CheckpointError, PairsError, PlanError
from interp.shards import StoredActivations
from tests.families import activation, loaded, words

FAMILY, LAYER = "llama_gqa", 1
TEXTS = words(21, 3, 8, 9, 1)


def alone(rows: list[list[int]]) -> Tensor:
    return torch.cat([activation(FAMILY, row, "resid_post", LAYER) for row in rows])


def rows_of(texts: list[list[int]], size: int) -> list[list[int]]:
    return [text[start : start + size] for text in texts for start in range(0, len(text), size)]


def test_every_token_of_a_document_is_collected_in_rows_that_end_with_it() -> None:
    found, index = collect_activations(loaded(FAMILY), TEXTS, LAYER, context=8, index=True)
    want = alone(rows_of(TEXTS, 8))
    assert len(found) == sum(map(len, TEXTS))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=2e-5)
    assert index.tolist() == [[text, at] for text, ids in enumerate(TEXTS) for at in range(len(ids))]


def test_documents_behind_one_another_fill_every_row() -> None:
    found, index = collect_activations(loaded(FAMILY), TEXTS, LAYER, context=8, documents=False, index=True)
    joined = [token for text in TEXTS for token in text]
    torch.testing.assert_close(found, alone(rows_of([joined], 8)), rtol=1e-5, atol=2e-5)
    assert index.tolist() == [[text, at] for text, ids in enumerate(TEXTS) for at in range(len(ids))]


def test_each_row_begins_as_a_text_does(bundled: interp.Model) -> None:
    """A string's prefix stands before every row of it, and is collected of none."""
    text = "The cat sat on the mat, and the dog lay beside it all day long."
    ids = bundled.tokenizer(text)["input_ids"]
    found, index = collect_activations(bundled, [text], 2, context=6, index=True)
    prefix = list(bundled.prefix_ids)
    size = 6 - len(prefix)
    rows = [prefix + ids[start : start + size] for start in range(0, len(ids), size)]
    want = [collect_activations(bundled, [row], 2)[len(prefix) :] for row in rows]
    torch.testing.assert_close(found, torch.cat(want), rtol=1e-4, atol=1e-3)
    assert index[:, 1].tolist() == list(range(len(prefix), len(prefix) + len(ids)))


def test_no_more_tokens_than_asked_for() -> None:
    whole = collect_activations(loaded(FAMILY), TEXTS, LAYER, context=8)
    for count in (1, 8, 13, 500):
        found, index = collect_activations(loaded(FAMILY), TEXTS, LAYER, context=8, tokens=count, index=True)
        assert len(found) == len(index) == min(count, len(whole))
        torch.testing.assert_close(found, whole[:count], rtol=1e-5, atol=2e-5)


def test_special_and_massive_tokens_are_left_out() -> None:
    model = loaded(FAMILY)
    marked = interp.load_model(model.hf, tokenizer=model.tokenizer)
    texts = words(21, 9)
    special = texts[0][4]
    object.__setattr__(marked, "tokenizer", SimpleNamespace(all_special_ids=[special]))
    whole, index = collect_activations(marked, texts, LAYER, index=True)
    found, kept = collect_activations(marked, texts, LAYER, drop="special", index=True)
    stays = torch.tensor([texts[text][at] != special for text, at in index.tolist()])
    assert int((~stays).sum()) > 0 and torch.equal(found, whole[stays]) and torch.equal(kept, index[stays])
    length = whole.norm(dim=-1)
    stays = length <= interp.windows.MASSIVE * length.median()
    found = collect_activations(marked, texts, LAYER, drop=["massive"])
    assert torch.equal(found, whole[stays])


def test_what_does_not_go_together_says_so() -> None:
    model = loaded(FAMILY)
    for options, error, message in (
        ({"drop": "pad"}, PlanError, "drop='pad'; what can be left out is: prefix, special, massive"),
        ({"drop": 3}, PlanError, "drop=3; it is one or more of prefix, special, massive"),
        ({"context": 0}, PlanError, "context=0; it is 1 token or more"),
        ({"context": 2.5}, PlanError, "context must be whole numbers, not 2.5"),
        ({"tokens": 0}, PlanError, "tokens=0"),
        ({"documents": False}, PlanError, "give context="),
        ({"context": 8, "positions": [0]}, PlanError, "leave positions="),
        ({"context": 8, "padded": True}, PlanError, "one row for each text"),
    ):
        with pytest.raises(error, match=message):
            collect_activations(model, TEXTS, LAYER, **options)  # type: ignore[arg-type]
    with pytest.raises(PairsError, match=r"a row has 65 tokens.*smaller context="):
        collect_activations(loaded("gpt2"), words(70), LAYER, context=65)


def test_the_disk_is_asked_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(FAMILY)
    said: list[str] = []
    monkeypatch.setattr(
        interp.collect, "bar_of", lambda *_: SimpleNamespace(
            set_description=said.append, total=4, update=lambda _: None,
            __enter__=lambda self: self, __exit__=lambda *_: None,
        )
    )  # fmt: skip
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**4))
    with pytest.raises(CheckpointError, match=r"need about .* GB on disk, and .* GB are free"):
        collect_activations(model, words(*[60] * 40), LAYER, to_disk=tmp_path / "acts", context=8)
    assert not (tmp_path / "acts").exists()


RUN = """
import sys, warnings
warnings.filterwarnings("ignore")
import torch
torch.set_num_threads(1)
import interp.collect
from interp.collect import collect_activations
from tests.families import loaded, words
interp.collect.BATCHES = 1
texts = words(*[60] * 300)
model = loaded("llama_gqa")
print("begun", flush=True)
collect_activations(model, texts, 1, to_disk=sys.argv[1], context=16, batch_tokens=256, drop="massive")
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_ten_times_the_shards_are_those_of_one_run(tmp_path: Path) -> None:
    """At most one shard is lost at each kill: what is there stays, and the whole equals the unbroken run's bits."""
    root = Path(__file__).parents[1]

    def start(folder: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", RUN, str(tmp_path / folder)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)

    assert start("whole").wait() == 0
    before = 0
    for kill in range(10):
        process = start("broken")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.15 + 0.11 * kill)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        if (tmp_path / "broken" / "index.json").exists():
            now = len(StoredActivations.open(tmp_path / "broken").facts["shards"])
            files = len(list((tmp_path / "broken").glob("activations-*.safetensors")))
            assert now >= before and files - now <= 1
            before = now
    assert start("broken").wait() == 0
    whole, broken = (StoredActivations.open(tmp_path / name) for name in ("whole", "broken"))
    assert whole.facts == broken.facts and torch.equal(whole.load(), broken.load())


def test_a_view_of_what_a_person_sees(tmp_path: Path) -> None:
    """Stored rows of several sites side by side, for what reads one site and explains another."""
    from interp.shuffled import Stored

    stored: Any = collect_activations(
        loaded(FAMILY), TEXTS, LAYER, ["mlp_in", "mlp_out"], to_disk=tmp_path / "acts", context=8
    )
    rows = Stored(stored, ("L1.mlp_in", "L1.mlp_out"))
    whole = torch.cat([rows.read(block) for block in rows.blocks(len(rows))])
    assert torch.equal(whole, torch.cat([stored.load("L1.mlp_in"), stored.load("L1.mlp_out")], dim=1))
    assert rows.width == whole.shape[1] and len(rows) == len(whole)
