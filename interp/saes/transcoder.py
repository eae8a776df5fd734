"""A transcoder that trains: SAELens's batch-top-k dictionary, whose rows are `[input | target]`.

SAELens uses transcoders and does not train them. In use this one is its `JumpReLUTranscoder`, weight for weight. The module
imports SAELens, so it is itself imported when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.transcoder import JumpReLUTranscoderConfig
from torch import Tensor, nn

ARCHITECTURE = "batchtopk_transcoder"


@dataclass
class BatchTopKTranscoderConfig(BatchTopKTrainingSAEConfig):
    """That of a dictionary, and the width of what it writes. The input is not centred: its bias has another width."""

    d_out: int = 0
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        """Its name in SAELens's registry."""
        return ARCHITECTURE

    def get_inference_config_class(self) -> type[JumpReLUTranscoderConfig]:
        """The form in use."""
        return JumpReLUTranscoderConfig


class BatchTopKTranscoder(BatchTopKTrainingSAE):
    """What a module makes of its input (Dunefsky et al. 2024), by k features of a token on average (Bussmann et al. 2024)."""

    cfg: BatchTopKTranscoderConfig  # type: ignore[assignment]

    def initialize_weights(self) -> None:
        """Encoder and decoder of random directions of their own: they live in two spaces."""
        config, place = self.cfg, {"dtype": self.dtype, "device": self.device}
        length = 1.0 if config.decoder_init_norm is None else config.decoder_init_norm

        def directions(width: int) -> Tensor:
            drawn = torch.randn(config.d_sae, width, **place)
            return drawn / drawn.norm(dim=-1, keepdim=True) * length

        self.W_dec = nn.Parameter(directions(config.d_out))
        self.W_enc = nn.Parameter(directions(config.d_in).T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae, **place))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out, **place))

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The input as it is, in the dictionary's type."""
        found: Tensor = self.run_time_activation_norm_fn_in(self.hook_sae_input(sae_in.to(self.dtype)))
        return found

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """One step on rows `[input | target]`."""
        x, target = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], dim=-1)
        acts, before = self.encode_with_hidden_pre(x)
        out = self.decode(acts)
        loss = self.mse_loss_fn(out, target).sum(-1).mean()
        others: dict[str, Tensor] = self.calculate_aux_loss(replace(step_input, sae_in=target), acts, before, out)
        self.update_topk_threshold(acts)
        total = loss + sum(others.values())
        return TrainStepOutput(target, out, acts, before, total, {"mse_loss": loss, **others})


def make(**options: Any) -> BatchTopKTranscoder:
    """A transcoder to train; SAELens is told of its form, once."""
    if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(ARCHITECTURE, BatchTopKTranscoder, BatchTopKTranscoderConfig)
    return BatchTopKTranscoder(BatchTopKTranscoderConfig(**options))
