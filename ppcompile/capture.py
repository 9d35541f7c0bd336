"""Capture a model as a graph: exactly what ``model(input_ids)`` computes on one unpadded sequence.

The model is called with ``input_ids`` alone. Positions, masks and tables are then whatever the model makes
for itself, which is what the eager unpacked model uses, and no special handling of ``position_ids`` inside the
model can be triggered (some models cut the row where positions do not grow by one). The layout tensors are
inputs of the captured graph that nothing reads yet; the passes connect them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from .capture_checks import branches_on_length, longest_rows, nothing_escapes
from .early_refusals import RefuseEarly
from .module_state import keeps_nothing
from .module_trail import ModuleTrail
from .passes.base import NotPackable, PackGraph, Refusal
from .unsharing import Watched, standing_in

__all__ = ["capture", "logits_of"]

_EXAMPLE_LENGTH = 37  # prime, so that no other size of a model equals it by chance
_PREFIX = "model."


def logits_of(output: Any) -> Tensor:
    """The logits in whatever a model returns: a tensor, an object or dict with ``logits``, or a tuple.

    Raises:
        TypeError: nothing in the output looks like logits.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise TypeError(f"the model returned {type(output).__name__}; accepted: a tensor, .logits, or a tuple of them")


def call_model(model: nn.Module, input_ids: Tensor) -> Tensor:
    """``[1, L]`` token ids -> logits ``[1, L, V]``, the eager unpacked model as its user would call it."""
    accepts_cache = "use_cache" in inspect.signature(model.forward).parameters
    with _without_cache(model):
        return logits_of(model(input_ids, **({"use_cache": False} if accepts_cache else {})))


@contextlib.contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Wrappers such as peft's pass keywords on without naming them: there the configuration switches the cache off."""
    # A model of several parts has a configuration for each.
    config = getattr(model, "config", None)
    parts: list[Any] = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    switched = [part for part in parts if getattr(part, "use_cache", False)]
    for part in switched:
        part.use_cache = False
    try:
        yield
    finally:
        for part in switched:
            part.use_cache = True


class _Captured(nn.Module):
    """The model, with one more input for each size of the layout that is not the row's length."""

    def __init__(self, model: nn.Module, trail: ModuleTrail) -> None:
        super().__init__()
        self.model = model
        self.__dict__["trail"] = trail

    def forward(self, input_ids: Tensor, segments: Tensor, targets: Tensor, rows: Tensor | None = None) -> Tensor:
        trail: ModuleTrail = self.__dict__["trail"]
        trail.watch(input_ids)
        with keeps_nothing(self.model), RefuseEarly(input_ids, lambda: trail.innermost):
            return call_model(self.model, input_ids)


def capture(model: nn.Module, watched: Mapping[str, Watched] | None = None) -> PackGraph:
    """Export ``model`` in its present mode (train or eval) and lift its state to inputs.

    Args:
        model: maps ``[1, L]`` token ids to logits; any device, ``meta`` included.
        watched: modules that stay as they are (``ppcompile.unsharing``); markers stand for them in the graph.

    Returns:
        The graph before any pass. Its inputs are the model's state, then ``LAYOUT_INPUTS``, and ``ROW_INPUTS`` where a
        module stays as it is.

    Raises:
        NotPackable: ``torch.export`` cannot capture the model, or capturing it changes its state.
    """
    watched, trail = watched or {}, ModuleTrail(model)
    exported = _export(model, watched, trail)
    _refuse_state_changes(exported)
    graph = _lift(exported, model, trail)
    graph.unshared = {call.name: call for module in watched.values() for call, _, _ in module.calls}
    return graph


