"""Tensors that a module reads without being given them: closures, lists that others fill, attributes set on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["ForeignTensors", "own_tensors"]

_LITERALS = ("aten::lift_fresh", "aten::lift_fresh_copy", "aten::lift")
"""What ``torch.tensor([1, 2])`` calls on a tensor that it just made of numbers in the code."""


def own_tensors(module: nn.Module) -> list[Tensor]:
    """A module's parameters and buffers, and the tensors that are plain attributes of it or its parts."""
    plain = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return [*module.parameters(), *module.buffers(), *plain]


class ForeignTensors(TorchDispatchMode):
    """Watches every operator inside the block for tensors that are neither known nor made inside the block.

    Attributes:
        found: the name of an operator that read one, or None.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.found: str | None = None
        # Storages, as views are the same tensor. A foreign one was made before the block and lives on, so that none
        # that is made inside can take its address.
        self._known = {_storage(tensor) for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run ``func``, noting what it reads and makes."""
        kwargs = kwargs or {}
        read = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        literal = func._schema.name in _LITERALS
        if self.found is None and not literal and any(_storage(tensor) not in self._known for tensor in read):
            self.found = str(func)
        result = func(*args, **kwargs)
        self._known.update(_storage(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
