"""What the benchmarks share: a random model of GPT-2 small's size in four libraries, prompts, timing, tables."""

from __future__ import annotations

import copy
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from io import StringIO
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore")

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import interp

POSITIONS = 15
THREADS = 2


def random_gpt2(**config: Any) -> GPT2LMHeadModel:
    """GPT-2 small's shape (12 layers, 124 M parameters), random weights wide enough that patches matter."""
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(**config)).eval().requires_grad_(False)
    for name, weight in hf.named_parameters():
        if weight.ndim == 2 and "wte" not in name:
            weight.normal_(0, 0.06)
        elif name.endswith("bias"):
            weight.normal_(0, 0.05)
    return hf


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, for libraries that will not start without one; prompts here are token ids."""
    words = ["<eos>", "<unk>", "a", "b", "c"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, name_or_path="words", add_bos_token=True, **special)


def hooked_transformer(hf: GPT2LMHeadModel) -> Any:
    """TransformerLens's HookedTransformer with the same weights, nothing folded or centred."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

    config = hf.config
    facts = HookedTransformerConfig(
        n_layers=config.n_layer,
        d_model=config.n_embd,
        n_ctx=config.n_positions,
        d_head=config.n_embd // config.n_head,
        n_heads=config.n_head,
        d_mlp=4 * config.n_embd,
        d_vocab=config.vocab_size,
        act_fn="gelu_new",
        eps=config.layer_norm_epsilon,
        normalization_type="LN",
        device="cpu",
        dtype=torch.float32,
    )
    model = HookedTransformer(facts)
    state = {name: weight.detach().clone() for name, weight in convert_gpt2_weights(hf, facts).items()}
    raw = dict.fromkeys(("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases"), False)
    model.load_and_process_state_dict(state, **raw)
    return model.eval().requires_grad_(False)


def bridge(hf: GPT2LMHeadModel) -> Any:
    """TransformerLens's TransformerBridge around a copy of the same HuggingFace model."""
    from transformer_lens.model_bridge import TransformerBridge

    with redirect_stdout(StringIO()):
        made = TransformerBridge.boot_transformers(
            "gpt2", hf_model=copy.deepcopy(hf), tokenizer=tokenizer(), device="cpu"
        )
    return made.eval().requires_grad_(False)


def pair_differing_from(
    start: int, positions: int = POSITIONS, vocab: int = 50257, seed: int = 0
) -> interp.PromptPairs:
    """One pair of random prompts that are alike below position `start` and differ at every later one."""
    drawn = np.random.default_rng([seed, start])
    clean = drawn.integers(vocab, size=positions)
    corrupted = np.where(np.arange(positions) < start, clean, (clean + 1 + drawn.integers(vocab - 1)) % vocab)
    right, wrong = drawn.choice(vocab, 2, replace=False)
    return interp.PromptPairs([clean.tolist()], [corrupted.tolist()], [int(right)], [int(wrong)])


@dataclass(frozen=True)
class Timed:
    """Seconds of every run of one job, by the clock and of both cores' work, and what its first run returned."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    result: Any

    @property
    def median(self) -> float:
        return statistics.median(self.wall)


def interleaved(
    jobs: dict[str, Callable[[], Any]], repeats: int, scale: dict[str, float] | None = None, warm: bool = True
) -> dict[str, Timed]:
    """Run A B C A B C …, so that whatever else the machine does falls on all alike; `warm`: once untimed before.

    `scale` multiplies the seconds of jobs that do only a part of their work.
    """
    results = {name: job() for name, job in jobs.items()} if warm else {}
    wall: dict[str, list[float]] = {name: [] for name in jobs}
    cpu: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            times = (scale or {}).get(name, 1.0)
            started, worked = time.perf_counter(), time.process_time()
            found = job()
            cpu[name].append(times * (time.process_time() - worked))
            wall[name].append(times * (time.perf_counter() - started))
            results.setdefault(name, found)
    return {name: Timed(tuple(wall[name]), tuple(cpu[name]), results[name]) for name in jobs}


def ratio_of(timed: dict[str, Timed], slow: str, fast: str, clock: str = "wall") -> float:
    """Median over rounds of slow / fast within a round: both halves of a ratio met the same load."""
    halves = (getattr(timed[name], clock) for name in (slow, fast))
    return statistics.median(a / b for a, b in zip(*halves, strict=True))


def wait_for_quiet(load: float = 1.5, patience: float = 60.0) -> None:
    """Wait until little else runs, but not for ever; says what the load was."""
    end = time.monotonic() + patience
    while os.getloadavg()[0] > load and time.monotonic() < end:
        time.sleep(5)
    print(f"load before the timed runs: {os.getloadavg()[0]:.2f}", file=sys.stderr)


def heading(title: str) -> str:
    """Title, date, machine and versions, as Markdown."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "nnsight", "transformers", "transformer-lens"))
    machine = f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"
    return f"### {title}\n\n{date.today().isoformat()}; {machine}; {packages}\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + " - |" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)])


def verdict(timed: dict[str, Timed], slow: str, fast: str, least: float) -> str:
    """Ratio by the clock beside the one that is wanted, and the ratio of work done, which other processes hardly change."""
    ratio, work = (ratio_of(timed, slow, fast, clock) for clock in ("wall", "cpu"))
    return f"**{ratio:.1f}×** (≥ {least:g}×{'' if ratio >= least else ', MISSED'}; work {work:.1f}×)"
