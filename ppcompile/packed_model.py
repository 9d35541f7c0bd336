"""``wrap(model)``: the model, trained on packs.

A :class:`PackedModel` is a second face of the user's model, not a copy: it shares the model's own dictionaries of
parameters, buffers and submodules, so that ``state_dict`` names, optimizers and devices are the model's. The packed
graphs take the state as inputs, read afresh at each call.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Hashable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .capture_checks import python_state
from .layers import CHECKPOINT, COMPILE, Runner
from .padded import PaddedRows, Savings, usual_output
from .passes.base import LAYOUT_INPUTS, ROW_INPUTS
from .pipeline import Compiled, compile_model
from .pooled import pooled_slots
from .runtime.batch import PackedBatch
from .runtime.rows import unpacked_rows
from .shard_hooks import user_hooks
from .sharding import MARKS, Sharding

__all__ = ["PackedModel", "PackedOutput", "PackedRewards", "wrap"]

_log = logging.getLogger(__name__)

_SHARED = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
"""What makes one module out of two faces: the tensors, and what happens when they are saved and loaded."""


@dataclass(frozen=True)
class PackedOutput:
    """What a packed model returns.

    Attributes:
        logps: float32 ``[R]``, sum of the log-probabilities of each response's tokens, in input order.
        token_logps: float32 ``[M]``, one per response token, flat, in input order.
        lengths: int64 ``[R]``, number of tokens of each response.
    """

    logps: Tensor
    token_logps: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class PackedRewards:
    """What a packed reward model returns.

    Attributes:
        rewards: float32 ``[R]``, the value of each sequence (prompt and response), in input order; ``[R, K]`` of a
            model with K outputs.
        lengths: int64 ``[R]``, number of tokens of each response.
    """

    rewards: Tensor
    lengths: Tensor


for _output in (PackedOutput, PackedRewards):  # hooks of DistributedDataParallel look into them
    torch.export.register_dataclass(_output, serialized_type_name=f"ppcompile.{_output.__name__}")


def wrap(
    model: nn.Module,
    *,
    backend: str = "auto",
    compile: bool | str = False,  # noqa: A002 - torch's word
    checkpoint: str | None = None,
    verify: bool = False,
) -> PackedModel:
    """Make ``model`` take preference-packed batches.

    Args:
        model: maps token ids ``[1, L]`` to logits ``[1, L, V]`` (a tensor, ``.logits``, or the first of a tuple).
            Its parameters stay its own: training the result trains the model.
        backend: attention backend: ``"auto"`` (the best of the device), ``"cascade"``, ``"flex"``, ``"reference"``.
        compile: run the packed graph through ``torch.compile``, for all lengths, at the first forward: ``True`` the
            whole graph as one artifact, ``"layer"`` one artifact for each kind of layer, which is made sooner, and the
            way to compile a sharded model. Without it FlexAttention alone is compiled.
        checkpoint: ``"layer"`` keeps what enters each layer for the backward and computes the rest again. Without it
            the model's own setting holds (``model.gradient_checkpointing_enable()``).
        verify: compare the packed with the eager unpacked model before returning (:func:`ppcompile.verify`).

    Returns:
        A module that takes ``ppcompile.pack(...)`` and returns a :class:`PackedOutput`.

    Raises:
        TypeError: ``model`` is wrapped for several ranks already; that goes around the packed model.
        ValueError: an option that is unknown, or that the model has no layers for.
        NotPackable: the model mixes tokens in a way that packing would change, or that cannot be proved safe;
            names the module, the operator and the source line.
        Mismatch: with ``verify``, the packed model does not compute what the eager unpacked model computes.
    """
    packed = PackedModel(model, backend=backend, compile=compile, checkpoint=checkpoint)
    compiled = packed.compiled()  # refuse now, not at the first step
    if compiled.graph.unshared:
        from .report import unshared_note

        _log.warning(unshared_note(model, compiled))
    if verify:
        from .verification import verify as compare

        compare(packed)
    return packed


class PackedModel(nn.Module):
    """See :func:`wrap`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        backend: str = "auto",
        compile: bool | str = False,  # noqa: A002
        checkpoint: str | None = None,
    ) -> None:
        super().__init__()
        _check_options(model, compile, checkpoint)
        own = self.__dict__
        own["_model"] = model
        for shared in _SHARED:
            own[shared] = getattr(model, shared)
        own["training"] = model.training
        self._options: dict[str, Any] = {"backend": backend, "compile": compile, "checkpoint": checkpoint}
        self._compiled: dict[Hashable, tuple[Compiled, Runner]] = {}
        self._buffers_seen = _Contents()
        self.savings = Savings()

    # ------------------------------------------------------------------ a second face of the model

    @property
    def unwrapped(self) -> nn.Module:
        """The user's model."""
        model: nn.Module = self.__dict__["_model"]
        return model

    def train(self, mode: bool = True) -> PackedModel:
        """Set the mode of the user's model too; each mode has a graph of its own."""
        self.unwrapped.train(mode)
        self.__dict__["training"] = mode
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_model" or "_model" not in self.__dict__:
                raise
            return getattr(self.unwrapped, name)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles carry the model; graphs are made again where they are needed."""
        return _rebuilt, (self.unwrapped, self._options)

    def extra_repr(self) -> str:
        """Whose second face this is."""
        options = ", ".join(f"{name}={value!r}" for name, value in self._options.items())
        return f"packed {type(self.unwrapped).__name__}, {options}"

    # ------------------------------------------------------------------ graphs

    def compiled(self) -> Compiled:
        """The packed graph for the model's present mode, dtype and device; compiled when first needed."""
        compiled, _ = self._ready(Sharding(self.unwrapped, self))
        return compiled

    def _ready(self, sharding: Sharding, epilogue: str = "scores") -> tuple[Compiled, Runner]:
        key = self._fingerprint(sharding), epilogue
        if key not in self._compiled:
            backend, options = self._options["backend"], {k: self._options[k] for k in ("checkpoint", "compile")}
            compiled = compile_model(self.unwrapped, backend=backend, epilogue=epilogue, sharding=sharding)
            self._compiled[key] = compiled, Runner(compiled.graph, self.unwrapped, **options)
        return self._compiled[key]

    def forward(self, batch: PackedBatch | Tensor | None = None, **padded: Any) -> Any:
        """Log-probabilities, or rewards, of a pack's responses; or of an ordinary padded batch what the model returns.

        ``packed(batch)`` takes a :class:`PackedBatch` and returns a :class:`PackedOutput`, or :class:`PackedRewards` if
        the model returns one value per sequence. ``packed(input_ids=..., attention_mask=...)`` finds the common
        beginnings of the rows, computes each once, and returns what the model returns: the output object with padded
        ``.logits``, and a loss where ``labels`` are given. :attr:`savings` counts what that saved.

        Raises:
            TypeError, ValueError: not a batch of this model: wrong type, device, token ids, positions, or options.
        """
        if isinstance(batch, PackedBatch):
            if padded:
                raise TypeError(f"a pack holds all that the model needs, and {', '.join(padded)} came with it")
            return self._forward_pack(batch)
        if batch is not None:
            if not isinstance(batch, Tensor):
                raise TypeError(_not_a_batch(batch))
            padded = {"input_ids": batch, **padded}
        return self._forward_padded(**padded)

    def _forward_pack(self, batch: PackedBatch) -> PackedOutput | PackedRewards:
        sharding = Sharding(self.unwrapped, self)
        compiled, run = self._ready(sharding)
        _check_batch(batch.device, batch.max_token_id, batch.max_position, compiled)
        layout = {name: getattr(batch, name) for name in LAYOUT_INPUTS}
        if compiled.graph.pooling is not None:
            slots = pooled_slots(batch, compiled.graph.pooling)
            values = run(_with_rows(layout | {"predecessors": slots}, compiled), sharding)
            return PackedRewards(_as_rewards(values), batch.lengths)
        token_logps = run(_with_rows(layout, compiled), sharding).index_select(0, batch.scored_index)
        sums = token_logps.new_zeros(batch.lengths.numel()).index_add(0, batch.response_index, token_logps)
        return PackedOutput(sums, token_logps, batch.lengths)

    def _forward_padded(
        self,
        input_ids: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **options: Any,
    ) -> Any:
        rows = PaddedRows.of(input_ids, attention_mask, position_ids)
        if labels is not None:
            rows.check_labels(labels)
        sharding = Sharding(self.unwrapped, self)
        compiled, run = self._ready(sharding, "logits")
        _check_batch(input_ids.device, int(rows.forest.tokens.max()), int(rows.forest.positions.max()), compiled)
        self._count(rows)
        if compiled.graph.pooling is not None:
            slots = rows.pooled(compiled.graph.pooling.padding)
            logits = run(_with_rows(rows.layout | {"predecessors": slots}, compiled), sharding)
        else:
            logits = rows.spread(run(_with_rows(rows.layout, compiled), sharding), logits_to_keep)
        return usual_output(self.unwrapped, logits, labels, options)

    def _count(self, rows: PaddedRows) -> None:
        self.savings.add(rows)
        if self.savings.batches == 1 and rows.forest.num_slots == rows.forest.lengths.sum():
            _log.warning("the rows of the first padded batch share no beginning: packing saves its padding only")

    def _fingerprint(self, sharding: Sharding) -> Hashable:
        """All that a captured graph depends on besides the parameters' values, as far as it can be seen from outside.

        Buffers by content too: masks and tables in them were read when the graph was made.
        """
        model = self.unwrapped
        modules = tuple(
            (id(m), m.training, _adapters(m), *user_hooks(m), len(m._backward_hooks)) for m in model.modules()
        )
        parameters = tuple((name, sharding.dtype(name, p), sharding.device(p)) for name, p in model.named_parameters())
        buffers = tuple(
            (name, b.dtype, b.device, self._buffers_seen.number(name, b)) for name, b in model.named_buffers()
        )
        attributes = (item for item in python_state(model).items() if not item[0].endswith(MARKS))
        settings = (repr(vars(getattr(model, "config", None) or _NO_CONFIG)), *attributes)
        return modules, parameters, buffers, settings, sharding.casts


