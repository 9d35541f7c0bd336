"""The drop-in door: an ordinary padded batch, computed packed.

The rows of ``input_ids [B, L]`` are stripped of their padding, every common beginning is computed once, and the logits
are put back where the caller expects them. An unmodified training loop runs unchanged; what it saves is counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .runtime.forest import Forest, forest_from_sequences

__all__ = ["PaddedRows", "Savings", "usual_output"]

_ACCEPTED = "input_ids, attention_mask, position_ids, labels, logits_to_keep, and what switches nothing on"


@dataclass
class Savings:
    """What the padded batches of a wrapped model cost packed, in tokens.

    Attributes:
        batches: padded batches so far.
        padded: their entries, padding included: what the padded model would compute.
        real: their tokens.
        computed: tokens after sharing: what was computed.
    """

    batches: int = 0
    padded: int = 0
    real: int = 0
    computed: int = 0

    def add(self, rows: PaddedRows) -> None:
        """Count one batch."""
        self.batches += 1
        self.padded += rows.slots_BL.numel()
        self.real += int(rows.forest.lengths.sum())
        self.computed += rows.forest.num_slots

    def __str__(self) -> str:
        if not self.batches:
            return "no padded batches yet"
        shared, padding = self.real - self.computed, self.padded - self.real
        return (
            f"{self.batches} padded batches: {self.computed:,} of {self.padded:,} entries computed; "
            f"{shared:,} shared, {padding:,} padding"
        )


@dataclass(frozen=True)
class PaddedRows:
    """A padded batch and the forest of its rows.

    Attributes:
        forest: the rows without padding, common beginnings merged.
        slots_BL: int64 ``[B, L]``, the slot of each entry; 0 on padding.
        real_BL: bool ``[B, L]``, false on padding.
    """

    forest: Forest
    slots_BL: Tensor
    real_BL: Tensor
    layout: dict[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, input_ids: Any, attention_mask: Tensor | None = None, position_ids: Tensor | None = None) -> PaddedRows:
        """Find the rows of a batch.

        Args:
            input_ids: int64 ``[B, L]``.
            attention_mask: ``[B, L]``, 1 on tokens and 0 on padding, left or right; None where nothing is padding.
            position_ids: ``[B, L]``; accepted if they count each row's tokens from 0, as the packed model does.

        Raises:
            TypeError, ValueError: what came in is not such a batch; says what it is.
        """
        real = _mask_of(input_ids, attention_mask)
        if position_ids is not None:
            _check_positions(position_ids, real)
        device, keep = input_ids.device, real.cpu().numpy()
        forest = forest_from_sequences(input_ids.cpu().numpy()[keep], keep.sum(1))
        slots = np.zeros(keep.shape, dtype=np.int64)
        slots[keep] = forest.slots(np.zeros_like(forest.lengths))
        return cls(forest, torch.from_numpy(slots).to(device), real, _layout(forest, device))

    def spread(self, logits_TV: Tensor, keep: int) -> Tensor:
        """``[B, L, V]`` (the last ``keep`` columns, if not 0) from one row a slot; zeros on padding."""
        slots, real = self.slots_BL[:, -keep:], self.real_BL[:, -keep:]
        rows = logits_TV.index_select(0, slots.flatten()).unflatten(0, slots.shape)
        return rows.masked_fill(~real[..., None], 0)

    def check_labels(self, labels: Tensor) -> None:
        """Nothing may be predicted from padding, where the packed model has no token and the padded one has noise.

        Raises:
            ValueError: a label behind an entry that is padding: on the first token of a row that is padded on the left,
                or on the padding itself.
        """
        if labels.shape != self.real_BL.shape:
            return  # the model's own loss says what it makes of them
        bad = (~self.real_BL[:, :-1] & (labels[:, 1:] != -100)).nonzero()
        if bad.numel():
            row, column = bad[0].tolist()
            where = "first token, behind padding on the left," if self.real_BL[row, column + 1] else "padding"
            raise ValueError(
                f"row {row}: its {where} has a label (column {column + 1}), which the padded model predicts from "
                "padding; set that label to -100"
            )

    def pooled(self, padding: int | None) -> Tensor:
        """int64 ``[B]``: the slot of each row's last token, or of its rightmost one that is not ``padding``."""
        tokens = torch.as_tensor(self.forest.tokens, device=self.slots_BL.device).long()[self.slots_BL]
        counted = self.real_BL if padding is None else self.real_BL & (tokens != padding)
        column = torch.arange(self.slots_BL.shape[1], device=self.slots_BL.device)
        first = self.real_BL.long().argmax(1)  # where all are padding tokens
        last = torch.where(counted.any(1), (column * counted).argmax(1), first)
        return self.slots_BL.gather(1, last[:, None])[:, 0]


