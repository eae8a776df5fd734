"""Prompts that are not what they seem: encodings, tensors and arrays are taken as what they are, anything else is refused."""

from __future__ import annotations

import warnings
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import interp
from interp import PromptPairs
from interp.engine.reading import encode_prompts
from interp.errors import AnswerError, PairsError
from interp.lens import attention_patterns, direct_effects, logit_lens
from interp.prompts import one_prompt, prompts_of

from .families import count_forwards, loaded, words
from .oracle.configs import tokenizer

TEXTS = ["the king went to Paris", "the queen said yes and the dog"]
IDS = [tuple(tokenizer()(text)["input_ids"]) for text in TEXTS]
A, B = [3, 5, 6, 8, 10], [4, 5, 6, 8, 10, 11]


class Jaxlike:
    """An array of another library: no `tolist`, and numpy makes what it can of it."""

    def __init__(self, values: Any) -> None:
        self.values = np.array(values)

    def __array__(self) -> np.ndarray:
        return self.values

    def __len__(self) -> int:
        return len(self.values)


def padded(side: str, tensors: str | None) -> Any:
    made = tokenizer()
    made.padding_side = side
    return made(TEXTS, padding=True, return_tensors=tensors)


TWO: dict[str, Callable[[], Any]] = {
    "texts": lambda: TEXTS,
    "an array of texts": lambda: np.array(TEXTS),
    "a series of texts": lambda: pd.Series(TEXTS),
    "an encoding": lambda: tokenizer()(TEXTS),
    "its ids": lambda: tokenizer()(TEXTS)["input_ids"],
    "padded on the left": lambda: padded("left", "pt"),
    "padded on the right": lambda: padded("right", "np"),
    "padded lists": lambda: padded("left", None),
    "a plain dictionary": lambda: dict(padded("right", "pt")),
    "a list of tensors under input_ids": lambda: {"input_ids": [torch.tensor(ids) for ids in IDS]},
    "a list of encodings": lambda: [tokenizer()(text) for text in TEXTS],
    "a list of encodings as tensors": lambda: [tokenizer()(text, return_tensors="pt") for text in TEXTS],
    "batches of a loader": lambda: [dict(padded("left", "pt"))],
    "tokenizers' own": lambda: tokenizer()._tokenizer.encode_batch(TEXTS),
    "padded by tokenizers": lambda: padded("left", None).encodings,
    "a list of 1-D tensors": lambda: [torch.tensor(ids) for ids in IDS],
    "a list of [1, n] tensors": lambda: [torch.tensor([ids]) for ids in IDS],
    "a list of arrays": lambda: [np.array(ids) for ids in IDS],
    "a tuple of tuples": lambda: tuple(IDS),
    "lists of 0-D tensors": lambda: [[torch.tensor(token) for token in ids] for ids in IDS],
    "ragged objects": lambda: np.array([list(ids) for ids in IDS], dtype=object),
    "text and ids": lambda: [TEXTS[0], torch.tensor(IDS[1])],
    "a generator": lambda: (ids for ids in IDS),
}
ONE: dict[str, Callable[[], Any]] = {
    "a tensor": lambda: torch.tensor(A),
    "int32": lambda: torch.tensor(A, dtype=torch.int32),
    "an array": lambda: np.array(A),
    "uint8": lambda: np.array(A, dtype=np.uint8),
    "an array of another library": lambda: Jaxlike(A),
    "[1, n]": lambda: torch.tensor([A]),
    "[1, n] of another library": lambda: Jaxlike([A]),
    "a series": lambda: pd.Series(A),
    "an encoding of one text": lambda: UserDict(input_ids=A, attention_mask=[1] * 5),
    "an encoding without a mask": lambda: {"input_ids": A, "attention_mask": None, "token_type_ids": [0] * 5},
    "one padded row": lambda: {
        "input_ids": torch.tensor([[0, 0, *A]]),
        "attention_mask": torch.tensor([[0, 0, *[1] * 5]]),
    },
    "a mask of floats": lambda: {"input_ids": [[*A, 9]], "attention_mask": np.array([[1.0] * 5 + [0.0]])},
    "a mask of bools": lambda: {"input_ids": [A], "attention_mask": torch.ones(1, 5, dtype=torch.bool)},
    "a list of one": lambda: [A],
}