class _Contents:
    """Numbers what stands in tensors, so that a change is noticed and writing the same values again is none.

    ``DistributedDataParallel`` copies the first rank's buffers over everybody's, at each forward.
    """

    def __init__(self) -> None:
        self._latest: dict[str, tuple[Hashable, Tensor, int]] = {}
        self._count = itertools.count()

    def number(self, name: str, tensor: Tensor) -> int:
        """Another one than last time if the tensor of this name holds something else."""
        place = (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        if name in self._latest:
            seen, content, number = self._latest[name]
            if seen == place:
                return number
            if content.device == tensor.device and _equal(content, tensor):
                self._latest[name] = place, content, number
                return number
        self._latest[name] = place, tensor.detach().clone(), next(self._count)
        return self._latest[name][-1]


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, shape and dtype included; nothing is known of tensors without data."""
    if a.device.type == "meta" or (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    as_bytes = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (a, b))
    return torch.equal(*as_bytes)


_NO_CONFIG = SimpleNamespace()


def _rebuilt(model: nn.Module, options: dict[str, Any]) -> PackedModel:
    return PackedModel(model, **options)


def _check_options(model: nn.Module, compile: bool | str, checkpoint: str | None) -> None:  # noqa: A002
    for name, value, accepted in (("compile", compile, COMPILE), ("checkpoint", checkpoint, CHECKPOINT)):
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in accepted):
            raise ValueError(f"unknown {name}={value!r}; accepted: {', '.join(map(repr, accepted))}")
    around = type(model).__name__
    if around in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel"):
        raise TypeError(f"ppcompile.wrap got a {around}; the model is wrapped first: {around}(ppcompile.wrap(model))")


def _adapters(module: nn.Module) -> Hashable:
    """Which peft adapters a layer applies: switching them off gives another graph."""
    active = getattr(module, "active_adapters", None)
    names = tuple(active) if isinstance(active, (list, tuple)) else None  # a method on transformers models
    return getattr(module, "disable_adapters", None) is True, names


def _not_a_batch(batch: Any) -> str:
    return (
        f"a packed model takes a PackedBatch or a padded batch, got {type(batch).__name__}. Make a pack of prompts and "
        "responses: packed(ppcompile.pack([ppcompile.Group(prompt=ids, responses=[ids, ids])])), "
        "or pass padded rows: packed(input_ids=..., attention_mask=...)"
    )


def _with_rows(layout: dict[str, Tensor], compiled: Compiled) -> dict[str, Tensor]:
    """The layout, with rows of whole sequences where a module runs on such."""
    if not compiled.graph.unshared:
        return layout
    rows = unpacked_rows(layout["segments"], layout["position_ids"])
    return layout | dict(zip(ROW_INPUTS, rows, strict=True))


def _as_rewards(values: Tensor) -> Tensor:
    """float32 ``[R]`` of a model with one output, else ``[R, K]``."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide[:, 0] if wide.dim() == 2 and wide.shape[1] == 1 else wide


def _check_batch(device_of_batch: torch.device, max_token_id: int, max_position: int, compiled: Compiled) -> None:
    graph = compiled.graph
    device = graph.layout("input_ids").meta["val"].device
    if device_of_batch != device:
        raise ValueError(
            f"the batch is on {device_of_batch} and the model on {device}; use packed(batch.to({str(device)!r}))"
        )
    if graph.vocab_size is not None and max_token_id >= graph.vocab_size:
        raise ValueError(f"token id {max_token_id} is outside the model's vocabulary of {graph.vocab_size}")
    if graph.max_positions is not None and max_position >= graph.max_positions:
        raise ValueError(
            f"a sequence of {max_position + 1} tokens is longer than the model's {graph.max_positions} positions "
            f"({graph.limited_by}); shorten it"
        )
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "packed under torch.autocast: the graph keeps the model's own dtypes, so regions where the model switches "
            "autocast off would be lost; use model.to(torch.bfloat16), or run outside autocast"
        )