def _export(model: nn.Module, watched: Mapping[str, Watched], trail: ModuleTrail) -> ExportedProgram:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = (
        torch.zeros(1, _EXAMPLE_LENGTH, dtype=torch.int64, device=device),
        torch.zeros(5, 4, dtype=torch.int64),
        torch.zeros(11, dtype=torch.int64, device=device),
    )
    # Dim.DYNAMIC, not a named Dim: a model with tables of N positions bounds T, which a named one calls an error.
    dynamic: tuple[dict[int, Any], ...] = ({1: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    if watched:
        example = (*example, torch.zeros(3, 29, dtype=torch.int64, device=device))  # type: ignore[assignment]
        dynamic = (*dynamic, {0: Dim.DYNAMIC, 1: Dim.DYNAMIC})
    try:
        with (
            _quiet(),
            # It remembers shapes op by op, checks each memory, and costs a fifth more time than it saves.
            torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
            _plain_attention(model),
            _as_in_training(),
            nothing_escapes(model),
            standing_in(model, watched),
            trail.following(),
        ):
            return torch.export.export(_Captured(model, trail), example, dynamic_shapes=dynamic, strict=False)
    except NotPackable as refused:
        raise _located(refused, trail) from refused.__cause__
    # torch.export has no common base class for what it raises; whatever it is, the model cannot be captured,
    # and the cause stays attached.
    except Exception as error:
        raise _located(NotPackable(_export_refusal(error)), trail) from error


def _located(refused: NotPackable, trail: ModuleTrail) -> NotPackable:
    """The refusal, with the module that the model's code was in."""
    if refused.refusal.module:
        return refused
    return NotPackable(dataclasses.replace(refused.refusal, module=trail.culprit))


@contextlib.contextmanager
def _as_in_training() -> Iterator[None]:
    """Gradients on, so that the model's own ``no_grad`` regions leave a trace wherever ``wrap`` is called."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _export_refusal(error: Exception) -> Refusal:
    text = str(error).strip().splitlines()
    first = text[0] if text else type(error).__name__
    hint = "see the chained error; data-dependent control flow and per-forward state cannot be captured"
    return Refusal(f"torch.export could not capture the model: {first}", op="torch.export", hint=hint)


def _refuse_state_changes(exported: ExportedProgram) -> None:
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            target = (spec.target or "").removeprefix(_PREFIX)
            module, _, name = target.rpartition(".")
            reason = f"the forward pass changes {name!r}, state that would carry over from one pack to the next"
            raise NotPackable(
                Refusal(reason, module, op=spec.kind.name.lower(), hint="switch the state off, or .eval()")
            )


def _lift(exported: ExportedProgram, model: nn.Module, trail: ModuleTrail) -> PackGraph:
    state: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    values: dict[str, Tensor] = {}
    parameters: set[str] = set()
    for spec in exported.graph_signature.input_specs:
        name = spec.arg.name
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            state[name] = (spec.target or "").removeprefix(_PREFIX)
            if spec.kind is InputKind.PARAMETER:
                values[name] = model.get_parameter(state[name])
                parameters.add(name)
            else:
                values[name] = model.get_buffer(state[name])
        elif spec.kind is InputKind.CONSTANT_TENSOR:
            constants[name] = values[name] = exported.constants[spec.target]
    graph_module = exported.graph_module
    _rename_modules(graph_module)
    inputs = {node.name: node for node in graph_module.graph.nodes if node.op == "placeholder"}
    _add_layout_inputs(graph_module.graph, inputs)
    length = inputs["input_ids"].meta["val"].shape[1].node.expr
    scored = inputs["targets"].meta["val"].shape[0].node.expr
    graph = PackGraph(graph_module, length, scored, state, constants, values, frozenset(parameters))
    for rows, condition in longest_rows(exported, length):
        graph.limit_positions(rows, f"its code, which goes another way unless {condition}")
    longest = exported.range_constraints[length].upper
    if longest.is_Integer:
        graph.limit_positions(int(longest))
    graph.branches = branches_on_length(exported, length, trail.guards)
    return graph


def _add_layout_inputs(graph: fx.Graph, inputs: dict[str, fx.Node]) -> None:
    """Add the layout's inputs that the model was not captured with, of the sizes of those that it was."""
    ids, targets = inputs["input_ids"].meta["val"], inputs["targets"].meta["val"]
    with ids.fake_mode:
        missing = {
            "position_ids": torch.empty_like(ids),
            "subtree_end": ids.new_empty(ids.shape[1]),
            "predecessors": torch.empty_like(targets),
        }
        if "rows" in inputs:
            missing["copies"] = ids.new_empty(ids.shape[1])
    for name, value in missing.items():
        with graph.inserting_after(inputs["targets"]):
            node = graph.create_node("placeholder", name, name=name)
        node.meta["val"] = value


def _rename_modules(graph_module: torch.fx.GraphModule) -> None:
    """Module paths as the user knows them: without the capturing module at the root."""
    renamed: set[int] = set()  # nodes of nested graphs may share their metadata with a node outside
    for owner in graph_module.modules():
        if not isinstance(owner, torch.fx.GraphModule):
            continue
        for node in owner.graph.nodes:
            stack = node.meta.get("nn_module_stack")
            if stack and id(node.meta) not in renamed:
                renamed.add(id(node.meta))
                inner = {k: (path.removeprefix("model").lstrip("."), kind) for k, (path, kind) in stack.items() if path}
                node.meta["nn_module_stack"] = inner


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export warns about internals that the passes check themselves, and prints the whole graph where it gives up."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


_EAGER_KERNELS = {"flash_attention_2": "eager", "flash_attention_3": "eager", "flex_attention": "eager"}


@contextlib.contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Capture a transformers model that is set to an opaque attention kernel through its eager spelling."""
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    replacement = _EAGER_KERNELS.get(before or "")
    if config is None or replacement is None:
        yield
        return
    config._attn_implementation = replacement
    try:
        yield
    finally:
        config._attn_implementation = before
