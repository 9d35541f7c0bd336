"""Log-probabilities of a frozen reference on the same packs that the policy trains on.

A reference is one of three, and all three take the same batch:

    reference = ppcompile.wrap(frozen_model)                            # a model of its own
    reference = ppcompile.AdaptersOff(packed)                           # the policy itself without its peft adapters
    reference = ppcompile.CachedReference("ref.sqlite", reference)      # either, remembered on disk

    logps = ppcompile.reference_logps(reference, batch)                 # float32 [R], as packed(batch).logps

Whatever mode the reference's model is in, it runs in eval mode and without gradient, and is left as it was found: the
policy that trains with dropout is still its own fixed reference with the adapters off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .packed_model import PackedModel, PackedOutput
from .runtime.batch import PackedBatch

__all__ = ["AdaptersOff", "Reference", "reference_logps"]


class Reference(Protocol):
    """Anything that answers for a pack; see the top of this file."""

    def reference_output(self, batch: PackedBatch) -> PackedOutput:
        """Log-probabilities of the batch's responses, without gradient."""


def reference_logps(reference: PackedModel | Reference, batch: PackedBatch, *, per_token: bool = False) -> Tensor:
    """Log-probabilities of the batch's responses under a frozen reference.

    Args:
        reference: a wrapped model, :class:`AdaptersOff`, or :class:`CachedReference`.
        batch: a pack, on the device of the model (a cache takes any, and answers there).
        per_token: one for each scored token, float32 ``[M]``, instead of the sums.

    Returns:
        Float32 ``[R]``, in input order, without gradient.

    Raises:
        TypeError: something else, such as a model that is not wrapped.
        What the reference raises for a batch that it cannot take.
    """
    if isinstance(reference, PackedModel):
        output = evaluate(reference, batch)
    elif hasattr(reference, "reference_output"):
        output = reference.reference_output(batch)
    else:
        raise TypeError(
            f"a reference is a wrapped model, AdaptersOff or CachedReference, got {type(reference).__name__}"
            + (". Try: ppcompile.wrap(model)" if isinstance(reference, nn.Module) else "")
        )
    return output.token_logps if per_token else output.logps


class AdaptersOff:
    """The reference that a model with peft adapters carries in itself: its base weights.

    Costs no second model in memory. The base must stay as it was: adapters that train biases with it, or parameters of
    the base that train too, are refused.

    Attributes:
        packed: the wrapped model, ``ppcompile.wrap(peft.get_peft_model(...))``.
    """

    def __init__(self, packed: PackedModel) -> None:
        """Check that switching the adapters off gives a fixed model.

        Raises:
            TypeError: not a wrapped model with peft adapters.
            ValueError: with the adapters off, something that trains would be left.
        """
        adapted: Any = getattr(packed, "unwrapped", None)  # peft has no types
        if not isinstance(getattr(getattr(adapted, "base_model", None), "prefix", None), str):
            raise TypeError(
                f"AdaptersOff takes a wrapped peft model with adapters in its layers, got {type(packed).__name__}"
                f"{f' of {type(adapted).__name__}' * (adapted is not None)}. "
                "Try: AdaptersOff(ppcompile.wrap(peft.get_peft_model(model, config))), or wrap a frozen copy"
            )
        self.packed = packed
        self._check_base_is_frozen()

    def reference_output(self, batch: PackedBatch) -> PackedOutput:
        """The base model's log-probabilities; the adapters are on again afterwards."""
        self._check_base_is_frozen()  # someone may have unfrozen more since
        adapted: Any = self.packed.unwrapped  # peft has no types
        with adapted.disable_adapter():
            return evaluate(self.packed, batch)

    def base_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers that remain with the adapters off, by name."""
        for name, tensor in named_tensors(self.packed.unwrapped):
            if not self._is_adapter(name):
                yield name, tensor

    def _check_base_is_frozen(self) -> None:
        left = [name for name, p in self.packed.named_parameters() if p.requires_grad and not self._is_adapter(name)]
        if left:
            raise ValueError(
                f"{len(left)} trained parameters stay when the adapters are off, {left[0]} for one, so the reference "
                "would move with the policy. Try: bias='none' and nothing unfrozen beside the adapters, or wrap a "
                "frozen copy of the model as reference"
            )

    def _is_adapter(self, name: str) -> bool:
        adapted: Any = self.packed.unwrapped
        # peft marks the parameters of a method by a prefix (lora_, hada_, ...), and copies modules that train whole.
        return adapted.base_model.prefix in name or ".modules_to_save." in name


@torch.no_grad()
def evaluate(packed: PackedModel, batch: PackedBatch) -> PackedOutput:
    """One forward in eval mode, without gradient."""
    with _eval_mode(packed.unwrapped):
        output: PackedOutput = packed(batch)
    return output


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode; then each in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()
