"""The packs of an epoch, planned, counted, and recognized again after a kill."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch.distributed

from ppcompile.data.batches import check_pairs, samples_of
from ppcompile.data.samples import Sample
from ppcompile.runtime.batch import check_int
from ppcompile.runtime.packing.cost import CostModel
from ppcompile.runtime.packing.packs import PackPlan, PackPlans, plan_packs

__all__ = ["Packing", "Planned", "Position", "check_settings", "numbered", "rank_and_world"]


class Position(NamedTuple):
    """How far an epoch has come on one rank.

    Attributes:
        packs: packs handed out.
        digest: checksum of all that they hold, in order.
    """

    packs: int = 0
    digest: int = 0

    def after(self, plan: PackPlan) -> Position:
        """One pack further."""
        digest = self.digest
        for item in plan.items:
            digest = zlib.crc32(np.array([item.index, *item.sequences]).tobytes(), digest)
            for ids in (item.record.prompt, *item.record.responses):
                digest = zlib.crc32(ids.tobytes(), digest)
            for mask in item.record.masks or ():
                digest = zlib.crc32(mask.tobytes(), digest)
        return Position(self.packs + 1, digest)


@dataclass(frozen=True)
class Packing:
    """Everything but the data and the epoch that decides which packs a rank gets; see ``ppcompile.packs``."""

    max_tokens: int = 16384
    share: str = "prompt"
    seed: int = 0
    shuffle: bool = True
    sort: bool = False
    oversize: str | tuple[str, ...] = "error"
    split_groups: bool = False
    drop_last: bool = False
    window: int = 64
    packs_per_step: int = 1
    cost: CostModel | None = None
    rank: int = 0
    world_size: int = 1

    def plans(self, samples: Iterable[Sample], epoch: int) -> PackPlans:
        """The plans of one epoch."""
        options: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plan_packs(samples, epoch=epoch, **options)

    def count(self, samples: Iterable[Sample], epoch: int) -> int:
        """Packs of one epoch on this rank."""
        return sum(1 for _ in self.plans(samples, epoch))

    def settings(self) -> dict[str, Any]:
        """Plain values that a checkpoint can hold."""
        return {**asdict(self), "oversize": list(self.oversize) if isinstance(self.oversize, tuple) else self.oversize}

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse to go on with what was begun otherwise.

        Raises:
            ValueError: ``settings`` of another packing.
        """
        check_settings(settings, self.settings())


def check_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a state that was saved under other settings.

    Raises:
        ValueError: says which.
    """
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if changed:
        was = ", ".join(f"{name}={then.get(name)!r} (now {now.get(name)!r})" for name in changed)
        raise ValueError(f"the state was saved with {was}: its packs would be others; resume with the same settings")


class Planned(NamedTuple):
    """A plan, the position behind it, and whether it is the rank's last one of an optimizer step."""

    plan: PackPlan
    position: Position
    ends_step: bool


def numbered(plans: Iterable[PackPlan], start: Position, world_size: int) -> Iterator[Planned]:
    """Plans from ``start`` on.

    Raises:
        ValueError: the packs before ``start`` are not those that it counted; or a pair is split over packs.
    """
    position, of_step = Position(), 0
    for plan in plans:
        if position.packs == start.packs and position != start:
            break
        position, of_step = position.after(plan), of_step + 1
        ends_step = of_step == plan.step.packs // world_size
        if ends_step:
            of_step = 0
        if position.packs > start.packs:
            check_pairs(samples_of(plan))
            yield Planned(plan, position, ends_step)
    if position.packs <= start.packs and position != start:
        raise ValueError(
            f"the first {start.packs:,} packs of the epoch are not those of the state that was loaded, so resuming "
            "would repeat some records and leave out others: the data, their order, or the tokenizer have changed"
        )


def rank_and_world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Those given, or those of ``torch.distributed``, or a single process.

    Raises:
        ValueError: one is given without the other.
    """
    if (rank is None) != (world_size is None):
        raise ValueError(f"give both rank and world_size, or neither; got rank={rank}, world_size={world_size}")
    if rank is not None and world_size is not None:
        check_int("rank", rank, least=0)
        check_int("world_size", world_size, least=1)
        return rank, world_size
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
