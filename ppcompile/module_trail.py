"""Which module the model's code was in when the capture failed, or asked for the row's length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import sympy
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

__all__ = ["ModuleTrail"]


class ModuleTrail:
    """Follows the calls of a model's modules while it is captured.

    Attributes:
        guards: for each condition on sizes that the capture met, in order, the path of the module that asked.
        fixed_in: the path of the module that fixed the row's length to a number, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self._path = {id(module): path for path, module in model.named_modules()}
        self._open: list[str] = []
        self._ids: Any = None
        self.guards: list[str] = []
        self.fixed_in: str | None = None

    @property
    def innermost(self) -> str:
        """The module whose code runs, or ran when it failed; ``""`` for the model itself."""
        return self._open[-1] if self._open else ""

    @property
    def culprit(self) -> str:
        """The module to name if the capture failed now."""
        return self.innermost or self.fixed_in or ""

    def watch(self, input_ids: Tensor) -> None:
        """Attribute conditions on the sizes of this (fake) tensor from now on."""
        self._ids = input_ids

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Follow the calls of modules inside the block. After an error, :attr:`innermost` stays where it happened."""
        hooks = (register_module_forward_pre_hook(self._enter), register_module_forward_hook(self._leave))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, module: nn.Module, _args: Any) -> None:
        if id(module) in self._path:
            self._attribute()
            self._open.append(self._path[id(module)])

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if id(module) not in self._path:
            return
        self._attribute()
        # Calls that ended in an error which the model caught were never left.
        while self._open and self._open.pop() != self._path[id(module)]:
            continue

    def _attribute(self) -> None:
        """Conditions that are new since the last call or return were met in the module that is open."""
        if self._ids is None:
            return
        new = len(self._ids.fake_mode.shape_env.guards) - len(self.guards)
        self.guards += [self.innermost] * new
        length = self._ids.shape[1]
        fixed = isinstance(length, int) or isinstance(length.node.expr, sympy.Integer)
        if fixed and self.fixed_in is None:
            self.fixed_in = self.innermost
