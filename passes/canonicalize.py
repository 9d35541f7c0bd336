"""canonicalize: one flat, functional graph without ceremony.

Inlines the regions that ``torch.export`` makes of ``no_grad`` and ``autocast`` blocks, turns in-place ops on
fresh tensors into functional ones, and drops assertions and ops that do nothing. Changes no number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .base import NotPackable, PackGraph, PassResult, Refusal, is_op, op_name, shape_of

__all__ = ["canonicalize"]

_END = 2**63 - 1
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
}
_ASSERTIONS = ("aten._assert_tensor_metadata", "aten._assert_async", "aten._assert_scalar", "aten.sym_constrain_range")


def canonicalize(graph: PackGraph) -> PassResult:
    result = PassResult("canonicalize")
    _inline_regions(graph, result)
    for node in list(graph.graph.nodes):
        if _is_assertion(node):
            graph.graph.erase_node(node)
            result.changed += 1
    _make_functional(graph, result)
    for node in list(graph.graph.nodes):
        source = _does_nothing(graph, node)
        if source is not None:
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
            result.changed += 1
    graph.finish()
    return result


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
    without_grad = op_name(region) == "wrap_with_set_grad_enabled" and region.args[0] is False
    if op_name(region) == "wrap_with_autocast" and region.args[2] is not False:
        reason = "a forced autocast region: its casts would be lost in the packed graph"
        raise NotPackable(Refusal.at(region, reason, "run the whole model under one precision"))
    body_at = next(n for n, arg in enumerate(region.args) if isinstance(arg, fx.Node) and arg.op == "get_attr")
    body_node: Any = region.args[body_at]
    body = getattr(graph.module, str(body_node.target))
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    env = dict(zip(placeholders, region.args[body_at + 1 :], strict=True))
    with graph.graph.inserting_before(region):
        outputs = _copy_body(graph, body, env, without_grad)
    for user in list(region.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.graph.erase_node(user)
    graph.graph.erase_node(region)
    if not body_node.users:
        graph.graph.erase_node(body_node)


def _copy_body(graph: PackGraph, body: fx.GraphModule, env: dict[Any, Any], without_grad: bool) -> list[Any]:
    for node in body.graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            returned = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            outputs = [env[value] for value in returned]
            return [_detached(graph, value) for value in outputs] if without_grad else outputs
        if node.op == "get_attr":
            _adopt_submodule(graph, body, node)
        env[node] = graph.graph.node_copy(node, lambda n: env[n])
    raise AssertionError("an fx graph ends with an output node")


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
        node.target = functional
        result.changed += 1


def _owns_its_input(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """True if nobody can see the tensor that ``node`` overwrites, after it was overwritten."""
    target: Any = node.args[0]
    if target.op == "placeholder" or _may_alias(target):
        return False
    return all(order[user] <= order[node] and not _may_alias(user) for user in target.users if user is not node)


def _may_alias(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return op_name(node) == "getitem"
    # reshape, contiguous and to() return their input or a copy, depending on strides: treat as views.
    maybe = is_op(node, "aten.reshape", "aten.contiguous", "aten.to", "aten.type_as", "aten.flatten", "aten.dropout")
    return maybe or any(ret.alias_info is not None for ret in schema.returns)


# --------------------------------------------------------------------------- ops that do nothing


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    left, right = shape_of(a), shape_of(b)
    return len(left) == len(right) and all(
        (x.node.expr == y.node.expr)
        if isinstance(x, torch.SymInt) and isinstance(y, torch.SymInt)
        else x is y or (isinstance(x, int) and isinstance(y, int) and x == y)
        for x, y in zip(left, right, strict=True)
    )


def _keeps_dtype(node: fx.Node, source: fx.Node) -> bool:
    return bool(node.meta["val"].dtype == source.meta["val"].dtype)


def _same_device(node: fx.Node, source: fx.Node) -> bool:
    return bool(node.meta["val"].device == source.meta["val"].device)


_IDENTITIES: dict[str, Callable[[fx.Node, fx.Node], bool]] = {
    "aten.to": lambda n, s: _keeps_dtype(n, s) and _same_device(n, s),
    "aten.type_as": lambda n, s: _keeps_dtype(n, s) and _same_device(n, s),
    "aten.slice": lambda n, s: _same_shape(n, s) and n.args[2:4] in ((0, _END), (None, None), (0, None), ()),
    "aten.expand": _same_shape,
    "aten.view": _same_shape,
    "aten.reshape": _same_shape,
    "aten.alias": lambda n, s: True,
    "aten.lift_fresh_copy": lambda n, s: True,
    "aten.dropout": lambda n, s: n.args[1] == 0.0 or n.args[2] is False,
    "aten.add": lambda n, s: type(n.args[1]) is int and n.args[1] == 0 and _keeps_dtype(n, s),
}


def _does_nothing(graph: PackGraph, node: fx.Node) -> fx.Node | None:
    """The input that ``node`` returns unchanged, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    rule = _IDENTITIES.get(op_name(node).rpartition(".")[0])
    source = node.args[0]
    if rule is None or not isinstance(node.meta.get("val"), torch.Tensor) or not rule(node, source):
        return None
    return source
