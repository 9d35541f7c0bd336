"""Building one tiny model, with weights that make mistakes show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from .configs import EXPERTS, GENTLE, configuration

__all__ = ["LARGEST", "build", "lonely_kinds", "other_modality", "sharpen"]

LARGEST = 3_000_000
"""Parameters of a tiny model at most: more means that a size was left at its default."""


def build(kind: str, seed: int = 0) -> nn.Module:
    """The tiny model of a type, in eval mode, float32 on the CPU.

    Raises:
        ValueError: the configuration is not tiny.
    """
    config = configuration(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{kind} has {size:,} parameters, more than {LARGEST:,}: a size was left at its default")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    return sharpen(model, spread=0.15 if kind in GENTLE else 0.3, seed=seed).eval()


def sharpen(model: nn.Module, spread: float, seed: int = 0) -> nn.Module:
    """Random weights: matrices of standard deviation ``spread``, sinks of 1, the rest (biases, norms, time constants)
    moved by 0.3 from where it was.

    Attention is then far from uniform, gates are open and shut, and no bias, sink or norm is where a mistake about it
    would not be seen. Buffers that correct expert scores start at zero and are moved too; tables of experts are drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *_score_corrections(model)):
            noise = torch.randn(tensor.shape, generator=generator)
            if "sink" in name:
                tensor.copy_(noise)
            elif _is_matrix(tensor) and "A_log" not in name:
                tensor.copy_(spread * noise)
            else:
                tensor.add_(0.3 * noise)
        for name, table in model.named_buffers():
            if name.endswith("tid2eid"):  # the experts of each token id; all zero until weights are loaded
                choices = torch.rand(table.shape[0], EXPERTS, generator=generator).argsort(1)
                table.copy_(choices[:, : table.shape[1]])
    return model


def _is_matrix(tensor: Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) >= 2


def _score_corrections(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, buffer) for name, buffer in model.named_buffers() if "score_correction" in name)


_SETTINGS = ("sliding_window", "layer_type", "attention_type", "is_sliding", "use_rope", "attention_chunk_size")


def lonely_kinds(model: nn.Module) -> Mapping[str, list[str]]:
    """For each stack of layers, what only one of its layers has: a class of modules, or a setting of attention.

    Two layers of each kind are needed to see, for example, that the second one reads what the first one made.
    """
    found = {name: _lonely(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and _is_stack(name)}
    return {name: kinds for name, kinds in found.items() if kinds}


def _is_stack(name: str) -> bool:
    """True for layers of the language model: lists inside layers hold experts, and rotary tables are no layers."""
    nested = any(part.isdigit() for part in name.split("."))
    return not nested and not other_modality(name) and "rotary" not in name


def other_modality(name: str) -> bool:
    """True for a module or parameter of a vision or audio tower, by its name."""
    return any(word in name for word in ("vision", "visual", "image", "audio", "img"))


def _lonely(stack: nn.ModuleList) -> list[str]:
    count = Counter(trait for layer in stack for trait in _traits(layer))
    return sorted(trait for trait, layers in count.items() if layers == 1)


def _traits(layer: nn.Module) -> set[str]:
    classes = {type(module).__name__ for module in layer.modules() if not isinstance(module, nn.Identity)}
    return classes | {f"{name}={getattr(m, name)}" for m in layer.modules() for name in _SETTINGS if hasattr(m, name)}
