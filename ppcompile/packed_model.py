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
from .passes.base import LAYOUT_INPUTS, ROW_INPUTS
from .pipeline import Compiled, compile_model
from .runtime.batch import PackedBatch
from .runtime.rows import unpacked_rows
from .sharding import MARKS, Sharding, user_hooks

__all__ = ["PackedModel", "PackedOutput", "wrap"]

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


torch.export.register_dataclass(PackedOutput, serialized_type_name="ppcompile.PackedOutput")  # hooks look into it


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
        self._options = {"backend": backend, "compile": compile, "checkpoint": checkpoint}
        self._compiled: dict[Hashable, tuple[Compiled, Runner]] = {}
        self._buffers_seen = _Contents()

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

    def _ready(self, sharding: Sharding) -> tuple[Compiled, Runner]:
        key = self._fingerprint(sharding)
        if key not in self._compiled:
            backend, options = self._options["backend"], {k: self._options[k] for k in ("checkpoint", "compile")}
            compiled = compile_model(self.unwrapped, backend=backend, sharding=sharding)
            self._compiled[key] = compiled, Runner(compiled.graph, self.unwrapped, **options)
        return self._compiled[key]

    def forward(self, batch: PackedBatch | None = None, **padded: Any) -> PackedOutput:
        """Log-probabilities of the batch's responses.

        Raises:
            TypeError, ValueError: not a batch of this model: padded rows, wrong type, device, token ids, or positions.
        """
        if padded or not isinstance(batch, PackedBatch):
            raise TypeError(_not_a_pack(batch, padded))
        sharding = Sharding(self.unwrapped, self)
        compiled, run = self._ready(sharding)
        _check_batch(batch, compiled)
        layout = {name: getattr(batch, name) for name in LAYOUT_INPUTS}
        if compiled.graph.unshared:
            layout |= zip(ROW_INPUTS, unpacked_rows(batch.segments, batch.position_ids), strict=True)
        token_logps = run(layout, sharding).index_select(0, batch.scored_index)
        sums = token_logps.new_zeros(batch.lengths.numel()).index_add(0, batch.response_index, token_logps)
        return PackedOutput(sums, token_logps, batch.lengths)

    def _fingerprint(self, sharding: Sharding) -> Hashable:
        """All that a captured graph depends on besides the parameters' values, as far as it can be seen from outside.

        Buffers by content too: masks and tables in them were read when the graph was made.
        """
        model = self.unwrapped
        modules = tuple(
            (id(m), m.training, _adapters(m), *user_hooks(m), len(m._backward_hooks)) for m in model.modules()
        )
        parameters = tuple((name, sharding.dtype(name, p), p.device) for name, p in model.named_parameters())
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


def _not_a_pack(batch: Any, padded: dict[str, Any]) -> str:
    what = type(batch).__name__ if batch is not None else "no batch"
    if padded:
        what = f"the keywords {', '.join(padded)}"
        mask = padded.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all():
            side = "left" if not mask[:, 0].all() else "right"
            what += f" (rows of {mask.shape[1]} padded on the {side})"
    return (
        f"a packed model takes a PackedBatch, got {what}. Strip the padding and make a pack of prompts and responses: "
        "packed(ppcompile.pack([ppcompile.Group(prompt=ids, responses=[ids, ids])]))"
    )


def _check_batch(batch: PackedBatch, compiled: Compiled) -> None:
    graph = compiled.graph
    device = graph.layout("input_ids").meta["val"].device
    if batch.device != device:
        raise ValueError(
            f"the batch is on {batch.device} and the model on {device}; use packed(batch.to({str(device)!r}))"
        )
    if graph.vocab_size is not None and batch.max_token_id >= graph.vocab_size:
        raise ValueError(f"token id {batch.max_token_id} is outside the model's vocabulary of {graph.vocab_size}")
    if graph.max_positions is not None and batch.max_position >= graph.max_positions:
        longest = batch.max_position + 1
        raise ValueError(
            f"a sequence of {longest} tokens is longer than the model's {graph.max_positions} positions; shorten it"
        )
    if torch.is_autocast_enabled(device.type):
        raise ValueError(
            "packed under torch.autocast: the graph keeps the model's own dtypes, so regions where the model switches "
            "autocast off would be lost; use model.to(torch.bfloat16), or run outside autocast"
        )
