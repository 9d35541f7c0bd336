"""A model in float64 throughout, also where its code asks for float32 by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["InDouble"]


class InDouble(nn.Module):
    """``model`` in float64: parameters, buffers, and what norms, softmaxes and rotary tables cast to float32.

    Args:
        model: changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()
        self.config = model.config

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """As the model's own, without a cache."""
        with _Widened():
            return self.model(input_ids)


class _Widened(TorchFunctionMode):
    """Calls of torch that name float32 get float64."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wide = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **wide)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
