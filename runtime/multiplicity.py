"""How often each slot of a pack stands in the unpacked sequences.

A pack computes a shared token once. Statistics over tokens, such as the load of experts in an auxiliary loss, then
count a prompt once, whatever the number of its responses; weighted by multiplicity they are those of unpacked rows::

    weight = multiplicity(batch)                                  # [T]; the prompt of 4 responses has 4, padding has 0
    load = (weight[:, None, None] * chosen).sum((0, 1)) / weight.sum()            # chosen: one-hot [T, top_k, experts]
    probability = (weight[:, None] * router_probs).sum(0) / weight.sum()          # router_probs: [T, experts]
    aux_loss = experts * (load * probability).sum()
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch import PackedBatch

__all__ = ["multiplicity"]


def multiplicity(batch: PackedBatch) -> Tensor:
    """int64 ``[T]``: the number of sequences that run through each slot; 0 for padding.

    Slot ``j`` is in the sequences whose last slot is one of ``j .. subtree_end[j] - 1``. The sum is the number of
    tokens of the unpacked sequences, ``batch.unpacked_tokens``.
    """
    ends = torch.bincount(batch.last_slots, minlength=batch.num_slots)
    before = torch.cat([ends.new_zeros(1), ends.cumsum(0)])
    return before[batch.subtree_end] - before[:-1]
