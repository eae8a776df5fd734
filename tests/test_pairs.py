"""Prompt pairs: what they become as tokens, and every way in which they can be refused."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from interp.errors import AnswerError, PairsError
from interp.pairs import EncodedPairs, PromptPairs
from tests.toy_tokenizers import byte_level, sentencepiece_like, word_level

TEXTS = [
    " The Eiffel Tower is in the city of Paris",
    " The Colosseum stands in the city of Rome",
    " The Red Fort is in Delhi near The Gate",
] * 3  # fmt: skip
CLEAN, CORRUPTED = " The Eiffel Tower is in the city of", " The Colosseum is in the city of"


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level(TEXTS)


@pytest.fixture
def landmark() -> PromptPairs:
    """One pair of unequal length: two tokens of subject against one."""
    return PromptPairs(
        [CLEAN],
        [CORRUPTED],
        [" Paris"],
        [" Rome"],
        positions={"subject": [{"clean": "Eiffel Tower", "corrupted": "Colosseum"}]},
        name="landmarks",
    )


def ids_of(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- what pairs become -------------------------------------------------------------------------------------


def test_strings_become_tokens_behind_the_prefix_and_ids_stay_as_they_are(tokenizer):
    ids = ids_of(tokenizer, CLEAN)
    encoded = PromptPairs([CLEAN, ids], [CORRUPTED, ids]).encode(tokenizer, prefix_ids=(0,))
    assert encoded.clean == ((0, *ids), ids)
    assert encoded.labels[1] == (" The", " Eiffel", " Tower", " is", " in", " the", " city", " of")
    assert encoded.corrupted[0] == (0, *ids_of(tokenizer, CORRUPTED))
    assert encoded.corrupted_labels[0][:3] == ("<s>", " The", " Colosseum")


def test_a_prompt_that_begins_with_the_prefix_gets_no_second_one():
    adds_bos = byte_level(TEXTS, bos=True)
    encoded = PromptPairs([CLEAN, "<s>" + CLEAN]).encode(byte_level(TEXTS), prefix_ids=(0,))
    own = PromptPairs([CLEAN], positions={"subject": ["Eiffel"]}).encode(adds_bos, prefix_ids=(0,))
    assert own.clean[0] == encoded.clean[0] == encoded.clean[1] == (0, *ids_of(adds_bos, CLEAN))
    assert own.positions["subject"][0][0] == (2,)  # <s>, The, Eiffel


def test_answers_are_sets_of_distinct_tokens(tokenizer):
    paris, rome = ids_of(tokenizer, " Paris Rome")
    pairs = PromptPairs([CLEAN] * 3, None, [" Paris", rome, [" Rome", paris, " Rome"]], [rome, [7, 8], 9])
    encoded = pairs.encode(tokenizer)
    assert PromptPairs([CLEAN], None, [{" Paris", " Delhi"}]).answers == ((" Delhi", " Paris"),)
    assert encoded.answers == ((paris,), (rome,), (rome, paris))
    assert encoded.distractors == ((rome,), (7, 8), (9,))
    assert encoded.corrupted is None and encoded.corrupted_labels == ()


def test_without_a_tokenizer_ids_still_work_and_have_fallback_labels():
    encoded = PromptPairs([[5, 6, 7]], [[5, 9, 7]], [3], [4]).encode(None, prefix_ids=(1,), vocab_size=10)
    assert encoded.clean == ((5, 6, 7),)
    assert encoded.labels == (("<5>", "<6>", "<7>"),)


def test_an_id_that_the_tokenizer_does_not_know_is_labelled_by_its_number(tokenizer):
    beyond = len(tokenizer) + 5
    assert PromptPairs([[1, beyond]]).encode(tokenizer, vocab_size=beyond + 1).labels[0][1] == f"<{beyond}>"


def test_tensors_and_arrays_are_prompts_too():
    ids = torch.tensor([[1, 2], [3, 4]])
    pairs = PromptPairs(ids, list(ids.numpy()), torch.tensor([5, 6]), torch.tensor([[7, 8], [9, 1]]))
    assert pairs.clean == pairs.corrupted == ((1, 2), (3, 4))
    assert pairs.answers == ((5,), (6,)) and pairs.distractors == ((7, 8), (9, 1))


def test_positions_count_from_the_first_token_with_the_prefix_and_negative_from_the_end(tokenizer):
    pairs = PromptPairs(
        [CLEAN],
        [CORRUPTED],
        positions={"a": [2], "b": [[0, -1]], "c": [{"clean": [2, 3], "corrupted": -1}], "end": -1},
        answer_positions=-2,
    )
    encoded = pairs.encode(tokenizer, prefix_ids=(0,))  # 9 clean tokens, 8 corrupted ones
    assert encoded.positions["a"] == (((2,), (2,)),)
    assert encoded.positions["b"] == (((0, 8), (0, 7)),)
    assert encoded.positions["c"] == (((2, 3), (7,)),)
    assert encoded.positions["end"] == (((8,), (7,)),)
    assert (encoded.answer_positions, encoded.answer_positions_corrupted) == ((7,), (6,))


@pytest.mark.parametrize("make", [byte_level, word_level, sentencepiece_like])
def test_substrings_are_found_by_their_characters_in_every_shape_of_tokenizer(make):
    tokenizer = make([text for text in TEXTS if "Red" not in text])
    prefix = (tokenizer.bos_token_id,)
    subject = {"clean": "Eiffel Tower", "corrupted": "Colosseum"}
    encoded = PromptPairs([CLEAN], [CORRUPTED], positions={"subject": [subject]}).encode(tokenizer, prefix)
    ((clean, corrupted),) = encoded.positions["subject"]
    assert [encoded.labels[0][p].strip() for p in clean] == ["Eiffel", "Tower"]
    assert [encoded.corrupted_labels[0][p].strip() for p in corrupted] == ["Colosseum"]
    unknown = PromptPairs([CLEAN], positions={"part": ["iffel To"]}).encode(tokenizer, prefix)
    assert unknown.positions["part"][0][0] == clean  # a part of a token is that token


def test_first_difference(tokenizer):
    a, b = [1, 2, 3, 4], [1, 2, 9, 4]
    encoded = PromptPairs([a, a, a[:2], a], [b, a, a, [5, 2]]).encode(None)
    assert encoded.first_difference == (2, 4, 2, 0)
    assert PromptPairs([a]).encode(None).first_difference == (0,)


def test_digest_is_stable_across_processes_and_changes_with_every_part():
    pairs = PromptPairs([[1, 2, 3]], [[1, 4, 3]], [5], [6], positions={"x": [1]})
    code = (
        "from interp.pairs import PromptPairs; print(PromptPairs([[1, 2, 3]], [[1, 4, 3]], [5], [6], "
        "positions={'x': [1]}).encode(None).digest)"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    encoded = pairs.encode(None)
    assert re.fullmatch("[0-9a-f]{64}", encoded.digest) and other.stdout.strip() == encoded.digest
    changed = {
        "clean": ((1, 2, 7),), "corrupted": None, "answers": ((8,),), "distractors": ((8,),),
        "labels": (("a", "b", "c"),), "corrupted_labels": (("a", "b", "c"),), "positions": {},
        "answer_positions": (0,), "answer_positions_corrupted": (0,),
    }  # fmt: skip
    assert set(changed) == {field.name for field in dataclasses.fields(EncodedPairs)}
    digests = {dataclasses.replace(encoded, **{name: value}).digest for name, value in changed.items()}
    assert len(digests | {encoded.digest}) == len(changed) + 1


# --- pairs as values ---------------------------------------------------------------------------------------


def test_pairs_are_chosen_joined_and_iterated(landmark):
    three = landmark + landmark + landmark
    assert len(three) == 3 and three.name == "landmarks"
    assert three[1] == three[-1] == three[[0]] == landmark and three[:2] == landmark + landmark
    assert list(three) == [landmark] * 3
    assert three[np.int64(1)] == landmark and three[np.array([0, 2])] == landmark + landmark
    assert three[[True, False, False]] == three[np.array([False, True, False])] == landmark
    with pytest.raises(dataclasses.FrozenInstanceError):
        landmark.name = "other"


def test_swap_exchanges_prompts_answers_and_sides_of_positions(landmark, tokenizer):
    swapped, encoded = landmark.swap().encode(tokenizer), landmark.encode(tokenizer)
    assert (swapped.clean, swapped.corrupted) == (encoded.corrupted, encoded.clean)
    assert (swapped.answers, swapped.distractors) == (encoded.distractors, encoded.answers)
    assert swapped.positions["subject"][0] == encoded.positions["subject"][0][::-1]
    assert landmark.swap().swap() == landmark


def test_the_printed_form_is_one_short_line(landmark, tokenizer):
    for shown in (repr(landmark), repr(landmark.encode(tokenizer))):
        assert "\n" not in shown and len(shown) < 150
    assert "not aligned" in repr(landmark.encode(tokenizer))


# --- alignment ---------------------------------------------------------------------------------------------


def test_require_aligned_shows_the_two_token_lists_side_by_side(landmark, tokenizer):
    equal = PromptPairs([CLEAN], [CLEAN], [" Paris"], [" Rome"], positions={"subject": ["Tower"]})
    encoded = (equal + landmark).encode(tokenizer, prefix_ids=(0,))
    assert not encoded.aligned
    with pytest.raises(PairsError) as error:
        encoded.require_aligned("grid(resid_pre)")
    lines = str(error.value).splitlines()
    assert lines[0].startswith("grid(resid_pre)") and "pair 1 has 9 clean and 8 corrupted tokens" in lines[0]
    rows = [line.split() for line in lines[2:-1]]
    assert rows[0] == ["0", "'<s>'", "'<s>'"] and len(rows) == 9
    assert lines[4].split() == ["*", "2", "'", "Eiffel'", "'", "Colosseum'"]
    assert lines[-2].split() == ["*", "8", "'", "of'", "-"]
    assert "positions=" in lines[-1]


def test_aligned_pairs_pass(tokenizer):
    for pairs in (PromptPairs([CLEAN], [CLEAN.replace("Eiffel", "Red")]), PromptPairs([CLEAN, CORRUPTED])):
        encoded = pairs.encode(tokenizer)
        assert encoded.aligned
        encoded.require_aligned("anything")


# --- refusals: the message names the object, its place and the remedy ---------------------------------------

GOOD = {"clean": [[1, 2]] * 2, "corrupted": [[1, 3]] * 2, "answers": [4, 5], "distractors": [6, 7]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"clean": []}, ["no prompt pairs", "[0]", "give at least one"]),
        ({"clean": "The"}, ["clean needs a list", "['The']"]),
        ({"clean": [1, 2]}, ["clean of pair 0", "one id 1", "list of ids"]),
        ({"clean": [[1, 2], []]}, ["clean of pair 1", "empty", "[0]"]),
        ({"clean": [[1, 2], ""]}, ["clean of pair 1", "empty"]),
        ({"corrupted": [[1, 2]]}, ["clean [2]", "corrupted [1]", "pair 1", "one entry per pair"]),
        ({"answers": [4, 5, 6]}, ["answers [3]", "pair 2"]),
        ({"distractors": [4]}, ["distractors [1]", "pair 1"]),
        ({"answers": " Paris"}, ["answers needs a list", "[' Paris']"]),
        ({"answers": [4, []]}, ["answers of pair 1", "empty set"]),
        ({"answers": [4, 0.5]}, ["answers of pair 1", "0.5"]),
        ({"clean": [[1, 2], [1.5]]}, ["clean of pair 1", "1.5"]),
        ({"positions": {"subject": [1]}}, ["positions['subject'] [1]", "pair 1"]),
        ({"positions": {"subject": [1, []]}}, ["positions['subject'] of pair 1", "empty"]),
        ({"positions": {"subject": [1, {"clean": 1}]}}, ["pair 1", "['clean']", "corrupted"]),
        ({"positions": {"subject": [1, {"clean": 1, "corrupted": 1, "other": 2}]}}, ["pair 1", "other"]),
        ({"positions": {"subject": [1, ["x"]]}}, ["positions['subject'] of pair 1", "'x'"]),
        ({"answer_positions": [0]}, ["answer_positions [1]", "pair 1"]),
    ],
)
def test_pairs_that_do_not_fit_together_are_refused_when_made(change, said):
    with pytest.raises(PairsError) as error:
        PromptPairs(**(GOOD | change))
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (PromptPairs([[1, 2], [1, 300]]), ["clean of pair 1", "[2]", "id 300", "position 1", "0..299"]),
        (PromptPairs([[1, 2]], [[1, -2]]), ["corrupted of pair 0", "id -2"]),
        (PromptPairs([[1]], answers=[300]), ["answers of pair 0", "id 300", "0..299"]),
        (PromptPairs([[1]], answers=[1], distractors=[[2, 301]]), ["distractors of pair 0", "id 301"]),
        (PromptPairs([[1, 2], [1]], positions={"s": [1, 1]}), ["positions['s'] of pair 1", "[1]", "0..0"]),
        (PromptPairs([[1, 2]], [[1]], positions={"s": [1]}), ["pair 0", "position 1", "corrupted prompt"]),
        (PromptPairs([[1, 2]], positions={"s": [-3]}), ["position -3", "-2..-1", "<1>"]),
        (PromptPairs([[1, 2]], answer_positions=[2]), ["answer_positions of pair 0", "position 2", "0..1"]),
        (PromptPairs(["The"]), ["clean of pair 0", "'The'", "no tokenizer", "token ids"]),
        (PromptPairs([[1]], answers=[" The"]), ["answers of pair 0", "' The'", "no tokenizer"]),
        (PromptPairs([[1, 2]], positions={"s": ["The"]}), ["positions['s'] of pair 0", "'The'", "ids"]),
    ],
)
def test_pairs_that_do_not_fit_the_model_are_refused(pairs, said):
    with pytest.raises(PairsError) as error:
        pairs.encode(None, vocab_size=300)
    for part in said:
        assert part in str(error.value)


@pytest.mark.parametrize("part", ["", "Louvre", "is in the city of Paris"])
def test_a_substring_that_is_not_in_the_prompt_is_refused(tokenizer, part):
    with pytest.raises(PairsError, match=r"positions\['subject'\] of pair 1: .* is not in the clean prompt"):
        PromptPairs([CLEAN] * 2, positions={"subject": ["Eiffel", part]}).encode(tokenizer)


def test_a_substring_that_the_corrupted_prompt_lacks_points_to_the_two_sided_form(tokenizer):
    with pytest.raises(PairsError, match=r'not in the corrupted prompt .*"clean": \.\.\., "corrupted"'):
        PromptPairs([CLEAN], [CORRUPTED], positions={"subject": ["Eiffel Tower"]}).encode(tokenizer)


@pytest.mark.parametrize(("prompt", "part"), [(" in the city in the city", "city"), (" is eeee", "ee")])
def test_a_substring_that_occurs_twice_is_refused(tokenizer, prompt, part):
    with pytest.raises(PairsError, match="occurs more than once"):
        PromptPairs([prompt], positions={"subject": [part]}).encode(tokenizer)


def test_a_tokenizer_without_offsets_asks_for_token_positions(tokenizer):
    class Slow:
        def __call__(self, text, return_offsets_mapping=False, **options):
            if return_offsets_mapping:
                raise NotImplementedError
            return tokenizer(text, **options)

        def __getattr__(self, name):
            return getattr(tokenizer, name)

    with pytest.raises(PairsError, match=r"no character offsets.*give token positions"):
        PromptPairs([CLEAN], positions={"subject": ["Eiffel"]}).encode(Slow())


def test_an_answer_of_several_tokens_names_them_and_the_form_that_is_one_token(tokenizer):
    for part in ("answers", "distractors"):
        with pytest.raises(AnswerError) as error:
            PromptPairs([CLEAN] * 2, **{part: [" Paris", "Paris"]}).encode(tokenizer)
        said = str(error.value)
        split = [tokenizer.decode([token]) for token in ids_of(tokenizer, "Paris")]
        assert f"{part} of pair 1: 'Paris'" in said and str(split) in said and len(split) > 1
        assert "' Paris' is one token: use that" in said
    with pytest.raises(AnswerError, match="use another word, or the id of its first token"):
        PromptPairs([CLEAN], answers=[" Eiffel Tower"]).encode(tokenizer)
    with pytest.raises(AnswerError, match="it is 0 tokens"):
        PromptPairs([CLEAN], answers=[""]).encode(tokenizer)


def test_an_unknown_word_is_not_an_answer_though_it_is_one_token():
    tokenizer = word_level(TEXTS)
    assert len(ids_of(tokenizer, "Zanzibar")) == 1
    with pytest.raises(AnswerError, match=r"'Zanzibar' is not one token.*<unk>"):
        PromptPairs(["The Tower"], answers=["Zanzibar"]).encode(tokenizer)


def test_the_remedy_for_a_sentencepiece_tokenizer_is_to_leave_the_space_out():
    tokenizer = sentencepiece_like(TEXTS)
    with pytest.raises(AnswerError, match="'Paris' is one token: use that"):
        PromptPairs(["The Tower"], answers=[" Paris"]).encode(tokenizer)


def test_choosing_joining_and_swapping_refuse_what_cannot_be(landmark):
    with pytest.raises(PairsError, match="no pair 1 among 1 pairs"):
        landmark[1]
    with pytest.raises(PairsError, match="no prompt pairs"):
        landmark[1:]
    with pytest.raises(PairsError, match="a mask of 2 for 1 pairs"):
        landmark[[True, False]]
    with pytest.raises(PairsError, match="only one of them has corrupted"):
        landmark + PromptPairs([CLEAN])
    with pytest.raises(PairsError, match=r"\['subject'\] and \[\]"):
        landmark + PromptPairs([CLEAN], [CORRUPTED], [" Paris"], [" Rome"])
    with pytest.raises(PairsError, match="no corrupted prompts to swap"):
        PromptPairs([CLEAN]).swap()
