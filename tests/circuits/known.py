"""Models whose circuit is known: tracr programs, a hand-built induction pair, a linear model, and two toys.

Each is a HuggingFace GPT-2 with identity norms and weights that were set, a word-level tokenizer, prompt
pairs that exercise it, and the edges that carry it: corrupting any other edge alone moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from interp import PromptPairs
from interp.circuits import Facts

BOS, PAD = "BOS", "PAD"
PLACES = 32  # positions of every model: more than its prompts need, so that any probe of a model fits


@dataclass(frozen=True)
class Known:
    """A model and what is known about it.

    `edges` are those with an effect on the logit difference of some pair. `missed` names the nodes on which
    attribution patching (AtP) gives zero although patching them moves the logit difference.
    """

    name: str
    model: GPT2LMHeadModel
    tokenizer: PreTrainedTokenizerFast
    pairs: PromptPairs
    edges: frozenset[tuple[str, str]]
    missed: tuple[str, ...] = ()

    @property
    def facts(self) -> Facts:
        """What decides which edges the model has."""
        return Facts(self.model.config.n_layer, self.model.config.n_head, self.model.config.n_head)


@cache
def compiled(name: str) -> Any:
    """A tracr program: "frac_prevs" (the fraction of x among the tokens so far), "reverse", "hist" (how often the token at a
    position came until there) or "count" (how often a did).

    Imports jax, which takes seconds.
    """
    from tracr.compiler import compiling, lib
    from tracr.rasp import rasp

    programs = {
        "frac_prevs": (lambda: lib.make_frac_prevs(rasp.tokens == "x"), {"w", "x", "y"}),
        "reverse": (lambda: lib.make_reverse(rasp.tokens), {"a", "b", "c"}),
        "hist": (lib.make_hist, {"a", "b", "c"}),
        "count": (lambda: lib.make_count(rasp.tokens, "a"), {"a", "b", "c"}),
    }
    program, vocabulary = programs[name]
    length = 5 if name in ("hist", "count") else 4
    return compiling.compile_rasp_to_model(
        program(), vocab=vocabulary, max_seq_len=length, causal=True, compiler_bos=BOS, compiler_pad=PAD
    )


@cache
def frac_prevs() -> Known:
    """tracr's frac_prevs: MLP 0 says whether a token is x, head 1.0 averages that over the tokens so far.

    The logit of the token `fraction` is the output, that of `zero` is 0.
    """
    words = [*_words(compiled("frac_prevs")), "fraction", "zero"]
    model = _from_tracr(compiled("frac_prevs"), len(words))
    labels = compiled("frac_prevs").residual_labels
    with torch.no_grad():
        model.lm_head.weight[words.index("fraction"), _column(labels, "frac_prevs")] = 1.0
    prompts = [("x w x y", "w w x y"), ("w x y x", "w x x x"), ("x x y w", "y w y w"), ("y w w x", "y w w w")]
    pairs = _pairs("frac_prevs", prompts, ["fraction"] * 4, ["zero"] * 4)
    edges = {("embed", "L0.mlp"), ("L0.mlp", "L1.H0.v"), ("L1.H0", "logits")}
    return Known("frac_prevs", model, _tokenizer(words), pairs, frozenset(edges))


@cache
def reverse() -> Known:
    """tracr's reverse, read at the last position: head 3.0 brings the first token there.

    Its other parts compute the length, which is the same in both prompts of a pair.
    """
    words = _words(compiled("reverse"))
    model = _from_tracr(compiled("reverse"), len(words))
    labels = compiled("reverse").residual_labels
    with torch.no_grad():
        for row, word in enumerate(words):
            if word not in (BOS, PAD):
                model.lm_head.weight[row, _column(labels, "reverse", word)] = 1.0
    prompts = [("a c b b", "b c b b"), ("b a c a", "c a b b"), ("c c a b", "a c a b"), ("a b b c", "c a a c")]
    pairs = _pairs("reverse", prompts, [a[0] for a, _ in prompts], [b[0] for _, b in prompts])
    return Known("reverse", model, _tokenizer(words), pairs, frozenset({("embed", "L3.H0.v"), ("L3.H0", "logits")}))


def _counting(name: str, column: str, prompts: list[tuple[str, str]], edges: set[tuple[str, str]]) -> Known:
    """A program whose head 0.0 attends to BOS and to what is counted, so that MLP 0 can tell the number by BOS's share.

    The logits of the numbers, at the last position, are the output. At both ends the ramps of the MLP are flat.
    """
    numbers = [str(number) for number in range(6)]
    words = [*_words(compiled(name)), *numbers]
    model = _from_tracr(compiled(name), len(words))
    labels = compiled(name).residual_labels
    with torch.no_grad():
        for number in numbers:
            model.lm_head.weight[words.index(number), _column(labels, column, number)] = 1.0
    said = [[str(compiled(name).apply([BOS, *prompt.split()]).decoded[-1]) for prompt in pair] for pair in prompts]
    pairs = _pairs(name, prompts, [right for right, _ in said], [wrong for _, wrong in said])
    return Known(name, model, _tokenizer(words), pairs, frozenset(edges))


@cache
def hist() -> Known:
    """tracr's hist: how often the last token came in the prompt. The pairs change it, or one like it."""
    prompts = [
        ("a b a c a", "a b a c b"),
        ("a b b c b", "a b b c c"),
        ("c c a c c", "c a a c c"),
        ("b a c b b", "b a c a b"),
    ]
    after = {("L0.H0", "L0.mlp"), ("L0.mlp", "logits")}
    return _counting("hist", "hist", prompts, {("embed", "L0.H0.q"), ("embed", "L0.H0.k"), *after})