@pytest.mark.parametrize("form", TWO)
def test_two_prompts_in_every_form(form: str) -> None:
    encoded = PromptPairs(TWO[form](), TWO[form]()).encode(tokenizer())
    assert encoded.clean == encoded.corrupted == tuple(IDS)


@pytest.mark.parametrize("form", ONE)
def test_one_prompt_in_every_form(form: str) -> None:
    assert list(prompts_of("text", ONE[form]())) == [tuple(A)] == [one_prompt("text", ONE[form]())]
    assert PromptPairs(ONE[form](), ONE[form](), [3], [4]).clean == (tuple(A),)


def test_a_matrix_is_one_prompt_per_row() -> None:
    for rows in (torch.tensor([A, B[:5]]), np.array([A, B[:5]]), Jaxlike([A, B[:5]])):
        assert PromptPairs(rows).clean == (tuple(A), tuple(B[:5]))


NONE: dict[str, tuple[Callable[[], Any], str]] = {
    "a flat list": (lambda: A, r"text 0 is the one id 3; .*write \[\[3, …\]\]"),
    "a flat list of numpy's": (lambda: list(np.array(A)), r"text 0 is the one id 3;"),
    "a flat list of 0-D tensors": (lambda: list(torch.tensor(A)), r"text 0 is the one id 3;"),
    "a range": (lambda: range(3), r"text 0 is the one id 0;"),
    "a number": (lambda: 5, r"text needs a list of prompts, but is 5"),
    "a 0-D tensor": (lambda: torch.tensor(5), r"text needs a list of prompts, but is 5"),
    "text": (lambda: "the king", r"text needs a list with one entry per pair, but is 'the king'; write \['the king'\]"),
    "None": (lambda: None, r"text needs a list of prompts, but is None"),
    "None among prompts": (lambda: ["the king", None], r"text 1 is None; a prompt is"),
    "bytes": (lambda: b"the king", r"text needs a list of prompts, but is b'the king'"),
    "bytes among prompts": (lambda: [b"the king"], r"text 0 is b'the king'"),
    "floats": (lambda: torch.tensor([1.0, 2.0]), r"text 0 holds 1\.0: neither text nor a whole number"),
    "rows of floats": (lambda: np.array([[1.0, 2.0]]), r"text 0 holds 1\.0"),
    "a float among prompts": (lambda: [0.5], r"text 0 is 0\.5"),
    "bools": (lambda: torch.tensor([True, False]), r"text 0 holds True"),
    "a list of bools": (lambda: [[True, False]], r"text 0 holds True"),
    "nested text": (lambda: [["the king", "the queen"]], r"text 0 holds 'the king'"),
    "an array of nested text": (lambda: np.array([["the", "king"]]), r"text 0 holds 'the'"),
    "three dimensions": (lambda: torch.ones(2, 2, 3, dtype=torch.long), r"text 0 holds a list, \[1, 1, 1\]"),
    "three dimensions of lists": (lambda: [[[1, 2], [3, 4]]], r"text 0 holds a list, \[1, 2\]"),
    "matrices in a list": (lambda: [torch.tensor([A, A])], r"text 0 holds a list, \[3, 5, 6, 8, 10\]"),
    "a batch of a tensor data set": (lambda: [[torch.tensor([A])]], r"text 0 holds a list"),
    "an empty array": (lambda: torch.ones(0, dtype=torch.long), r"text 0 is empty, shape \[0\]"),
    "empty rows": (lambda: np.ones((2, 0), int), r"text 0 is empty, shape \[0\]"),
    "an empty list among prompts": (lambda: [A, []], r"text 1 is empty, shape \[0\]"),
    "a set": (lambda: {1, 2}, r"text needs a list of prompts, but is \{1, 2\}"),
    "a set among prompts": (lambda: [{1, 2}], r"text 0 is \{1, 2\}"),
    "a row of a data set": (lambda: {"text": "a", "label": 1}, r"a dict of \['label', 'text'\] without input_ids"),
    "messages": (
        lambda: [{"role": "user", "content": "hi"}],
        r"text 0 is a dict of \['content', 'role'\] without input_ids",
    ),
    "a tensor without data": (
        lambda: torch.ones(3, dtype=torch.long, device="meta"),
        r"a Tensor that holds no numbers",
    ),
    "a mask of another length": (
        lambda: {"input_ids": [[1, 2, 3]], "attention_mask": [[1, 1]]},
        r"text has input_ids of \[3\] tokens, but an attention_mask of \[2\]",
    ),
    "a mask of other rows": (
        lambda: {"input_ids": [[1], [2]], "attention_mask": [[1]]},
        r"of \[1, 1\] tokens, but .* \[1\]",
    ),
    "a mask with a hole": (
        lambda: {"input_ids": [[7, 8], [1, 2, 3]], "attention_mask": [[1, 1], [1, 0, 1]]},
        r"attention_mask of row 1 leaves out tokens between others",
    ),
    "a mask that leaves out all": (
        lambda: {"input_ids": [[1, 2]], "attention_mask": [[0, 0]]},
        r"attention_mask of row 0 leaves out all 2 tokens",
    ),
    "an additive mask": (
        lambda: {"input_ids": [[1, 2]], "attention_mask": torch.tensor([[float("-inf"), 0.0]])},
        r"attention_mask of row 0 holds \[-inf, 0\.0\]; it is 0 and 1",
    ),
    "a picture beside the ids": (
        lambda: {"input_ids": [[1, 2]], "pixel_values": torch.ones(1, 3, 2, 2)},
        r"holds pixel_values beside input_ids",
    ),
    "embeddings": (lambda: {"inputs_embeds": torch.ones(1, 2, 4)}, r"a dict of \['inputs_embeds'\] without input_ids"),
    "ids of another kind": (lambda: {"input_ids": 5}, r"text has input_ids 5"),
    "text under input_ids": (lambda: {"input_ids": ["the king"]}, r"text 0 holds 'the king'"),
}


