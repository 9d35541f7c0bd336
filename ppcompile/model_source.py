"""What the command line calls MODEL: a folder, a hub id, or a bare configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["decoder_config", "on_meta"]


def decoder_config(name: str) -> Any:
    """The configuration of a causal language model.

    Raises:
        ValueError: there is none under that name, or it is of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(
            f"{name!r} is not a model folder, a hub id that can be reached, or a config.json: {first}"
        ) from None
    if config.model_type not in _decoder_types():
        raise ValueError(
            f"{name!r} is of type {config.model_type!r}, which transformers does not list as a causal language model"
        )
    return config


def on_meta(config: Any, **options: Any) -> nn.Module:
    """The model of a configuration without memory for its weights; options as for ``from_config``."""
    with torch.device("meta"):
        module: nn.Module = AutoModelForCausalLM.from_config(config, **options)
    return module


def _decoder_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