@cache
def count() -> Known:
    """tracr's count of a, whatever stands last."""
    prompts = [
        ("a b a c b", "a b c c b"),
        ("b b a c c", "b b c c c"),
        ("a a b a b", "c a b a b"),
        ("a a b c c", "a c b c c"),
    ]
    return _counting("count", "count_a", prompts, {("embed", "L0.H0.k"), ("L0.H0", "L0.mlp"), ("L0.mlp", "logits")})


@cache
def induction() -> Known:
    """Two layers that continue a repeated pair: "a b ... a" is followed by b.

    Head 0.0 writes each position's previous token; head 1.1 looks for the position whose previous token is
    the current one, and copies the token there. The pairs change the earlier a, the b, or the last a.
    """
    words = [PAD, BOS, *"abcdefgh"]
    n, places = len(words), 12
    token, previous, output, place = (range(i * n, (i + 1) * n) for i in (0, 1, 2, 3))
    place = range(3 * n, 3 * n + places)
    model = _blank(len(words), 2, 2, 3 * n + places)
    sharp = 8.0  # exp(8) to 1: attention on the match is above 0.99, and yet not flat
    with torch.no_grad():
        model.transformer.wte.weight[range(2, n), token[2:]] = 1.0
        model.transformer.wte.weight[1, token[1]] = 1.0
        model.transformer.wpe.weight[range(places), place] = 1.0
        model.lm_head.weight[range(n), output] = 8.0
    _head(model, 0, 0, q=(place[1:], range(places - 1), sharp), k=(place, range(places)),
          v=(token, range(n)), o=(range(n), previous))  # fmt: skip
    _head(model, 1, 1, q=(token, range(n), sharp), k=(previous, range(n)), v=(token, range(n)),
          o=(range(n), output))  # fmt: skip
    rows = [
        ("a b c d a", "e b c d a", "b", "c"), ("c d f a b c", "c e f a b c", "d", "e"),
        ("a b c d a", "a b c d c", "b", "d"), ("g a b h c d g", "g f b h c d g", "a", "f"),
        ("f g h f", "a g h f", "g", "h"), ("h e d c b h", "h e d c b d", "e", "c"),
    ]  # fmt: skip
    pairs = _pairs("induction", [row[:2] for row in rows], [row[2] for row in rows], [row[3] for row in rows])
    edges = {
        ("embed", "L0.H0.v"), ("L0.H0", "L1.H1.k"), ("embed", "L1.H1.q"), ("embed", "L1.H1.v"),
        ("L1.H1", "logits"),
    }  # fmt: skip
    return Known("induction", model, _tokenizer(words), pairs, frozenset(edges))