def _mask_of(input_ids: Any, attention_mask: Any) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        got = f"shape {list(input_ids.shape)}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise TypeError(f"input_ids must be an integer tensor [rows, length], got {got}")
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        got = f"{list(attention_mask.shape)}" if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
        raise ValueError(f"attention_mask must have the shape {list(input_ids.shape)} of input_ids, got {got}")
    real = attention_mask != 0
    starts = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    if (bad := (starts != 1).nonzero()).numel():
        row = int(bad[0])
        what = "is all padding" if not real[row].any() else "has padding between its tokens"
        raise ValueError(f"row {row} of attention_mask {what}; accepted: padding on the left, on the right, or none")
    return real


def _check_positions(position_ids: Tensor, real: Tensor) -> None:
    counted = real.long().cumsum(1) - 1
    if position_ids.shape[-1:] != real.shape[-1:] or (position_ids.expand_as(counted) != counted)[real].any():
        raise ValueError("position_ids must count each row's tokens from 0; leave them out, or strip what precedes")


def _layout(forest: Forest, device: torch.device) -> dict[str, Tensor]:
    """The layout inputs of a packed graph; no slot is scored, which takes two entries that nobody reads."""
    on_device = {
        "input_ids": forest.tokens[None].astype(np.int64),
        "position_ids": forest.positions[None],
        "subtree_end": forest.subtree_end,
        "predecessors": np.zeros(2, dtype=np.int64),
        "targets": np.zeros(2, dtype=np.int64),
    }
    layout = {name: torch.from_numpy(array).to(device) for name, array in on_device.items()}
    return {**layout, "segments": torch.from_numpy(forest.segments)}


def usual_output(model: nn.Module, logits: Tensor, labels: Tensor | None, options: dict[str, Any]) -> Any:
    """What the user's model would return: transformers' output object, with a loss where labels were given.

    Args:
        model: the user's model.
        logits: ``[B, L, V]``, or ``[B, K]`` of a model that returns one value per sequence.
        labels: ``[B, L]`` as the model's own loss takes them, or None.
        options: the other keywords of the call.

    Raises:
        TypeError: an option that the packed forward cannot honour, or labels for a model without a loss of its own.
    """
    on = [name for name, value in options.items() if name != "num_items_in_batch" and value not in (None, False)]
    if options.get("return_dict") is True:
        on.remove("return_dict")
    if on:
        raise TypeError(f"a packed forward cannot honour {', '.join(on)}; accepted: {_ACCEPTED}")
    config: Any = getattr(model, "config", None)
    loss: Any = None
    if logits.dim() == 2:
        return _sequence_output(logits, labels, config)
    if labels is not None:
        if not hasattr(model, "loss_function") or config is None:
            raise TypeError(f"{type(model).__name__} has no loss_function; compute the loss from the logits")
        counted = {k: v for k, v in options.items() if k == "num_items_in_batch" and v is not None}
        text = config.get_text_config()
        loss_function: Any = model.loss_function
        loss = loss_function(logits=logits, labels=labels, vocab_size=text.vocab_size, **counted)
    if config is None:
        return logits
    from transformers.modeling_outputs import CausalLMOutputWithPast

    return CausalLMOutputWithPast(loss=loss, logits=logits)


def _sequence_output(logits: Tensor, labels: Tensor | None, config: Any) -> Any:
    if labels is not None:
        raise TypeError("labels of whole sequences are not taken; compute the loss from .logits [rows, outputs]")
    if config is None:
        return logits
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    return SequenceClassifierOutputWithPast(logits=logits)
