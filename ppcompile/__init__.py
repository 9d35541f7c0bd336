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
    from .data.loader import PackedDataLoader as PackedDataLoader
    from .packed_model import PackedModel as PackedModel
    from .packed_model import PackedOutput as PackedOutput
    from .packed_model import wrap as wrap
    from .passes.base import NotPackable as NotPackable
    from .reference import AdaptersOff as AdaptersOff
    from .reference import reference_logps as reference_logps
    from .reference_cache import CachedReference as CachedReference
    from .runtime.batch import PackedBatch as PackedBatch
    from .runtime.batch import StepTotals as StepTotals
    from .runtime.batch import pack as pack
    from .runtime.groups import Group as Group
    from .runtime.groups import Rollout as Rollout
    from .runtime.multiplicity import multiplicity as multiplicity
    from .runtime.packing.cost import CostModel as CostModel
    from .runtime.packing.packs import PackPlan as PackPlan
    from .runtime.packing.packs import packs as packs
    from .runtime.packing.packs import plan_packs as plan_packs
    from .runtime.packing.report import PackingReport as PackingReport
    from .verification import verify as verify

_HOMES = {
    "AdaptersOff": "reference",
    "CachedReference": "reference_cache",
    "CostModel": "runtime.packing.cost",
    "Group": "runtime.groups",
    "NotPackable": "passes.base",
    "PackPlan": "runtime.packing.packs",
    "PackedBatch": "runtime.batch",
    "PackedDataLoader": "data.loader",
    "PackedModel": "packed_model",
    "PackedOutput": "packed_model",
    "PackingReport": "runtime.packing.report",
    "Rollout": "runtime.groups",
    "StepTotals": "runtime.batch",
    "multiplicity": "runtime.multiplicity",
    "pack": "runtime.batch",
    "packs": "runtime.packing.packs",
    "plan_packs": "runtime.packing.packs",
    "reference_logps": "reference",
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
