"""canonicalize: one flat, functional graph without ceremony.

Inlines the regions that ``torch.export`` makes of ``no_grad`` and ``autocast`` blocks, makes in-place ops functional
(``passes.functionalize``), and drops assertions and ops that do nothing. Changes no number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .base import (
    NotPackable,
    PackGraph,
    PassResult,
    Refusal,
    argument,
    is_op,
    is_tensor,
    op_family,
    op_name,
    operands,
    same_shape,
    shape_of,
)
from .einsum import write_out_einsums
from .functionalize import functionalize

__all__ = ["canonicalize"]

_ASSERTIONS = ("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar", "aten.sym_constrain_range")


def canonicalize(graph: PackGraph) -> PassResult:
    """Flatten the graph.

    Raises:
        NotPackable: a region whose meaning a flat graph cannot keep.
    """
    result = PassResult("canonicalize")
    _inline_regions(graph, result)
    for node in list(graph.graph.nodes):
        if _is_assertion(node):
            graph.graph.erase_node(node)
            result.changed += 1
    _drop_detached_constants(graph, result)
    result.changed += functionalize(graph)
    result.changed += write_out_einsums(graph)
    result.changed += _write_by_element(graph)
    for node in graph.graph.nodes:
        if is_op(
            node, "aten.view.default"
        ):  # a view holds for the strides of the model's own kernels, a reshape for all
            node.target = torch.ops.aten.reshape.default
            result.changed += 1
    for node in list(graph.graph.nodes):
        source = _does_nothing(node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            result.changed += 1
    graph.finish()
    return result


def _drop_detached_constants(graph: PackGraph, result: PassResult) -> None:
    """``torch.tensor(0.0)`` in a model's code is exported, by older torch, as a constant that is detached in place."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and is_op(node, "aten.detach_"):
            source = operands(node)[0]
            if source.name in graph.constants or is_op(source, "aten.lift_fresh_copy"):
                node.replace_all_uses_with(source)
                graph.graph.erase_node(node)
                result.changed += 1


def _is_assertion(node: fx.Node) -> bool:
    if node.op == "call_module":
        return str(node.target) == "_guards_fn" and not node.users
    return node.op == "call_function" and is_op(node, *_ASSERTIONS)


# --------------------------------------------------------------------------- regions


def _inline_regions(graph: PackGraph, result: PassResult) -> None:
    """Inline until none is left; a region may hold regions."""
    while True:
        regions = [n for n in graph.graph.nodes if n.op == "call_function" and _is_region(n)]
        if not regions:
            return
        for region in regions:
            result.matched.append(f"{op_name(region)} in {region.meta.get('stack_trace', '').strip()[-60:] or 'graph'}")
            _inline(graph, region)
            result.changed += 1


def _is_region(node: fx.Node) -> bool:
    return op_name(node) in ("wrap_with_set_grad_enabled", "wrap_with_autocast")


