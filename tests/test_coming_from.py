"""docs/coming-from.md: both sides of every line run on one model, and give the same numbers where both give some."""

from __future__ import annotations

import copy
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import interp
from tests.families import loaded
from tests.oracle.configs import widen
from tests.oracle.hooks import Oracle, Patch

PAGE = Path(interp.__file__).parents[1] / "docs" / "coming-from.md"
TEXT = PAGE.read_text(encoding="utf-8")
#: Lines whose two sides are a loaded model or a picture: that both run, or ours does, is all there is to say.
NOT_NUMBERS = ("LanguageModel(", "remote=True", "circuitsvis")


def rows(table: str) -> list[tuple[str, str]]:
    """The lines of a table of the page: their call, our call."""
    part = TEXT.split(f"<!-- rows: {table} -->")[1].split("<!-- /rows -->")[0]
    cells = [line.strip("| \n").split(" | ") for line in part.strip().splitlines()[2:]]
    return [(theirs.strip("`"), ours.strip("`")) for theirs, ours in cells]


def numbers(value: Any) -> np.ndarray:
    """What a side gives, without dims of size 1."""
    value = value.detach() if isinstance(value, torch.Tensor) else getattr(value, "values", value)
    return np.squeeze(np.array(value))


def assert_alike(theirs: Any, ours: Any) -> None:
    """The same shape and numbers; the same words."""
    a, b = numbers(theirs), numbers(ours)
    assert a.shape == b.shape, (a.shape, b.shape)
    if a.dtype.kind in "US":
        assert a.tolist() == b.tolist()
    else:
        assert (np.isfinite(a).all() and a.std() > 0) or a.ndim == 0
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-4 * max(1.0, float(np.abs(a).max())))


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """Everything that the lines name, on one random GPT-2."""
    import transformer_lens
    from nnsight import LanguageModel
    from transformer_lens import patching
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

    tokenizer = copy.deepcopy(loaded("gpt2").tokenizer)
    tokenizer.init_kwargs |= {"name_or_path": "words", "add_bos_token": True}  # TransformerLens asks for both
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(config).eval().requires_grad_(False)
    widen(hf)
    facts = transformer_lens.HookedTransformerConfig(
        n_layers=3, d_model=32, n_ctx=32, d_head=8, n_heads=4, d_mlp=128, d_vocab=config.vocab_size, act_fn="gelu_new",
        eps=config.layer_norm_epsilon, normalization_type="LN", device="cpu", dtype=torch.float32, use_attn_result=True,
    )  # fmt: skip

    def hooked(fold: bool) -> Any:
        """TransformerLens's model with these weights, nothing centred."""
        made = transformer_lens.HookedTransformer(copy.deepcopy(facts), tokenizer=tokenizer)
        raw = dict.fromkeys(("center_writing_weights", "center_unembed", "fold_value_biases"), False)
        state = {name: weight.detach().clone() for name, weight in convert_gpt2_weights(hf, facts).items()}
        made.load_and_process_state_dict(state, fold_ln=fold, **raw)
        return made.eval().requires_grad_(False)

    tl = hooked(False)
    model = interp.load_model(hf, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(1)
    ids, corrupted = (torch.randint(4, config.vocab_size, (7,), generator=generator).tolist() for _ in range(2))
    right, wrong = 9, 11
    basis = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return logits[0, -1, right] - logits[0, -1, wrong]

    def without_head_2(z: torch.Tensor, hook: object) -> torch.Tensor:
        z = z.clone()
        z[:, :, 2] = 0
        return z

    return {
        "interp": interp, "torch": torch, "model": model, "hf": hf, "tokenizer": tokenizer, "ids": ids, "right": right,
        "wrong": wrong, "metric": metric, "without_head_2": without_head_2, "tl": tl, "patching": patching,
        "tokens": torch.tensor([ids]), "corrupted_tokens": torch.tensor([corrupted]), "text": tokenizer.decode(ids[:4]),
        "folded": hooked(True).run_with_cache(torch.tensor([ids]))[1],
        "cache": tl.run_with_cache(torch.tensor([ids]))[1], "lm": LanguageModel(copy.deepcopy(hf), tokenizer=tokenizer),
        "vector": 3 * torch.randn(32, generator=generator), "LanguageModel": LanguageModel,
        "pairs": interp.PromptPairs([ids], [corrupted], [right], [wrong]), "corrupted": corrupted,
        "HookedTransformer": types.SimpleNamespace(from_pretrained=lambda name: {"gpt2": tl}[name]),
        "rotated": interp.View(
            "rotated", at="L1.resid_post", parts=32, decoder=basis.T, read=lambda x, t: x @ t["decoder"].T, exact=True
        ),
    }  # fmt: skip


@pytest.fixture(autouse=True)
def named_models(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of the hub is the model at hand; one on a deployment goes through the simulated one."""
    load = interp.load_model

    def stand_in(name: Any, **more: Any) -> interp.Model:
        if isinstance(name, str) and "backend" in more:
            return load(names["hf"], tokenizer=names["tokenizer"], backend="simulated")
        return names["model"] if isinstance(name, str) else load(name, **more)

    monkeypatch.setattr(interp, "load_model", stand_in)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("theirs", "ours"), rows("transformer_lens"))
def test_from_transformer_lens(theirs: str, ours: str, names: dict[str, Any]) -> None:
    found = eval(ours, dict(names))
    if theirs.startswith(NOT_NUMBERS):
        assert isinstance(found, interp.plots.Figure)
        return
    assert_alike(eval(theirs, dict(names)), found)


@pytest.mark.parametrize(("theirs", "ours"), rows("nnsight"))
def test_from_nnsight(theirs: str, ours: str, names: dict[str, Any], tmp_path: Path) -> None:
    found = eval(ours, dict(names))
    if any(mark in theirs for mark in NOT_NUMBERS):
        assert isinstance(found, interp.Model)
        return
    head, body = re.fullmatch(r"(with .*?\)): (.*)", theirs).groups()  # type: ignore[union-attr]
    lines = [head + ":", *(f"    {line}" for line in body.split("; "))]
    source = tmp_path / "theirs.py"  # nnsight reads the source of the block
    source.write_text(
        "def run(lm, tokens, vector):\n" + "".join(f"    {line}\n" for line in lines) + "    return found\n"
    )
    module: dict[str, Any] = {"__name__": "theirs"}
    exec(compile(source.read_text(), str(source), "exec"), module)
    assert_alike(module["run"](names["lm"], names["tokens"], names["vector"]), found)


def test_from_pyvene(names: dict[str, Any]) -> None:
    """In the order of the lines: what each intervention does, by hooks."""
    oracle, ids, other = Oracle(names["hf"]), names["ids"], names["corrupted"]

    def difference(patch: Patch) -> float:
        logits = oracle.run(ids, [patch])[-1]
        return float(logits[names["right"]] - logits[names["wrong"]])

    basis = names["rotated"].decoder
    stream, source = (oracle.read(prompt, "resid_post", 1) for prompt in (ids, other))
    rotated = [stream + ((source - stream) @ row)[:, None] * row for row in basis[:2]]
    wanted = [
        difference(Patch("mlp_out", 1, oracle.read(other, "mlp_out", 1))),
        difference(Patch("z", 1, oracle.read(other, "z", 1), head=2)),
        oracle.run(ids, [Patch("resid_post", 0, names["vector"], op="add")]),
        oracle.run(ids, [Patch("mlp_out", 1, op="zero")]),
        oracle.read(ids, "resid_post", 1),
        [difference(Patch("resid_post", 1, value)) for value in rotated],
    ]
    lines = rows("pyvene")
    assert len(lines) == len(wanted)
    for (_, ours), want in zip(lines, wanted, strict=True):
        assert_alike(want, eval(ours, dict(names)))


def test_the_page_has_what_a_person_looks_for() -> None:
    for table, count in (("transformer_lens", 15), ("nnsight", 8), ("pyvene", 6)):
        assert len(rows(table)) >= count
    assert "theirs" not in sys.modules