@cache
def linear() -> Known:
    """Random values, outputs and MLPs without a nonlinearity; every head averages all that it sees.

    Logits are linear in every activation, so a first-order estimate is the effect itself.
    """
    words = [PAD, BOS, *"abcdef"]
    model = _blank(len(words), 2, 2, 16, n_inner=24, activation="linear")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 or "mlp" in name:
                parameter.normal_(0, 0.25, generator=generator)
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, : 2 * 16] = 0.0
    prompts = [("a b c d", "e b c d"), ("a b c d", "a f c e"), ("f e d a", "f e d c"), ("b b a c", "d a b f")]
    pairs = _pairs("linear", prompts, list("abcd"), list("efab"))
    facts = Facts(2, 2, 2)
    edges = {
        (sender.node, receiver.node)
        for receiver in facts.receivers
        for sender in facts.senders[: facts.upstream_count(receiver)]
        if receiver.kind not in ("q", "k")
    }
    return Known("linear", model, _tokenizer(words), pairs, frozenset(edges))


@cache
def saturated() -> Known:
    """A head so sure of its key that the softmax has no gradient left: AtP sees nothing at its q and k.

    Query A looks for key a, B for b, with exp(120) to 1, so that the weight on anything else is 0 in fp32; a
    is worth +1, b -1. Either the corrupted query or the corrupted keys alone turn the head to the other one.
    """
    words = [PAD, BOS, *"abABc", "up", "down"]
    n = len(words)
    model = _blank(n, 2, 2, n + 1)
    a, b, query_a, query_b = (words.index(word) for word in "abAB")
    with torch.no_grad():
        model.transformer.wte.weight[range(2, n), range(2, n)] = 1.0
        model.lm_head.weight[words.index("up"), n] = 1.0
    _head(model, 1, 0, q=((query_a, query_b), (0, 1), 120.0), k=((a, b), (0, 1)), v=((a,), (2,)), o=((2,), (n,)))
    with torch.no_grad():
        _columns(model, 1, 0, "v")[b, 2] = -1.0
    prompts = [("a b A", "b a B"), ("a c b A", "b c a B"), ("b a A", "a b B"), ("c b a B", "c a b A")]
    answers = ["up", "up", "up", "down"]
    pairs = _pairs("saturated", prompts, answers, ["down" if answer == "up" else "up" for answer in answers])
    edges = {("embed", f"L1.H0.{kind}") for kind in "qkv"} | {("L1.H0", "logits")}
    return Known("saturated", model, _tokenizer(words), pairs, frozenset(edges), ("L1.H0.q", "L1.H0.k"))


@cache
def cancelling() -> Known:
    """A head whose direct effect an MLP cancels to first order, though not in fact: AtP misses the head.

    Head 0.0 writes u (+1 for p, -1 for m); MLP 1 writes -relu(u); the logit of `up` reads both. At u = 1 its
    derivative is 1 - 1 = 0, and yet going to u = -1 changes it from 0 to -1.
    """
    words = [PAD, BOS, *"pmc", "up", "down"]
    n, length = len(words), 4
    direct, indirect = n, n + 1
    model = _blank(n, 3, 1, n + 2, n_inner=1, activation="relu")
    with torch.no_grad():
        model.transformer.wte.weight[range(2, n), range(2, n)] = 1.0
        model.lm_head.weight[words.index("up"), [direct, indirect]] = 1.0
        mlp = model.transformer.h[1].mlp
        mlp.c_fc.weight[direct, 0], mlp.c_proj.weight[0, indirect] = 1.0, -1.0
    # every position sees all before it alike: at the last one the head's mean is a sum over the length
    _head(model, 0, 0, v=((words.index("p"),), (0,), float(length)), o=((0,), (direct,)))
    with torch.no_grad():
        _columns(model, 0, 0, "v")[words.index("m"), 0] = -float(length)
    prompts = [("p c c", "m c c"), ("c p c", "c m c"), ("c c p", "c c m")]
    pairs = _pairs("cancelling", prompts, ["up"] * 3, ["down"] * 3)
    edges = {("embed", "L0.H0.v"), ("L0.H0", "L1.mlp"), ("L0.H0", "logits"), ("L1.mlp", "logits")}
    return Known("cancelling", model, _tokenizer(words), pairs, frozenset(edges), ("L0.H0",))


#: Every known model by name; the first four need tracr.
KNOWN: dict[str, Callable[[], Known]] = {
    "frac_prevs": frac_prevs, "reverse": reverse, "hist": hist, "count": count, "induction": induction, "linear": linear,
    "saturated": saturated, "cancelling": cancelling,
}  # fmt: skip


