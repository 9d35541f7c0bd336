"""Models that return one value per sequence: which slot of a pack stands for each sequence."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .passes.pooling import Pooling
from .runtime.batch import PackedBatch

__all__ = ["pooled_slots"]


def pooled_slots(batch: PackedBatch, pooling: Pooling) -> Tensor:
    """int64 ``[R]``: the slot at which each sequence's value is taken, in input order.

    As the eager model chooses it: the last token, or the rightmost one that is not the padding token (an end of
    sequence token that doubles as padding is passed over), or the first if all are.
    """
    if pooling.padding is None:
        return batch.last_slots
    real = batch.input_ids[0] != pooling.padding
    if bool(real[batch.last_slots].all()):
        return batch.last_slots
    kept = real.cpu().numpy()
    rightmost = [_last(slots[kept[slots]], slots) for slots in batch.sequence_slots()]
    return torch.tensor(rightmost, device=batch.device)


def _last(counted: NDArray[np.int64], slots: NDArray[np.int64]) -> int:
    return int(counted[-1]) if len(counted) else int(slots[0])
