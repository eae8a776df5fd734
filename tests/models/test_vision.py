"""The text side of models that also see or hear: their decoder is found wherever they hold it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

import interp
from interp import PromptPairs
from interp.errors import ArchitectureError
from tests.families import allowed, words
from tests.oracle.configs import FAMILIES, VISION, tiny, tokenizer, widen
from tests.oracle.hooks import Oracle

_TEXT: dict[str, Any] = {**FAMILIES["llama_gqa"][1], "head_dim": 8}
_CLIP = {"model_type": "clip_vision_model", "projection_dim": 32, **VISION}
_SIGLIP = {"model_type": "siglip_vision_model", **VISION}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_GRID = {"depth": 1, "num_heads": 2, "intermediate_size": 16}
_MARKS = {"image_token_id": 1000, "video_token_id": 1001, "vision_start_token_id": 1002, "vision_end_token_id": 1003}


_WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]


def text(model_type: str, **more: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_TEXT, **more}


MODELS: dict[str, Callable[[], Any]] = {
    "llava": lambda: tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(text_config=text("mistral", sliding_window=4), vision_config=_CLIP, image_token_index=1000)
    ),
    "llava_onevision": lambda: tf.LlavaOnevisionForConditionalGeneration(
        tf.LlavaOnevisionConfig(text_config=text("qwen2"), vision_config=_SIGLIP, image_token_index=1000)
    ),
    "qwen2_vl": lambda: tf.Qwen2VLForConditionalGeneration(
        tf.Qwen2VLConfig(
            text_config={**_TEXT, **_MROPE}, vision_config={**_GRID, "embed_dim": 16, "hidden_size": 32}, **_MARKS
        )
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLForConditionalGeneration(
        tf.Qwen2_5_VLConfig(
            text_config={**_TEXT, **_MROPE},
            vision_config={**_GRID, "hidden_size": 16, "out_hidden_size": 32},
            **_MARKS,
        )
    ),
    "qwen3_vl": lambda: tf.Qwen3VLForConditionalGeneration(
        tf.Qwen3VLConfig(
            text_config={**_TEXT, **_MROPE},
            vision_config={**_GRID, "hidden_size": 16, "out_hidden_size": 32, "deepstack_visual_indexes": [0]},
            **_MARKS,
        )
    ),
    "mistral3": lambda: tf.Mistral3ForConditionalGeneration(
        tf.Mistral3Config(
            text_config=text("mistral", sliding_window=None),
            vision_config={"model_type": "pixtral", **VISION, "head_dim": 8},
            image_token_index=1000,
        )
    ),
    "idefics3": lambda: tf.Idefics3ForConditionalGeneration(
        tf.Idefics3Config(text_config=text("llama"), vision_config=VISION, image_token_id=1000, scale_factor=1)
    ),
    "internvl": lambda: tf.InternVLForConditionalGeneration(
        tf.InternVLConfig(
            text_config=text("qwen2"),
            vision_config={**VISION, "image_size": [32, 32], "patch_size": [16, 16]},
            image_token_id=1000,
        )
    ),
    "aya_vision": lambda: tf.AyaVisionForConditionalGeneration(
        tf.AyaVisionConfig(
            text_config=text("cohere2", sliding_window=4, logit_scale=0.5, layer_types=_WINDOWS),
            vision_config=_SIGLIP,
            image_token_index=1000,
        )
    ),
    "voxtral": lambda: tf.VoxtralForConditionalGeneration(
        tf.VoxtralConfig(
            text_config=text("llama"),
            audio_config={key: VISION[key] for key in list(VISION)[:4]},
            audio_token_id=1000,
        )
    ),
}
LENGTHS = (7, 4, 6)
PAIRS = PromptPairs(words(*LENGTHS), words(*LENGTHS, seed=1), [20, 21, 22], [30, 31, 32])


def made(name: str) -> Any:
    model = MODELS[name]().eval().float()
    widen(model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_the_text_side_is_loaded_and_right(name: str) -> None:
    """Prompts of three lengths, padded together: positions of three axes and of one are those of each prompt alone."""
    hf = made(name)
    model, oracle = interp.load_model(hf, tokenizer=tokenizer()), Oracle(hf)
    assert model.hf is hf and model.n_layers == 3 and model.n_kv_heads == 2 and not model.refused
    effects = interp.patch(model, PAIRS, interp.grid(["resid_pre", "z", "mlp_out"], layers=[1]))
    for pair, length in enumerate(LENGTHS):
        base, source = PAIRS.clean[pair], PAIRS.corrupted[pair]
        for number, kind in enumerate(("resid_pre", "z", "mlp_out")):
            for place in (0, length - 1):
                logits = oracle.patched(base, source, kind, 1, positions=(place,))[-1]
                got = float(effects.values[number, 0, place, pair])
                assert got == pytest.approx(float(logits[20 + pair] - logits[30 + pair]), abs=2 * allowed(logits)), kind


def test_a_processor_lends_its_tokenizer() -> None:
    class Processor(tf.ProcessorMixin):
        def __init__(self) -> None:
            self.tokenizer = tokenizer()

    processor = Processor()
    assert interp.load_model(made("llava"), tokenizer=processor, check=False).tokenizer is processor.tokenizer


def test_nothing_is_said_of_a_model_that_can_be_used(capfd: pytest.CaptureFixture[str]) -> None:
    interp.load_model(made("qwen2_vl"))
    assert "not supported" not in capfd.readouterr().err


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3", "aya_vision"])
def test_every_site_passes_the_audit(name: str) -> None:
    model = interp.load_model(made(name))
    report = model.audit()
    assert report.ok, str(report)
    parts = interp.direct_effects(model, PAIRS)
    np.testing.assert_allclose(np.nansum(parts.values, axis=(0, 1)), parts.clean, atol=1e-3)


@pytest.mark.parametrize("name", [*MODELS, "gemma3_vision"])
def test_a_folder_is_read_whole(name: str, tmp_path: Path) -> None:
    hf = made(name) if name in MODELS else tiny(name)[0]
    hf.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = interp.load_model(tmp_path, check=False)
    assert type(model.hf) is type(hf) and model.tokenizer is not None
    ids = torch.tensor(words(6))
    with torch.no_grad():
        assert torch.equal(model.hf(ids).logits, hf(ids).logits)
    if name != "voxtral":  # servers know pictures
        there = interp.load_model(tmp_path, backend="http://127.0.0.1:1")
        assert there.family == model.family and there.hf.device.type == "meta"


def test_another_process_reads_the_same_class(tmp_path: Path) -> None:
    hf = made("qwen3_vl")
    hf.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    plan = interp.heads("z", layers=[1])
    here = interp.patch(interp.load_model(hf, tokenizer=tokenizer()), PAIRS, plan)
    for source in (hf, tmp_path):
        assert interp.patch(interp.load_model(source, backend="simulated"), PAIRS, plan).values.equals(here.values)


def test_a_picture_that_was_seen_before_shifts_no_position() -> None:
    """Qwen-VL keeps the shift behind its last picture and adds it wherever keys are cached, as in the prefix schedule."""
    hf = made("qwen2_vl")
    model = interp.load_model(hf)
    pairs = PromptPairs(words(12, 12), words(12, 12, seed=1), [20, 21], [30, 31])
    run = partial(interp.patch, model, pairs, interp.grid(["z", "mlp_out"]), schedule="prefix", max_tokens=100)
    want = run()
    hf.model.rope_deltas = torch.tensor([[-5]])
    assert run().values.equals(want.values)
    assert hf.model.rope_deltas.tolist() == [[-5]], "the module is as it was"


def test_models_whose_text_side_cannot_be_used_say_why() -> None:
    paligemma = tf.PaliGemmaForConditionalGeneration(
        tf.PaliGemmaConfig(
            text_config=text("gemma"), vision_config={**_SIGLIP, "projection_dim": 32}, projection_dim=32,
            image_token_index=90,
        )
    )  # fmt: skip
    with pytest.raises(ArchitectureError, match="attend to later ones too"):
        interp.load_model(paligemma)
    blip = tf.Blip2ForConditionalGeneration(
        tf.Blip2Config(
            text_config={"model_type": "opt", **FAMILIES["opt"][1]},
            vision_config=VISION,
            qformer_config={**{key: VISION[key] for key in list(VISION)[:4]}, "encoder_hidden_size": 16},
        )
    )
    with pytest.raises(ArchitectureError, match="does not run on token ids alone: it needs pixel_values too"):
        interp.load_model(blip)
    llama = {key: value for key, value in _TEXT.items() if key != "head_dim"}
    mllama = tf.MllamaForConditionalGeneration(
        tf.MllamaConfig(
            text_config={**llama, "cross_attention_layers": [1]},
            vision_config={
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_global_layers": 1,
                "attention_heads": 2, "image_size": 32, "patch_size": 16, "vision_output_dim": 32,
                "intermediate_layers_indices": [0],
            },
        )
    )  # fmt: skip
    with pytest.raises(ArchitectureError, match=r"'mllama_text_model'.*resemble none"):
        interp.load_model(mllama)
