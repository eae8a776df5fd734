"""Small tokenizers built in memory, one per shape that a real one can have. No downloads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from string import Formatter

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from interp.tasks.build import load

BOS = "<s>"


def task_texts() -> list[str]:
    """Every word of every task's data file, each with a space before it, as tokenizer training text."""
    words: set[str] = set()

    def gather(value: object) -> None:
        if isinstance(value, str):
            words.update(" ".join(literal for literal, *_ in Formatter().parse(value)).split())
        elif isinstance(value, dict):
            for key, entry in value.items():
                gather("" if key == "source" else entry)
        elif isinstance(value, list):
            for entry in value:
                gather(entry)

    for name in ("agreement", "facts", "greater_than", "ioi", "names", "pronouns"):
        gather(load(name))
    words |= {"she", "he", "They", "gave", "went"}
    return [f" {word}" for word in sorted(words) if not any(map(str.isdigit, word))]  # digits are each test's own


def _wrapped(tokenizer: Tokenizer, unknown: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    special = {"bos_token": BOS} | ({"unk_token": unknown} if unknown else {})
    if bos:
        token = (BOS, tokenizer.token_to_id(BOS))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[token])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def byte_level(
    texts: Iterable[str], size: int = 6000, two_digits: bool = False, bos: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's: the space belongs to the word. Every digit is a token, or every two."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[BOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if two_digits:
        state = json.loads(tokenizer.to_str())
        # centuries first, or 1732 would become 1 73 2
        twos = [f"1{d}" for d in range(2, 9)]
        twos += [two for two in (f"{n:02d}" for n in range(100)) if two not in twos]
        merges = [list(two) for two in twos] + [["Ġ", two] for two in twos]
        for left, right in merges:
            state["model"]["vocab"][left + right] = len(state["model"]["vocab"])
        state["model"]["merges"] += merges
        tokenizer = Tokenizer.from_str(json.dumps(state))
    return _wrapped(tokenizer, bos=bos)


def word_level(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Whole words and single digits, `<unk>` for any other; spaces are not part of a token."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    trainer = trainers.WordLevelTrainer(special_tokens=[BOS, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*texts, *"0123456789"], trainer)
    return _wrapped(tokenizer, unknown="<unk>")


def sentencepiece_like(texts: Iterable[str], size: int = 6000) -> PreTrainedTokenizerFast:
    """As Llama 2's: a mark before every text, so that " word" alone is two tokens; adds a BOS by itself."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Digits(individual_digits=True)]
    )
    parts = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[BOS, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*(t.strip() for t in texts), *"0123456789"], trainer)
    return _wrapped(tokenizer, unknown="<unk>", bos=True)