@pytest.mark.parametrize("form", NONE)
def test_what_is_no_prompt_is_told(form: str) -> None:
    make, message = NONE[form]
    with pytest.raises(PairsError, match=message):
        list(prompts_of("text", make()))
    with pytest.raises(PairsError):
        PromptPairs(make(), None, [3], [4])
    if form not in ("a flat list", "a flat list of numpy's", "a flat list of 0-D tensors", "a range", "text"):
        with pytest.raises(PairsError):
            one_prompt("prompt", make())


def test_where_one_prompt_is_wanted_a_flat_list_is_one_and_two_are_refused() -> None:
    for ids in (A, tuple(A), list(np.array(A)), list(torch.tensor(A))):
        assert one_prompt("prompt", ids) == tuple(A)
    for several in ([A, B], torch.tensor([A, A]), TEXTS, padded("left", "pt")):
        with pytest.raises(PairsError, match="prompt is 2 prompts, and one prompt is wanted"):
            one_prompt("prompt", several)


@pytest.fixture(scope="module")
def model() -> Iterator[interp.Model]:
    yield loaded("gpt2")


def test_every_method_takes_an_encoding_and_drops_its_padding(model: interp.Model) -> None:
    """Right values: transformers' own forward pass of each prompt alone."""
    batch = padded("left", "pt")
    with torch.no_grad():
        runs = [model.hf(torch.tensor([ids]), output_hidden_states=True) for ids in IDS]
    logits = torch.stack([run.logits[0, -1] for run in runs])
    effects = interp.patch(
        model, PromptPairs(batch, batch, [20, 21], [33, 34]), interp.grid("z", layers=0, positions=-1)
    )
    want = logits[[0, 1], [20, 21]] - logits[[0, 1], [33, 34]]
    torch.testing.assert_close(torch.tensor(effects.clean.values), want, atol=1e-4, rtol=1e-5)
    lens = logit_lens(model, batch, layers=-1, positions=-1, top_k=1)
    assert lens["token"].values.ravel().tolist() == logits.argmax(-1).tolist()
    got = interp.collect_activations(model, batch, 1, "resid_post")
    want = torch.cat([run.hidden_states[2][0] for run in runs])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    rows, index = interp.collect_activations(model, [batch, torch.tensor(IDS[0])], 1, index=True)
    assert len(rows) == sum(map(len, IDS)) + len(IDS[0]) and index[:, 0].unique().tolist() == [0, 1, 2]
    assert encode_prompts(model, batch).clean == tuple(IDS)