def _inline(graph: PackGraph, region: fx.Node) -> None:
    _refuse_forced_autocast(region)
    given = operands(region)
    body_at = next(n for n, arg in enumerate(given) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    body_node = given[body_at]
    body = getattr(graph.module, str(body_node.target))
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    env = dict(zip(placeholders, given[body_at + 1 :], strict=True))
    with graph.graph.inserting_before(region):
        outputs = _copy_body(graph, body, env, _without_grad(region))
    for user in list(region.users):
        _, place = operands(user)
        user.replace_all_uses_with(outputs[place])
        graph.graph.erase_node(user)
    graph.graph.erase_node(region)
    if not body_node.users:
        graph.graph.erase_node(body_node)


def _refuse_forced_autocast(region: fx.Node) -> None:
    if op_name(region) != "wrap_with_autocast":
        return
    _, _, enabled, *_ = operands(region)
    if enabled is not False:
        reason = "a forced autocast region: its casts would be lost in the packed graph"
        raise NotPackable(Refusal.at(region, reason, "run the whole model under one precision"))


def _without_grad(region: fx.Node) -> bool:
    return op_name(region) == "wrap_with_set_grad_enabled" and operands(region)[0] is False


def _copy_body(graph: PackGraph, body: fx.GraphModule, env: dict[Any, Any], without_grad: bool) -> list[Any]:
    """Copy a region's nodes to the insertion point; what it returns, detached if it runs without gradients."""
    for node in body.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            _adopt_submodule(graph, body, node)
        if without_grad and _is_region(node) and not _without_grad(node) and "grad" in op_name(node):
            raise NotPackable(Refusal.at(node, "gradients are switched on inside a region that switches them off"))
        env[node] = graph.graph.node_copy(node, lambda n: env[n])
    returned: Any = next(node for node in reversed(body.graph.nodes) if node.op == "output").args[0]
    values = returned if isinstance(returned, (tuple, list)) else (returned,)
    # What only passes through a region is not computed in it, and keeps its gradient.
    return [_detached(graph, env[v]) if without_grad and v.op != "placeholder" else env[v] for v in values]


def _adopt_submodule(graph: PackGraph, body: fx.GraphModule, node: fx.Node) -> None:
    """Give a nested region's body a name of its own in the outer graph."""
    name = f"{node.target}_of_{id(body)}"
    graph.module.add_submodule(name, getattr(body, str(node.target)))
    node.target = name


def _detached(graph: PackGraph, value: Any) -> Any:
    """What a no_grad region returns carries no gradient; a detach says the same in a flat graph."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        return value
    return graph.call(torch.ops.aten.detach.default, (value,), like=value)


# --------------------------------------------------------------------------- writes under a mask


def _write_by_element(graph: PackGraph) -> int:
    """``x[mask] = number`` picks no places if the mask has the shape of ``x``: it is ``where(mask, number, x)``."""
    changed = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not is_op(node, "aten.index_put"):
            continue
        source, indices, value, accumulate = operands(node)[:4]
        if accumulate or len(indices) != 1 or indices[0] is None or shape_of(value):
            continue
        mask = indices[0]
        if mask.meta["val"].dtype != torch.bool or not same_shape(mask, source):
            continue
        with graph.graph.inserting_before(node):
            number = graph.call(torch.ops.aten.to.dtype, (value, source.meta["val"].dtype), like=node)
            chosen = graph.call(torch.ops.aten.where.self, (mask, number, source), like=node)
        node.replace_all_uses_with(chosen)
        graph.graph.erase_node(node)
        changed += 1
    return changed


# --------------------------------------------------------------------------- ops that do nothing


def _same_kind(node: fx.Node, source: fx.Node) -> bool:
    value, before = node.meta["val"], source.meta["val"]
    return bool(value.dtype == before.dtype and value.device == before.device)


def _same_tensor(node: fx.Node, source: fx.Node) -> bool:
    return same_shape(node, source) and _same_kind(node, source)


def _whole_slice(node: fx.Node, source: fx.Node) -> bool:
    return same_shape(node, source) and argument(node, "start") in (0, None) and argument(node, "step") == 1


def _no_dropout(node: fx.Node, source: fx.Node) -> bool:
    return argument(node, "p") == 0.0 or argument(node, "train") is False


def _adds_zero(node: fx.Node, source: fx.Node) -> bool:
    other = argument(node, "other")
    return type(other) is int and other == 0 and _same_kind(node, source)


_IDENTITIES: dict[str, Callable[[fx.Node, fx.Node], bool]] = {
    "to": _same_kind,
    "type_as": _same_kind,
    "slice": _whole_slice,
    "expand": same_shape,
    "view": _same_tensor,  # view(dtype) reads the same bytes as other numbers
    "reshape": same_shape,
    "alias": lambda node, source: True,
    "lift_fresh_copy": lambda node, source: True,
    "dropout": _no_dropout,
    "feature_dropout": _no_dropout,
    "alpha_dropout": _no_dropout,
    "add": _adds_zero,
}


def _does_nothing(node: fx.Node) -> fx.Node | None:
    """The input that ``node`` returns unchanged, or None."""
    if node.op != "call_function" or not is_tensor(node):
        return None
    identity = _IDENTITIES.get(op_family(node))
    if identity is None:
        return None
    source: Any = operands(node)[0]
    return source if is_tensor(source) and identity(node, source) else None
