"""``wrap(model)``: the model, trained on packs.

A :class:`PackedModel` is a second face of the user's model, not a copy: it shares the model's own dictionaries of
parameters, buffers and submodules, so that ``state_dict`` names, optimizers and devices are the model's. The packed
graphs take the state as inputs, read afresh at each call.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .capture_checks import python_state
from .passes.base import ROW_INPUTS
from .pipeline import Compiled, compile_model
from .runtime.batch import PackedBatch
from .runtime.rows import unpacked_rows

__all__ = ["PackedModel", "PackedOutput", "wrap"]


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


def wrap(model: nn.Module, *, backend: str = "auto", compile: bool = False) -> PackedModel:  # noqa: A002 - torch's word
    """Make ``model`` take preference-packed batches.

    Args:
        model: maps token ids ``[1, L]`` to logits ``[1, L, V]`` (a tensor, ``.logits``, or the first of a tuple).
            Its parameters stay its own: training the result trains the model.
        backend: attention backend: ``"auto"`` (the best of the device), ``"cascade"``, ``"flex"``, ``"reference"``.
        compile: run the packed graph through ``torch.compile``: one artifact for all lengths, made at the first
            forward. Without it FlexAttention alone is compiled.

    Returns:
        A module that takes ``ppcompile.pack(...)`` and returns a :class:`PackedOutput`.

    Raises:
        NotPackable: the model mixes tokens in a way that packing would change, or that cannot be proved safe;
            names the module, the operator and the source line.
    """
    packed = PackedModel(model, backend=backend, compile=compile)
    packed.compiled()  # refuse now, not at the first step
    return packed


class PackedModel(nn.Module):
    """See :func:`wrap`."""

    def __init__(self, model: nn.Module, *, backend: str = "auto", compile: bool = False) -> None:  # noqa: A002
        super().__init__()
        own = self.__dict__
        own["_model"] = model
        for shared in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            own[shared] = getattr(model, shared)
        own["training"] = model.training
        self._backend, self._compile = backend, compile
        self._compiled: dict[Hashable, Compiled] = {}

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
        return _rebuilt, (self.unwrapped, self._backend, self._compile)

    def extra_repr(self) -> str:
        """Whose second face this is."""
        return f"packed {type(self.unwrapped).__name__}, backend={self._backend}"

    # ------------------------------------------------------------------ graphs

    def compiled(self) -> Compiled:
        """The packed graph for the model's present mode, dtype and device; compiled when first needed."""
        key = _fingerprint(self.unwrapped)
        if key not in self._compiled:
            self._compiled[key] = compile_model(self.unwrapped, backend=self._backend)
            if self._compile:
                self._compiled[key].run = torch.compile(self._compiled[key].run, dynamic=True, fullgraph=True)
        return self._compiled[key]

    def forward(self, batch: PackedBatch | None = None, **padded: Any) -> PackedOutput:
        """Log-probabilities of the batch's responses.

        Raises:
            TypeError, ValueError: not a batch of this model: padded rows, wrong type, device, token ids, or positions.
        """
        if padded or not isinstance(batch, PackedBatch):
            raise TypeError(_not_a_pack(batch, padded))
        compiled = self.compiled()
        _check_batch(batch, compiled)
        (unique,) = compiled.run(*self._inputs(compiled, batch))
        token_logps = unique.index_select(0, batch.scored_index)
        sums = token_logps.new_zeros(batch.lengths.numel()).index_add(0, batch.response_index, token_logps)
        return PackedOutput(sums, token_logps, batch.lengths)

    def _inputs(self, compiled: Compiled, batch: PackedBatch) -> list[Tensor]:
        """The graph's inputs in order: the model's state as it is now, then the layout."""
        graph, inputs = compiled.graph, []
        rows = unpacked_rows(batch.segments, batch.position_ids) if graph.unshared else ()
        layout = dict(zip(ROW_INPUTS, rows, strict=False))
        for node in graph.graph.find_nodes(op="placeholder"):
            if node.name in graph.state:
                inputs.append(_state(self.unwrapped, graph.state[node.name]))
            elif node.name in graph.constants:
                inputs.append(graph.constants[node.name])
            else:
                inputs.append(layout[node.name] if node.name in layout else getattr(batch, node.name))
        return inputs


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


_NO_CONFIG = SimpleNamespace()


def _rebuilt(model: nn.Module, backend: str, compiled: bool) -> PackedModel:
    return PackedModel(model, backend=backend, compile=compiled)


def _state(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(owner), leaf)
    return tensor


def _fingerprint(model: nn.Module) -> Hashable:
    """All that a captured graph depends on besides the parameters' values, as far as it can be seen from outside.

    Buffers by version too: masks and tables in them were read when the graph was made.
    """
    modules = tuple(
        (id(m), m.training, _adapters(m), *map(len, (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)))
        for m in model.modules()
    )
    parameters = tuple((name, p.dtype, p.device) for name, p in model.named_parameters())
    buffers = tuple((name, b.dtype, b.device, b.data_ptr(), _version(b)) for name, b in model.named_buffers())
    settings = (repr(vars(getattr(model, "config", None) or _NO_CONFIG)), *python_state(model).items())
    return modules, parameters, buffers, settings


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