def test_where_one_prompt_is_wanted_a_tensor_of_one_row_is_one(model: interp.Model) -> None:
    want = attention_patterns(model, TEXTS[0])
    for given in (tokenizer()(TEXTS[0]), torch.tensor([IDS[0]]), np.array(IDS[0]), list(IDS[0])):
        np.testing.assert_array_equal(attention_patterns(model, given), want)
    runs = [torch.tensor([A]), torch.tensor([B[:5]])]
    options: dict[str, Any] = {"components": ["z"], "answer_tokens": torch.tensor([20, 33])}
    got = interp.comprehensive_activation_patching(model, *runs, **options)
    want = interp.comprehensive_activation_patching(model, A, B[:5], **options)
    np.testing.assert_array_equal(got.values, want.values)
    assert got.sizes["pair"] == 1 if hasattr(got, "sizes") else len(got.clean) == 1
    kept = interp.iterative_pruning(model, tokenizer()(TEXTS[0], return_tensors="pt"), [20, 33], threshold=1e9)
    assert not kept.heads and kept.meta["metric_value"] is not None


def test_references_may_be_encodings(model: interp.Model) -> None:
    pairs = PromptPairs([A], [B[:5]], [20], [33])
    want = interp.ablate(model, pairs, interp.heads("z"), "mean", reference=TEXTS)
    got = interp.ablate(model, pairs, interp.heads("z"), "mean", reference=padded("right", "np"))
    np.testing.assert_allclose(got.values, want.values, atol=1e-6)
    circuit = interp.Circuit.from_nodes(["L1.H0"], model)
    options: dict[str, Any] = {"ablation": "mean"}
    want = interp.run_circuit(model, pairs, circuit, reference=TEXTS, **options)
    got = interp.run_circuit(model, pairs, circuit, reference=padded("left", "pt"), **options)
    np.testing.assert_allclose(got, want, atol=1e-6)


