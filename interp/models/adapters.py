"""Adapters of PEFT: layers that it has put into a module are part of it, wrappers that do more are refused."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ..errors import ArchitectureError
from .layout import Envoy
from .steady import standing


def unwrapped(module: Envoy) -> Any:
    """The HuggingFace module that a PEFT wrapper holds, with the adapters' layers in it; any other module as it is.

    Raises:
        ArchitectureError: an adapter that works beside the module, such as prefix or prompt tuning.
    """
    if "peft" not in sys.modules:  # then nothing can be one of its classes
        return module
    from peft import PeftMixedModel, PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    if isinstance(module, PeftModel | PeftMixedModel):
        for config in module.peft_config.values():
            if config.is_prompt_learning or getattr(config, "is_adaption_prompt", False):
                raise ArchitectureError(beside(module, str(getattr(config.peft_type, "value", config.peft_type))))
        module = module.base_model
    return module.model if isinstance(module, BaseTuner) else module


def beside(wrapper: Envoy, kind: str) -> str:
    """The refusal of an adapter that is not a part of the module's layers."""
    return (
        f"a {type(wrapper).__name__} with a {kind} adapter is more than the model inside it: the adapter stands beside the "
        "model's own tokens and layers, where no site is; give load_model a model without it (peft_model.base_model), or an "
        "adapter that is put into the layers, such as LoRA"
    )


@torch.no_grad()
def refuse_more_than_layers(wrapper: Envoy, hf: Envoy) -> None:
    """Check that a wrapper gives the logits of the module inside it.

    Raises:
        ArchitectureError: it does not, or does not run on token ids alone.
    """
    ids = torch.tensor([[1, 2, 3]], device=next(hf.parameters()).device)
    kinds = ", ".join(
        str(getattr(config.peft_type, "value", config.peft_type)) for config in wrapper.peft_config.values()
    )
    try:
        with standing(wrapper):
            given, own = wrapper(input_ids=ids)[0], hf(input_ids=ids)[0]
    except (TypeError, ValueError) as error:
        raise ArchitectureError(f"{beside(wrapper, kinds)} ({error})") from error
    if given.shape != own.shape or not torch.allclose(given, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise ArchitectureError(beside(wrapper, kinds))


def adapter_layers(hf: Envoy) -> dict[str, Any]:
    """The layers of a module that PEFT has put there, by name."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = BaseTunerLayer | AuxiliaryTrainingWrapper
    return {name: module for name, module in hf.named_modules() if isinstance(module, kinds)}


def adapter_state(hf: Envoy) -> list[tuple[Any, ...]]:
    """What of the adapters is in no weight: which of them are active, merged or switched off, and how they are scaled."""
    return [
        (
            name,
            [*layer.active_adapters],
            bool(layer.disable_adapters),
            [*getattr(layer, "merged_adapters", ())],
            repr(getattr(layer, "scaling", None)),
        )
        for name, layer in adapter_layers(hf).items()
    ]
