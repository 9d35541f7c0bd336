"""What a model's modules remember besides parameters and buffers: numbers, tensors, lists, objects.

A forward that stores something may read it the next time. A captured graph does neither.
"""

from __future__ import annotations

import contextlib
import types
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .passes.base import NotPackable, Refusal

__all__ = ["Attributes", "keeps_nothing"]

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Parameters, buffers, hooks and submodules: torch.export reports what becomes of buffers, the rest is not state."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_OPAQUE = (torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType)
_CONTAINERS = (list, tuple, dict, deque, set)
_DEPTH = 4


@contextlib.contextmanager
def keeps_nothing(model: nn.Module) -> Iterator[None]:
    """Refuse a forward that stores something on a module.

    It stands around the forward itself: ``torch.export`` puts tensors back without a word.

    Raises:
        NotPackable: names the module and the attribute; both are as they were.
    """
    attributes = Attributes(model)
    try:
        yield
    finally:
        changed = attributes.restore()
    for path, attribute in changed:
        reason = f"the forward pass stores {attribute!r} on the module, which a captured graph would not do"
        raise NotPackable(Refusal(reason, path, op="assignment", hint="keep no state between forwards"))


class Attributes:
    """The modules' attributes as they are now, and what is in them."""

    def __init__(self, model: nn.Module) -> None:
        memory: dict[int, _Saved] = {}
        self._model = model
        self._before = {
            path: {name: _saved(value, memory, _DEPTH) for name, value in _own(module).items()}
            for path, module in model.named_modules()
        }

    def restore(self) -> list[tuple[str, str]]:
        """Put back what was assigned or changed since then, and name it: ``(module path, attribute)``."""
        changed, put_back = [], set[int]()
        for path, module in self._model.named_modules():
            before, now = self._before[path], _own(module)
            for name, saved in before.items():
                if name not in now or saved.differs_from(now[name], set()):
                    changed.append((path, name))
                module.__dict__[name] = saved.value
            for name in [name for name in now if name not in before]:
                changed.append((path, name))
                del module.__dict__[name]
        for saved in (saved for before in self._before.values() for saved in before.values()):
            saved.put_back(put_back)
        return changed


def _own(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}


# --------------------------------------------------------------------------- one value


@dataclass(eq=False)
class _Saved:
    """A value, and what a container or an object held when it was saved."""

    value: Any
    parts: dict[Any, _Saved] = field(default_factory=dict)
    followed: bool = False

    def differs_from(self, now: Any, seen: set[int]) -> bool:
        """True if ``now`` is or holds something else. A container may be another one that holds the same."""
        if isinstance(self.value, _PLAIN):
            return now is not self.value and (type(now) is not type(self.value) or bool(now != self.value))
        rebuilt = type(now) is type(self.value) and isinstance(now, _CONTAINERS)
        if now is not self.value and not rebuilt:
            return True
        if not self.followed or id(self) in seen:
            return False
        seen.add(id(self))
        parts = _parts(now)
        return parts.keys() != self.parts.keys() or any(
            part.differs_from(parts[key], seen) for key, part in self.parts.items()
        )

    def put_back(self, done: set[int]) -> None:
        """Let the value hold again what it held."""
        if not self.followed or id(self) in done:
            return
        done.add(id(self))
        held = {key: part.value for key, part in self.parts.items()}
        now = _parts(self.value)
        if now.keys() != held.keys() or any(now[key] is not value for key, value in held.items()):
            _fill(self.value, held)
        for part in self.parts.values():
            part.put_back(done)


def _saved(value: Any, memory: dict[int, _Saved], depth: int) -> _Saved:
    if isinstance(value, _PLAIN):
        return _Saved(value)
    if id(value) in memory:
        return memory[id(value)]
    saved = memory[id(value)] = _Saved(value)
    if depth and not isinstance(value, _OPAQUE) and (isinstance(value, _CONTAINERS) or hasattr(value, "__dict__")):
        saved.followed = True
        saved.parts = {key: _saved(part, memory, depth - 1) for key, part in _parts(value).items()}
    return saved


def _parts(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple, deque)):
        return dict(enumerate(value))
    if isinstance(value, set):
        return {element: element for element in value}
    return dict(vars(value))


def _fill(value: Any, held: dict[Any, Any]) -> None:
    if isinstance(value, (list, deque)):
        value.clear()
        value.extend(held.values())
    elif isinstance(value, set):
        value.clear()
        value.update(held)
    elif not isinstance(value, tuple):
        attributes = value if isinstance(value, dict) else vars(value)
        attributes.clear()
        attributes.update(held)