def padded_ids(side: str = "left") -> Any:
    return padded(side, "pt")["input_ids"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_its_mask_is_warned_of_once(side: str, model: interp.Model) -> None:
    said = "clean of pair 0 begins or ends with the padding token '<pad>': ids are taken as they are"
    with pytest.warns(UserWarning, match=said) as seen:
        PromptPairs(padded_ids(side)).encode(tokenizer())
    assert len(seen) == 1
    with pytest.warns(UserWarning, match="clean of pair 0 and 1 more begins or ends"):
        PromptPairs(padded_ids(side), padded_ids(side)).encode(tokenizer())
    with pytest.warns(UserWarning, match="text 0 begins or ends with the padding token") as seen:
        interp.collect_activations(model, torch.cat([padded_ids(side)] * 2), 1)
    assert len(seen) == 1
    ends = tokenizer()
    ends.pad_token = ends.eos_token  # as GPT-2 is used: one may be the text's own beginning or end, two are padding
    with pytest.warns(UserWarning, match="padding token '<eos>'"):
        PromptPairs([[2, 2, 5, 6]]).encode(ends)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PromptPairs([[2, 5, 6, 2], [5, 2, 2, 6]]).encode(ends)
        PromptPairs(padded(side, "pt")).encode(tokenizer())
        PromptPairs(["<pad> the king <pad>"]).encode(tokenizer())
        PromptPairs([[0, 5, 0]]).encode(None)
        interp.collect_activations(model, padded(side, "pt"), 1)


def test_answers_are_no_encodings() -> None:
    for wrong in (tokenizer()([" Paris"]), {3, 4}, {"right": 3}):
        with pytest.raises(PairsError, match=r"answers needs a list with one entry per pair, but is a "):
            PromptPairs([A], None, wrong)
    with pytest.raises(PairsError, match="answers of pair 0 holds True"):
        PromptPairs([A], None, [True])
    for tokens in (None, {3: 1, 4: 2}, {3, 4}, torch.tensor(3), tokenizer()("Paris")):
        with pytest.raises(AnswerError, match=r"give \[right, wrong\]"):
            PromptPairs.one({"prompt": A}, tokens)


# --- tokenizers that put something behind the text ---------------------------------------------------------


def ending(single: str = "$A <eos>") -> PreTrainedTokenizerFast:
    made = tokenizer()
    special = [(token, made.convert_tokens_to_ids(token)) for token in ("<bos>", "<eos>")]
    made._tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return made


@pytest.fixture(scope="module")
def appending() -> interp.Model:
    return interp.load_model(loaded("gpt2").hf, tokenizer=ending())


STRINGS = PromptPairs(
    ["the king went to", "the queen said"], ["the dog went to", "the cat said"], [" Paris"] * 2, [" Rome"] * 2
)


@pytest.mark.parametrize("single", ["$A <eos>", "<bos> $A <eos>", "$A <eos> <eos>"])
def test_an_answer_behind_what_the_tokenizer_appends_is_refused(single: str) -> None:
    behind = single.split("$A")[1].count("<eos>")
    with pytest.raises(PairsError) as error:
        STRINGS.encode(ending(single))
    said = str(error.value)
    assert "clean of pair 0" in said and "'<eos>' (id 2)" in said and f"answer_positions={-1 - behind}" in said
    assert "tokenizer.add_eos_token=False" in said and "token ids" in said
    for at in (-1 - behind, -1):  # given, then taken
        pairs = PromptPairs(STRINGS.clean, STRINGS.corrupted, STRINGS.answers, answer_positions=at)
        assert (
            pairs.encode(ending(single)).answer_positions[0] == len(ending(single)(STRINGS.clean[0])["input_ids"]) + at
        )


def test_what_stands_in_the_text_itself_is_taken() -> None:
    assert PromptPairs(["the king <eos>"]).encode(tokenizer()).clean[0][-1] == 2
    assert PromptPairs([ending()("the king")["input_ids"]]).encode(ending()).clean[0][-1] == 2
    assert PromptPairs(ending()(["the king"])).encode(ending()).clean[0][-1] == 2
    with pytest.raises(PairsError, match=r"'<eos>' \(id 2\) behind the text"):
        PromptPairs(["the king <eos>"]).encode(ending())
    assert PromptPairs(["the king"]).encode(ending("<bos> $A"), prefix_ids=(1,)).clean[0][0] == 1
    one = PromptPairs([[4, 5], "the king"], None, answer_positions=[None, -2])
    assert one.encode(ending()).answer_positions == (1, 1) and (one + one)[1:3].answer_positions == (-2, None)


def test_a_separator_and_a_text_that_is_cut_up_otherwise_alone() -> None:
    """BERT's [SEP]; and a tokenizer whose ids of the text are not among its ids with special tokens."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "the": 3, "king": 4, "▁the": 5}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    bert = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    with pytest.raises(PairsError, match=r"'\[SEP\]' \(id 2\) behind"):
        PromptPairs(["the king"]).encode(bert)

    class Otherwise:
        all_special_ids = (1, 2)

        def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, 5, 4, 2] if add_special_tokens else [3, 4]}

        def __getattr__(self, name: str) -> Any:
            return getattr(bert, name)

    with pytest.raises(PairsError, match=r"'\[SEP\]' \(id 2\) behind"):
        PromptPairs(["the king"]).encode(Otherwise())


METHODS: dict[str, Callable[[interp.Model], Any]] = {
    "patch": lambda model: interp.patch(model, STRINGS, interp.grid("z")),
    "patch with kl": lambda model: interp.patch(model, STRINGS, interp.grid("z"), interp.kl),
    "path_patch": lambda model: interp.path_patch(model, STRINGS, ["L0.H0"]),
    "attribute": lambda model: interp.attribute(model, STRINGS, interp.grid("z")),
    "ablate": lambda model: interp.ablate(model, STRINGS, interp.grid("z")),
    "ablate with means": lambda model: interp.ablate(model, STRINGS, interp.grid("z"), "mean"),
    "ablate with others": lambda model: interp.ablate(model, STRINGS, interp.grid("z"), "resample"),
    "discover": lambda model: interp.discover(model, STRINGS),
    "run_circuit": lambda model: interp.run_circuit(model, STRINGS, ["L0.H0"], "mean"),
    "evaluate_circuit": lambda model: interp.evaluate_circuit(
        model, STRINGS, interp.Circuit.from_nodes(["L0.H0"], model), "mean"
    ),
    "iterative_pruning": lambda model: interp.iterative_pruning(model, STRINGS.clean[0], [20, 33]),
    "comprehensive": lambda model: interp.comprehensive_activation_patching(
        model, STRINGS.clean[0], STRINGS.corrupted[0], [20, 33]
    ),
    "causal_trace": lambda model: interp.causal_trace(
        model, PromptPairs(STRINGS.clean, None, STRINGS.answers, positions={"subject": 1})
    ),
    "direct_effects": lambda model: direct_effects(model, STRINGS),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_reads_an_answer_refuses_before_the_model_runs(method: str, appending: interp.Model) -> None:
    forwards, stop = count_forwards(appending)
    with pytest.raises(PairsError, match=r"the tokenizer puts '<eos>' \(id 2\) behind the text 'the king went to'"):
        METHODS[method](appending)
    stop()
    assert not forwards


def test_methods_that_read_no_answer_take_the_text_as_the_tokenizer_makes_it(appending: interp.Model) -> None:
    ids = [ending()(text)["input_ids"] for text in STRINGS.clean]
    assert len(interp.collect_activations(appending, STRINGS, 1)) == sum(map(len, ids))
    assert logit_lens(appending, STRINGS.clean, layers=0).sizes["position"] == max(map(len, ids))
    assert attention_patterns(appending, STRINGS.clean[0]).sizes["query"] == len(ids[0])
    pairs = PromptPairs([A], [B[:5]], [20], [33])
    interp.ablate(appending, pairs, interp.heads("z"), "mean", reference=STRINGS.clean)


def test_the_position_that_is_named_gives_the_answer_of_the_text(appending: interp.Model) -> None:
    pairs = PromptPairs(STRINGS.clean, STRINGS.corrupted, STRINGS.answers, STRINGS.distractors, answer_positions=-2)
    effects = interp.patch(appending, pairs, interp.grid("z", layers=0, positions=0))
    for row, text in enumerate(STRINGS.clean):
        with torch.no_grad():
            logits = appending.hf(torch.tensor([tokenizer()(text)["input_ids"]])).logits[0, -1]
        right, wrong = (tokenizer().convert_tokens_to_ids(word) for word in ("Paris", "Rome"))
        assert float(effects.clean[row]) == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-4)


# --- answers that are distractors too ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "distractors", "said"),
    [
        ([20], [20], r"pair 0 share \[.*\] \(ids \[20\]\)"),
        ([[20, 21]], [[33, 21]], r"\(ids \[21\]\)"),
        ([" Paris"], [tokenizer().convert_tokens_to_ids("Paris")], r"share \['Paris'\]"),
        ([" Paris"], ["Paris"], r"share \['Paris'\]"),
    ],
)
def test_answers_that_are_distractors_are_refused(
    answers: Any, distractors: Any, said: str, model: interp.Model
) -> None:
    forwards, stop = count_forwards(model)
    pairs = PromptPairs([A], [B[:5]], answers, distractors)
    with pytest.raises(AnswerError, match=said):
        interp.patch(model, pairs, interp.grid("z"))
    stop()
    assert not forwards
    other = PromptPairs([A, B], None, [20, *answers], [33, *distractors])
    with pytest.raises(AnswerError, match="answers and distractors of pair 1 share"):
        model.encode(other)


def test_pairs_may_have_each_others_answers(model: interp.Model) -> None:
    assert model.encode(PromptPairs(words(4, 4), None, [20, 21], [21, 20])).answers == ((20,), (21,))
