"""What an epoch costs and what a step keeps in memory, predicted by counting operations and bytes.

Operations, for one epoch of the trained model (a reference model is not in it)::

    body = passes * (token_flops * slots + pair_flops * pairs)
    head = head_flops * (3 * slots         padded rows: logits of every slot, forward and backward (twice the forward)
                         4 * scored        packs: logits of scored slots, computed once more in the backward)

``passes`` is 3, a forward and a backward of twice its cost; with ``checkpoint="layer"`` it is 4, since the forward runs
once more. ``slots`` are tokens, padding included; ``pairs`` a token and one that it sees, by a kernel that skips what
causality hides (padded rows: ``rows * width * (width + 1) / 2``, which their kernels do not always reach); windows and
chunks of attention are not taken off. A pack's last layer leaves out tokens whose output nobody reads, so packs cost a
little less than predicted.

Bytes of the largest step::

    state_bytes * parameters / shards                     weights, gradients, optimizer
    + kept * slots                                        what the backward needs
    + 2 * itemsize * vocabulary * slots                   padded rows: logits and their gradient
      or 4 buffers of LOGITS_BUDGET float32 numbers       packs: logits in chunks

``kept`` is ``kept_bytes``, counted on the eager model; with ``checkpoint="layer"`` it is what enters each layer,
``(layers + 3) * hidden_size * itemsize`` (three for the last norm and the head), and ``kept_bytes / layers`` for the
one layer that is computed again. Padded rows take more where a loss keeps further copies of the logits. Packs are given
``HEADROOM`` of the memory, which leaves the rest to the allocator, communication and temporary tensors.

``token_flops``, ``pair_flops``, ``head_flops`` and ``kept_bytes`` are counted, see :mod:`ppcompile.plan.size`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ppcompile.plan.budgets import Packed
from ppcompile.plan.lengths import Padded
from ppcompile.plan.size import ModelSize
from ppcompile.runtime.epilogues.token_logps import LOGITS_BUDGET
from ppcompile.runtime.packing.cost import CostModel
from ppcompile.runtime.packing.pool import Work

__all__ = ["HEADROOM", "Machine", "epoch_flops", "fitting_budget", "step_bytes"]

HEADROOM = 0.9

_LOGITS_BUFFERS = 4 * 4 * LOGITS_BUDGET["cuda"]


@dataclass(frozen=True)
class Machine:
    """Where and how the model is trained.

    Attributes:
        memory: bytes of one device.
        state_bytes: bytes a parameter of weights, gradients and optimizer state: 16 for AdamW in mixed precision
            (float32 weights, gradients and two moments), 8 for AdamW in pure bfloat16.
        shards: devices that share these.
        checkpoint: ``"layer"`` or ``None``, as in ``ppcompile.wrap``.
    """

    memory: float = 80e9
    state_bytes: float = 16
    shards: int = 1
    checkpoint: str | None = None


def epoch_flops(layout: Padded | Packed, size: ModelSize, machine: Machine) -> float:
    """Operations of one epoch; see the formula at the top."""
    body = CostModel(per_token=size.token_flops, per_pair=size.pair_flops)
    passes = 3 if machine.checkpoint is None else 4
    rows = 3 * layout.slots if isinstance(layout, Padded) else 4 * layout.scored
    return passes * body.predict(Work(layout.slots, layout.pairs)) + size.head_flops * rows


def step_bytes(layout: Padded | Packed, size: ModelSize, machine: Machine) -> float:
    """Bytes that the largest step takes; see the formula at the top."""
    every_logit = 2 * size.itemsize * size.vocabulary * layout.largest
    logits = every_logit if isinstance(layout, Padded) else _LOGITS_BUFFERS
    return _states(size, machine) + _kept(size, machine) * layout.largest + logits


def fitting_budget(size: ModelSize, machine: Machine) -> int:
    """The largest ``max_tokens`` whose packs fit; 0 or less where not even the states do."""
    left = HEADROOM * machine.memory - _states(size, machine) - _LOGITS_BUFFERS
    return int(left / _kept(size, machine))


def _states(size: ModelSize, machine: Machine) -> float:
    return machine.state_bytes * size.parameters / machine.shards


def _kept(size: ModelSize, machine: Machine) -> float:
    """Bytes a slot that the backward needs."""
    if machine.checkpoint is None:
        return size.kept_bytes
    return (size.layers + 3) * size.hidden_size * size.itemsize + size.kept_bytes / size.layers
