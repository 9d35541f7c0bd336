"""ppcompile: any causal LM, trained on preference-packed batches.

    packed = ppcompile.wrap(model)
    batch = ppcompile.pack([ppcompile.Group(prompt=[...], responses=[[...], [...]])])
    out = packed(batch)  # out.logps [R], out.token_logps, out.lengths

Public names load on first use; importing the package loads nothing else.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .packed_model import PackedModel as PackedModel
    from .packed_model import PackedOutput as PackedOutput
    from .packed_model import wrap as wrap
    from .passes.base import NotPackable as NotPackable
    from .runtime.batch import PackedBatch as PackedBatch
    from .runtime.batch import StepTotals as StepTotals
    from .runtime.batch import pack as pack
    from .runtime.groups import Group as Group
    from .runtime.groups import Rollout as Rollout
    from .verification import verify as verify

_HOMES = {
    "Group": "runtime.groups",
    "NotPackable": "passes.base",
    "PackedBatch": "runtime.batch",
    "PackedModel": "packed_model",
    "PackedOutput": "packed_model",
    "Rollout": "runtime.groups",
    "StepTotals": "runtime.batch",
    "pack": "runtime.batch",
    "verify": "verification",
    "wrap": "packed_model",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
