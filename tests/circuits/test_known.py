"""The models of `known` do what they say, by plain PyTorch: their programs, their circuits, their traps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ..oracle.edges import all_edges, edges
from ..oracle.hooks import Oracle
from .known import BOS, KNOWN, Known, cancelling, compiled, frac_prevs, induction, reverse, saturated


def ids(known: Known, text: str) -> list[int]:
    return known.tokenizer(text)["input_ids"]


def prompts(known: Known) -> list[tuple[list[int], list[int], int, int]]:
    """Clean and corrupted ids, answer and distractor of each pair."""
    pairs = known.pairs
    return [
        (ids(known, clean), ids(known, corrupted), ids(known, answer)[0], ids(known, distractor)[0])
        for clean, corrupted, (answer,), (distractor,) in zip(
            pairs.clean, pairs.corrupted, pairs.answers, pairs.distractors, strict=True
        )
    ]


@pytest.mark.parametrize("name", KNOWN)
def test_pairs_are_aligned_and_words_are_tokens(name: str) -> None:
    known = KNOWN[name]()
    for clean, corrupted, answer, distractor in prompts(known):
        assert len(clean) == len(corrupted) <= known.model.config.n_positions and clean != corrupted
        assert known.tokenizer.pad_token_id not in (*clean, *corrupted, answer, distractor)
        assert answer != distractor
    encoded = known.pairs.encode(known.tokenizer)
    assert encoded.aligned and known.tokenizer.convert_ids_to_tokens(encoded.clean[0])[0] == BOS


@pytest.mark.parametrize("name", KNOWN)
def test_the_edges_are_those_that_move_the_logit_difference(name: str) -> None:
    """Every edge of the model, corrupted alone: the listed ones move something, no other moves anything."""
    known = KNOWN[name]()
    oracle = Oracle(known.model)
    moved: dict[tuple[str, str], list[float]] = {edge: [] for edge in all_edges(oracle)}
    for clean, corrupted, answer, distractor in prompts(known):
        base = oracle.run(clean)[-1]
        for edge in moved:
            change = edges(oracle, clean, corrupted, [edge])[-1] - base
            moved[edge].append(float(change[answer] - change[distractor]))
    assert len(moved) == known.facts.n_edges
    sizes = {edge: max(map(abs, changes)) for edge, changes in moved.items()}
    most = max(sizes.values())
    assert known.edges == {edge for edge, size in sizes.items() if size > 1e-3 * most}
    assert all(size <= 1e-6 * most for edge, size in sizes.items() if edge not in known.edges)
    means = [abs(sum(moved[edge])) / len(moved[edge]) for edge in known.edges]
    assert name == "linear" or min(means) > 0.1 * most  # what a mean over pairs ranks by


@pytest.mark.parametrize("name", ["frac_prevs", "reverse"])
def test_tracr_programs_agree_with_tracr(name: str) -> None:
    known, program = KNOWN[name](), compiled(name)
    labels = [label for label in program.residual_labels if label.startswith(name)]
    columns = [program.residual_labels.index(label) for label in labels]
    names = ["fraction"] if name == "frac_prevs" else [label.split(":")[1] for label in labels]
    rows = [ids(known, word)[0] for word in names]
    for clean, corrupted, *_ in prompts(known):
        for prompt in (clean, corrupted):
            words = known.tokenizer.convert_ids_to_tokens(prompt)
            theirs = torch.tensor(program.apply(words).transformer_output.tolist())[0]
            ours = known.model(torch.tensor([prompt]), output_hidden_states=True)
            assert (ours.hidden_states[-1][0, :, : theirs.shape[1]] - theirs).abs().max() < 1e-6
            assert (ours.logits[0][:, rows] - theirs[:, columns]).abs().max() < 1e-6
            idle = [i for i in range(ours.logits.shape[-1]) if i not in rows]
            assert not ours.logits[0][:, idle].any()


def test_the_programs_compute_what_their_names_say() -> None:
    known = frac_prevs()
    for prompt, *_ in prompts(known):
        words = known.tokenizer.convert_ids_to_tokens(prompt)[1:]
        values = known.model(torch.tensor([prompt])).logits[0, 1:, ids(known, "fraction")[0]]
        wanted = [words[: i + 1].count("x") / (i + 1) for i in range(len(words))]
        assert values.tolist() == pytest.approx(wanted, abs=1e-5)
    known = reverse()
    for prompt, _, answer, _ in prompts(known):
        last = known.model(torch.tensor([prompt])).logits[0, -1]
        assert last.argmax() == answer == prompt[1] and last[answer] == pytest.approx(1, abs=1e-5)


def test_induction_continues_the_pair() -> None:
    known = induction()
    oracle = Oracle(known.model)
    for clean, corrupted, answer, distractor in prompts(known):
        at = clean.index(clean[-1])
        assert clean[at + 1] == answer
        probabilities = known.model(torch.tensor([clean])).logits[0, -1].softmax(-1)
        assert probabilities.argmax() == answer and probabilities[answer] > 0.99
        assert oracle.read(clean, "pattern", 1)[1, -1, at + 1] > 0.99
        previous = oracle.read(clean, "pattern", 0)[0].diagonal(-1)
        assert previous.min() > 0.99
        other = known.model(torch.tensor([corrupted])).logits[0, -1]
        assert other[answer] - other[distractor] < 0.5


def first_order(known: Known, kind: str, layer: int, head: int) -> list[tuple[float, float, float]]:
    """Of each pair: AtP's estimate at a head's q, k, v or z, the exact change, and that of the corrupted run.

    The gradient is autograd's, at the projection that computes or reads the site.
    """
    oracle, d_head = Oracle(known.model), known.model.config.n_embd // known.model.config.n_head
    attention = known.model.transformer.h[layer].attn
    module = attention.c_proj if kind == "z" else attention.c_attn
    start = head * d_head + (0 if kind == "z" else "qkv".index(kind) * known.model.config.n_embd)
    rows = []
    for clean, corrupted, answer, distractor in prompts(known):
        seen: list[Tensor] = []

        def keep(value: Tensor, seen: list[Tensor] = seen) -> Tensor:
            seen.append(value.detach().clone().requires_grad_())
            return seen[-1]

        def difference(logits: Tensor, answer: int = answer, distractor: int = distractor) -> Tensor:
            return logits[-1, answer] - logits[-1, distractor]

        if kind == "z":
            handle = module.register_forward_pre_hook(lambda _, args, keep=keep: (keep(args[0]),))
        else:
            handle = module.register_forward_hook(lambda _, __, out, keep=keep: keep(out))
        with torch.enable_grad():
            value = difference(known.model(torch.tensor([clean]), use_cache=False).logits[0])
        handle.remove()
        gradient = torch.autograd.grad(value, seen[0])[0][0, :, start : start + d_head]
        source, base = (oracle.read(p, kind, layer)[:, head] for p in (corrupted, clean))
        exact = difference(oracle.patched(clean, corrupted, kind, layer, head=head)) - value
        whole = difference(oracle.run(corrupted)) - value
        estimate = (gradient * (source - base)).sum()
        rows.append((float(estimate), float(exact.detach()), float(whole.detach())))
    return rows


def test_in_the_linear_model_the_first_order_is_exact() -> None:
    known = KNOWN["linear"]()
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for kind in ("v", "z"):
            for estimate, exact, _ in first_order(known, kind, layer, head):
                assert estimate == pytest.approx(exact, abs=1e-6) and abs(exact) > 1e-3
        for kind in ("q", "k"):
            assert all(exact == 0 for _, exact, _ in first_order(known, kind, layer, head))


def test_the_saturated_softmax_hides_q_and_k() -> None:
    for kind in ("q", "k"):
        assert f"L1.H0.{kind}" in saturated().missed
        for estimate, exact, whole in first_order(saturated(), kind, 1, 0):
            assert estimate == 0 and exact == pytest.approx(-2, abs=1e-6)
            assert whole == pytest.approx(-2, abs=1e-6)
    assert all(e == pytest.approx(x, abs=1e-6) for e, x, _ in first_order(saturated(), "v", 1, 0))


def test_the_cancellation_hides_the_head() -> None:
    assert cancelling().missed == ("L0.H0",)
    for estimate, exact, whole in first_order(cancelling(), "z", 0, 0):
        assert abs(estimate) < 1e-6 and exact == whole == pytest.approx(-1, abs=1e-6)
