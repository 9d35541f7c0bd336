"""Which modules stay as they are, when something in a model cannot be packed.

The smallest module around what was refused that maps rows of tokens to rows of tokens, together with all modules like
it. If it takes or returns something else besides, it depends on who else reads that: the next refusal names the reader.
Nothing larger than a layer: a model that stays as it is as a whole would share nothing.
"""

from __future__ import annotations

import re

from torch import nn

from .capture import call_model
from .passes.base import Refusal
from .unsharing import CannotWatch, Unsharing, observe

__all__ = ["widened"]


def widened(model: nn.Module, unshared: Unsharing, refusal: Refusal) -> Unsharing | None:
    """``unshared`` with what makes the refusal go away, or None if there is nothing to try."""
    if refusal.final:
        return None
    inside = [path for path in unshared if refusal.module == path or refusal.module.startswith(f"{path}.")]
    start = _parent(inside[0]) if inside else refusal.module
    why = unshared[inside[0]] if inside else refusal.reason.partition("; ")[0]
    for path in _around(model, start):
        fit = _fit(model, path, why)
        if path in fit:
            kept = {p: reason for p, reason in unshared.items() if not any(_holds(new, p) for new in fit)}
            return kept | dict.fromkeys((p for p in fit if not any(_holds(old, p) for old in kept)), why)
    return None


def _fit(model: nn.Module, path: str, why: str) -> list[str]:
    """The modules like the one at ``path``, itself included, that could run on unpacked rows."""
    try:
        watched = observe(model, dict.fromkeys(_alike(model, path), why), call_model)
    except CannotWatch:
        return []
    return [other for other, found in watched.items() if not found.unfit]


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _holds(path: str, other: str) -> bool:
    return other == path or other.startswith(f"{path}.")


def _around(model: nn.Module, path: str) -> list[str]:
    """``path`` and the modules around it, up to the layer."""
    found = []
    largest = _layer(model, path)
    while path and _holds(largest, path):
        found.append(path)
        path = _parent(path)
    return found


def _layer(model: nn.Module, path: str) -> str:
    """The outermost element of a list of modules that ``path`` lies in; without one, the model's own child."""
    parts = path.split(".")
    for n in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:n])), (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            return ".".join(parts[: n + 1])
    return _smallest_half(model, parts)


def _smallest_half(model: nn.Module, parts: list[str]) -> str:
    """The largest module around that holds at most half of the model's weights."""
    total = sum(p.numel() for p in model.parameters())
    for n in range(1, len(parts)):
        path = ".".join(parts[:n])
        if 2 * sum(p.numel() for p in model.get_submodule(path).parameters()) <= total:
            return path
    return ".".join(parts)


def _alike(model: nn.Module, path: str) -> list[str]:
    """Modules of the same class at the same place of other layers, built of the same classes."""
    pattern, module = re.sub(r"\d+", "*", path), model.get_submodule(path)
    return [
        other
        for other, candidate in model.named_modules()
        if re.sub(r"\d+", "*", other) == pattern and _classes(candidate) == _classes(module)
    ]


def _classes(module: nn.Module) -> list[tuple[str, type]]:
    return [(path, type(part)) for path, part in module.named_modules()]
