"""canonicalize: one flat, functional graph without ceremony.

Inlines the regions that ``torch.export`` makes of ``no_grad`` and ``autocast`` blocks, turns in-place ops on
fresh tensors into functional ones, and drops assertions and ops that do nothing. Changes no number.
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
    may_alias,
    op_family,
    op_name,
    operands,
    shape_of,
)

__all__ = ["canonicalize"]

_FUNCTIONAL = {
    "aten.add_.Tensor": torch.ops.aten.add.Tensor,
    "aten.add_.Scalar": torch.ops.aten.add.Scalar,
    "aten.sub_.Tensor": torch.ops.aten.sub.Tensor,
    "aten.mul_.Tensor": torch.ops.aten.mul.Tensor,
    "aten.mul_.Scalar": torch.ops.aten.mul.Scalar,
    "aten.div_.Tensor": torch.ops.aten.div.Tensor,
    "aten.relu_.default": torch.ops.aten.relu.default,
    "aten.silu_.default": torch.ops.aten.silu.default,
    "aten.sigmoid_.default": torch.ops.aten.sigmoid.default,
    "aten.tanh_.default": torch.ops.aten.tanh.default,
    "aten.neg_.default": torch.ops.aten.neg.default,
    "aten.masked_fill_.Scalar": torch.ops.aten.masked_fill.Scalar,
    "aten.masked_fill_.Tensor": torch.ops.aten.masked_fill.Tensor,
    "aten.triu_.default": torch.ops.aten.triu.default,
    "aten.tril_.default": torch.ops.aten.tril.default,
    "aten.clamp_.default": torch.ops.aten.clamp.default,
    "aten.dropout_.default": torch.ops.aten.dropout.default,
    "aten.scatter_.src": torch.ops.aten.scatter.src,
    "aten.scatter_.value": torch.ops.aten.scatter.value,
    "aten.fill_.Scalar": torch.ops.aten.fill.Scalar,
}
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
    _make_functional(graph, result)
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


# --------------------------------------------------------------------------- in-place ops


def _make_functional(graph: PackGraph, result: PassResult) -> None:
    order = {node: n for n, node in enumerate(graph.graph.nodes)}
    for node in list(graph.graph.nodes):
        functional = _FUNCTIONAL.get(op_name(node)) if node.op == "call_function" else None
        if functional is None or not _owns_its_input(node, order):
            continue  # left in place: the token-mixing check refuses what it cannot follow
        with graph.graph.inserting_before(node):
            unchanged = _same_dtype_out_of_place(graph, node, functional)
        if unchanged:
            node.target = functional
            result.changed += 1


def _owns_its_input(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """True if nobody can see the tensor that ``node`` overwrites, after it was overwritten."""
    target = operands(node)[0]
    if target.op == "placeholder" or may_alias(target):
        return False
    return all(order[user] <= order[node] and not may_alias(user) for user in target.users if user is not node)


def _same_dtype_out_of_place(graph: PackGraph, node: fx.Node, functional: Any) -> bool:
    """In place, ``half.add_(float)`` stays half; out of place it would not."""
    trial = graph.graph.create_node("call_function", functional, node.args, node.kwargs)
    value = graph.evaluate(trial)
    graph.graph.erase_node(trial)
    return bool(value.dtype == node.meta["val"].dtype and value.shape == node.meta["val"].shape)


# --------------------------------------------------------------------------- ops that do nothing


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return [_expression(size) for size in shape_of(a)] == [_expression(size) for size in shape_of(b)]


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _same_kind(node: fx.Node, source: fx.Node) -> bool:
    value, before = node.meta["val"], source.meta["val"]
    return bool(value.dtype == before.dtype and value.device == before.device)


def _same_tensor(node: fx.Node, source: fx.Node) -> bool:
    return _same_shape(node, source) and _same_kind(node, source)


def _whole_slice(node: fx.Node, source: fx.Node) -> bool:
    return _same_shape(node, source) and argument(node, "start") in (0, None) and argument(node, "step") == 1


def _no_dropout(node: fx.Node, source: fx.Node) -> bool:
    return argument(node, "p") == 0.0 or argument(node, "train") is False


def _adds_zero(node: fx.Node, source: fx.Node) -> bool:
    other = argument(node, "other")
    return type(other) is int and other == 0 and _same_kind(node, source)


_IDENTITIES: dict[str, Callable[[fx.Node, fx.Node], bool]] = {
    "to": _same_kind,
    "type_as": _same_kind,
    "slice": _whole_slice,
    "expand": _same_shape,
    "view": _same_tensor,  # view(dtype) reads the same bytes as other numbers
    "reshape": _same_shape,
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
