"""Refusals that need not wait for the whole capture.

A module that convolves over tokens, or whose code fixes the row's length, will be refused in the end; capturing the
rest of it symbolically can take a minute. The capture stops at the first sign, in the module where it shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .capture_checks import model_line
from .passes.base import NotPackable, Refusal

__all__ = ["RefuseEarly"]

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.nn.functional.conv1d, torch.nn.functional.conv2d)


class RefuseEarly(TorchFunctionMode):
    """Watches the functions that a model calls while it is captured.

    Args:
        input_ids: the (fake) token ids ``[1, T]``, whose T is symbolic until somebody fixes it.
        module: names the module whose code runs.
    """

    def __init__(self, input_ids: Tensor, module: Callable[[], str]) -> None:
        super().__init__()
        self._ids, self._module = input_ids, module
        self._length = input_ids.shape[1].node.expr  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``, unless it is known already that the module cannot be captured.

        Raises:
            NotPackable: a convolution over tokens, or a row's length that is no longer free.
        """
        if func in _CONVOLUTIONS and self._over_tokens(args[0]):
            reason = "a convolution over the tokens of the row lets neighbours of different responses see each other"
            raise NotPackable(Refusal(reason, self._module(), f"aten.{func.__name__}", model_line()))
        result = func(*args, **(kwargs or {}))
        if isinstance(self._ids.shape[1].node.expr, sympy.Integer):  # type: ignore[attr-defined]
            reason = "the code takes the row's length for a fixed number (a loop over tokens, a branch on their number)"
            raise NotPackable(Refusal(reason, self._module(), "torch.export", model_line()))
        return result

    def _over_tokens(self, x: Any) -> bool:
        sizes = x.shape[2:] if isinstance(x, Tensor) else ()
        return any(isinstance(size, torch.SymInt) and self._length in size.node.expr.free_symbols for size in sizes)