def _pairs(name: str, prompts: Sequence[Sequence[str]], answers: list[str], distractors: list[str]) -> PromptPairs:
    clean, corrupted = ([f"{BOS} {prompt[side]}" for prompt in prompts] for side in (0, 1))
    return PromptPairs(clean, corrupted, answers, distractors, name=name)


def _tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=PAD))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, bos_token=BOS, padding_side="left")


def _blank(
    words: int, layers: int, heads: int, width: int, n_inner: int = 1, activation: str = "relu"
) -> GPT2LMHeadModel:
    """A GPT-2 of zeros with identity norms, its width rounded up to a multiple of its heads."""
    config = GPT2Config(
        vocab_size=words, n_positions=PLACES, n_layer=layers, n_head=heads, n_embd=-(-width // heads) * heads,
        n_inner=n_inner, activation_function=activation, tie_word_embeddings=False, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).float().eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    model.transformer.ln_f = nn.Identity()
    return model


def _columns(model: GPT2LMHeadModel, layer: int, head: int, kind: str) -> Tensor:
    """The weights of one head's q, k or v, [d_model, d_head], as a view."""
    config = model.config
    d_head = config.n_embd // config.n_head
    start = "qkv".index(kind) * config.n_embd + head * d_head
    return model.transformer.h[layer].attn.c_attn.weight[:, start : start + d_head]


@torch.no_grad()
def _head(model: GPT2LMHeadModel, layer: int, head: int, **parts: tuple) -> None:
    """Set parts of a head: `q=(from, to, value)` joins dimensions; a q is a score before the softmax."""
    d_head = model.config.n_embd // model.config.n_head
    for kind, (start, end, *value) in parts.items():
        size = value[0] if value else 1.0
        if kind == "o":
            weight = model.transformer.h[layer].attn.c_proj.weight[head * d_head : (head + 1) * d_head]
        else:
            weight = _columns(model, layer, head, kind)
        size *= d_head**0.5 if kind == "q" else 1.0
        weight[list(start), list(end)] = size


def _words(program: Any) -> list[str]:
    places = program.input_encoder.encoding_map
    return sorted(places, key=places.__getitem__)


def _column(labels: list[str], name: str, value: str = "") -> int:
    """The dimension of a residual stream that holds a variable: labels are like `reverse_4:a`."""
    found = [i for i, label in enumerate(labels) if label.rsplit("_", 1)[0] == name and label.endswith(f":{value}")]
    found = found or [i for i, label in enumerate(labels) if label.rsplit("_", 1)[0] == name]
    assert len(found) == 1, f"{name} {value} in {labels}"
    return found[0]


def _from_tracr(program: Any, words: int) -> GPT2LMHeadModel:
    """A compiled program's weights in a GPT-2, wider where a head needs it; the unembedding stays zero."""
    config, parameters = program.model_config, program.params
    width = parameters["token_embed"]["embeddings"].shape[1]
    heads, d_key = config.num_heads, config.key_size
    model = _blank(words, config.num_layers, heads, max(width, heads * d_key), n_inner=config.mlp_hidden_size)
    d_head = model.config.n_embd // heads

    def weight(name: str, part: str = "w") -> Tensor:
        return torch.tensor(parameters[name][part].tolist())

    with torch.no_grad():
        tokens = weight("token_embed", "embeddings")
        model.transformer.wte.weight[: len(tokens), :width] = tokens
        places = weight("pos_embed", "embeddings")
        model.transformer.wpe.weight[: len(places), :width] = places
        for i, block in enumerate(model.transformer.h):
            at = f"transformer/layer_{i}"
            assert not any(weight(name, "b").any() for name in parameters if name.startswith(at)), (
                "tracr uses no biases"
            )
            for head in range(heads):
                mine = slice(head * d_key, (head + 1) * d_key)
                for kind, name in {"q": "query", "k": "key", "v": "value"}.items():
                    scale = (d_head / d_key) ** 0.5 if kind == "q" else 1.0
                    _columns(model, i, head, kind)[:width, :d_key] = weight(f"{at}/attn/{name}")[:, mine] * scale
                start = head * d_head
                block.attn.c_proj.weight[start : start + d_key, :width] = weight(f"{at}/attn/linear")[mine]
            block.mlp.c_fc.weight[:width] = weight(f"{at}/mlp/linear_1")
            block.mlp.c_proj.weight[:, :width] = weight(f"{at}/mlp/linear_2")
    return model
