"""That all ranks pack the same data, checked before the first pack of each epoch.

Every rank plans all packs and takes its own, which leaves nothing out only where all ranks read the same records in the
same order. The usual mistake is to hand each rank its part, as other loaders want it: each would then leave out most of
its part, and ranks would differ in their number of packs.

What a rank knows of the first step stands in the store through which the ranks found each other, and is compared with
what the others have written there so far: no rank waits for another, and of two ranks the later one sees a difference.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch.distributed

from ppcompile.data.plans import Planned

__all__ = ["Agreement"]

_number = itertools.count()


class Agreement:
    """One loader's, or sampler's, that deals packs to the ranks of ``torch.distributed``.

    Ranks make their loaders in the same order, so a loader is known by its number.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self._rank, self._world_size, self._loader = rank, world_size, next(_number)

    @classmethod
    def of(cls, rank: int | None, found_rank: int, found_world_size: int) -> Agreement | None:
        """For ranks that were not given by hand; a rank alone agrees with itself."""
        return cls(found_rank, found_world_size) if rank is None and found_world_size > 1 else None

    def checked(self, planned: Iterator[Planned], epoch: int) -> Iterator[Planned]:
        """The same plans, the first of them compared with those of other ranks.

        Raises:
            ValueError: another rank has other ones.
        """
        for first in planned:
            self._compare(epoch, first)
            yield first
            break
        yield from planned

    def _compare(self, epoch: int, first: Planned) -> None:
        store = torch.distributed.distributed_c10d._get_default_store()
        step, place = first.plan.step, f"ppcompile loader {self._loader} epoch {epoch} pack {first.position.packs}"
        mine = f"{step.responses} responses with {step.scored_tokens} scored tokens in {step.packs} packs"
        store.set(f"{place} rank {self._rank}", mine)
        for other in range(1, self._world_size) if self._rank == 0 else (0,):
            key = f"{place} rank {other}"
            if store.check([key]) and (theirs := store.get(key).decode()) != mine:
                raise ValueError(
                    f"rank {self._rank} and rank {other} pack different data, or with different settings: step "
                    f"{step.index} of epoch {epoch} is {mine} here and {theirs} there, so records would be left out. "
                    "Give every rank all records in the same order, not its part of them: the loader deals the packs. "
                    "A loader for one rank alone takes rank=0, world_size=1"
                )
