"""The facts as data, and those that a model knows: the latter against plain forward passes of its HuggingFace module."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from importlib import resources

import pytest
import torch
import transformers

import interp
from interp import tasks
from interp.errors import TaskError
from interp.tasks.known import Fact, ranks
from tests.toy_tokenizers import task_texts, word_level

DATA = json.loads(resources.files("interp.tasks").joinpath("data/facts.json").read_text("utf-8"))
RELATIONS = {entry["name"]: entry for entry in DATA["relations"]}
#: Written before the rule that a subject must not spell its answer; their pairs stay as they are.
FIRST = ("capital", "landmark")


# --- the data ----------------------------------------------------------------------------------------------


def test_there_are_relations_enough_and_each_says_what_it_is() -> None:
    assert len(RELATIONS) == len(DATA["relations"]) >= 12 and len(DATA["source"]) > 40 and len(DATA["licence"]) > 20
    assert tuple(RELATIONS)[:2] == FIRST
    for name, entry in RELATIONS.items():
        assert len(entry["facts"]) >= 30, name
        assert re.fullmatch(r"P\d+", entry["property"]) and entry["label"], name


@pytest.mark.parametrize("name", RELATIONS)
def test_facts_of_a_relation_differ(name: str) -> None:
    facts = RELATIONS[name]["facts"]
    answers = Counter(answer for _, answer in facts)
    assert len({subject for subject, _ in facts}) == len(facts)
    assert len(answers) >= 4 and max(answers.values()) <= len(facts) / 3
    assert all(re.fullmatch(r"\S+", answer) for answer in answers)
    if name not in FIRST:
        assert not [(subject, answer) for subject, answer in facts if answer[:4].lower() in subject.lower()]


@pytest.mark.parametrize("name", RELATIONS)
def test_templates_name_the_subject_once_and_the_answer_follows(name: str) -> None:
    templates = RELATIONS[name]["templates"]
    assert len(set(templates)) == 3
    for template in templates:
        assert template.count("{") == template.count("{subject}") == 1 and template == template.strip()
        assert not template.endswith("{subject}")


def test_most_answers_are_one_token_of_the_bundled_tokenizer(bundled: interp.Model) -> None:
    table = tasks.facts_table(tokenizer=bundled.tokenizer)
    assert table.columns.tolist() == ["relation", "property", "subject", "answer", "prompt", "single"]
    assert len(table) == sum(len(entry["facts"]) for entry in RELATIONS.values())
    alone = [len(bundled.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1 for word in table.answer]
    assert table.single.tolist() == alone and sum(alone) > 0.85 * len(alone)
    shares = table.groupby("relation").single.mean()
    assert shares.min() > 0.45 and (shares > 0.75).sum() >= 12


# --- relation= ---------------------------------------------------------------------------------------------


@cache
def toy() -> transformers.PreTrainedTokenizerFast:
    return word_level(task_texts())


def test_every_relation_gives_pairs_in_each_wording() -> None:
    for name, entry in RELATIONS.items():
        for number, template in enumerate(entry["templates"]):
            pairs = tasks.facts(toy(), n=8, relation=name, template=number)
            head, tail = template.split("{subject}")
            assert all(text.startswith(head) and text.endswith(tail) for text in (*pairs.clean, *pairs.corrupted))


def test_several_relations_are_contrasted_each_with_itself() -> None:
    asked = tasks.facts_table(["moon", "sport"])
    assert set(asked.relation) == {"moon", "sport"}
    pairs = tasks.facts(toy(), n=80, relation=["sport", "moon"])
    found = asked.set_index("prompt")
    assert set(found.loc[list(pairs.clean)].relation) == {"moon", "sport"}
    for clean, corrupted, (right,), (wrong,) in zip(
        pairs.clean, pairs.corrupted, pairs.answers, pairs.distractors, strict=True
    ):
        assert found.relation[clean] == found.relation[corrupted]
        assert (right, wrong) == (f" {found.answer[clean]}", f" {found.answer[corrupted]}")
    assert set(tasks.facts_table("all").relation) == set(RELATIONS)
    assert set(tasks.facts_table("both").relation) == set(FIRST)
    assert tasks.facts(toy(), n=20, relation=list(FIRST)) == tasks.facts(toy(), n=20, relation="both")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"relation": "river"}, r"relation='river' is unknown; use one of \['capital', 'landmark', .*'both', 'all'\]"),
        ({"relation": ["moon", "river"]}, "relation='river' is unknown"),
        ({"relation": 3}, "relation=3 is unknown"),
        ({"relation": []}, "holds no name; give one"),
        ({"relation": ["moon", "all"]}, r"holds \['moon'\] twice"),
        ({"template": 3}, r"template=3 is unknown; use one of \[0, 1, 2\]"),
        ({"template": None}, "template=None is unknown"),
        ({"known": "well"}, r"known='well' is unknown; use one of \['argmax', 'choice'\]"),
        ({"known_by": "gpt2"}, "known_by needs what interp.load_model gives, with a tokenizer; got 'gpt2'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(TaskError, match=said):
        tasks.facts(toy(), **options)


# --- known_by= ---------------------------------------------------------------------------------------------


def by_hand(model: interp.Model, relation: str) -> dict[str, tuple[bool, bool]]:
    """Per prompt whether the answer is the likeliest token, and the likeliest answer: one plain forward pass each."""
    template, facts = RELATIONS[relation]["templates"][0], RELATIONS[relation]["facts"]
    ids = {answer: model.tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] for _, answer in facts}
    ids = {answer: tokens[0] for answer, tokens in ids.items() if len(tokens) == 1}
    found = {}
    for subject, answer in facts:
        if answer in ids:
            text = template.format(subject=subject)
            tokens = model.tokenizer(model.prefix + text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logits = model.hf(tokens, logits_to_keep=1).logits[0, -1]
            best = max(ids, key=lambda word: logits[ids[word]])
            found[text] = (int(logits.argmax()) == ids[answer], best == answer)
    return found


@pytest.mark.parametrize("relation", ["moon", pytest.param("language", marks=pytest.mark.slow)])
def test_known_facts_are_those_of_a_plain_forward_pass(bundled: interp.Model, relation: str) -> None:
    assert bundled.prefix
    plain = by_hand(bundled, relation)
    table = tasks.facts_table(relation, known_by=bundled)
    single = table[table.single].set_index("prompt")
    assert set(single.index) == set(plain) and table[~table.single][["argmax", "choice"]].sum().sum() == 0
    for which, known in enumerate(("argmax", "choice")):
        expected = {prompt for prompt, yes in plain.items() if yes[which]}
        assert 2 < len(expected) < len(table)
        assert set(single.index[single[known]]) == expected
        pairs = tasks.facts(bundled.tokenizer, n=8, relation=relation, known_by=bundled, known=known)
        assert set(pairs.clean) | set(pairs.corrupted) <= expected
    assert (single["rank"].eq(0) == single.argmax).all() and (single.choice | ~single.argmax).all()
    assert table[~table.single]["rank"].isna().all()


@cache
def random_model(**options: str) -> interp.Model:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(toy()), n_positions=32, n_embd=32, n_layer=2, n_head=2)
    module = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():  # sharper than what a fresh model says, so that answers differ
        module.transformer.wte.weight.mul_(20)
        for block in module.transformer.h:  # what stands before the last token counts
            block.attn.c_proj.weight.mul_(300)
    return interp.load_model(module, tokenizer=toy(), **options)


@cache
def moons() -> tuple[Fact, ...]:
    """Facts, and one whose answer is no token."""
    entry = RELATIONS["moon"]
    facts = [Fact("moon", "P397", entry["templates"][0], *fact) for fact in entry["facts"]]
    return (*facts, Fact("other", "P0", entry["templates"][0], "Titan", "nobodywroteit"))


def test_ranks_count_what_scores_above() -> None:
    here = random_model()
    words = sorted({answer for _, answer in RELATIONS["moon"]["facts"]})
    for known in ("argmax", "choice"):
        counted = ranks(here, moons(), known)
        assert counted[-1] is None and len(set(counted)) > 3
        for fact, count in zip(moons()[:-1], counted, strict=False):
            with torch.no_grad():
                logits = here.hf(torch.tensor([toy()(fact.prompt)["input_ids"]])).logits[0, -1]
            scores = {word: logits[toy().convert_tokens_to_ids(word)].item() for word in words}
            among = logits if known == "argmax" else torch.tensor(list(scores.values()))
            assert count == int((among > scores[fact.answer]).sum())


@pytest.mark.slow
def test_ranks_are_the_same_elsewhere_and_little_travels() -> None:
    here, there = random_model(), random_model(backend="simulated")
    for known in ("argmax", "choice"):
        assert ranks(here, moons(), known) == ranks(there, moons(), known)
    assert 0 < there.backend.received < 10_000


def test_too_few_known_facts_are_refused_with_their_number() -> None:
    model = random_model()
    with pytest.raises(TaskError, match=r"knows 0 of 46 facts of relation='moon' \(known='argmax'\).* known='choice'"):
        tasks.facts(toy(), relation="moon", known_by=model)
    said = r"of which .* knows \d+ of \d+ \(known='choice'\), has \d+ distinct aligned pairs .* not n=100000; ask for n=\d+"
    with pytest.raises(TaskError, match=said):
        tasks.facts(toy(), n=100_000, relation="all", known_by=model, known="choice")
