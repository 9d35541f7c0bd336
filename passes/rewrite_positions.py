"""rewrite positions: what the model computes from the index of a token now reads its logical position.

before    arange(T) ── rotary, ...     table[:T]                            cumsum(ids != pad)
after     position_ids ── ...          index_select(table, position_ids)    prefix_sum(ids != pad)

A node that no token reaches, whose typing rule says that it depends on the slot's index, is replaced by its value as
a function of position: constant, affine, or a row of a table. Running sums of whole numbers over tokens, as models
that skip padding count their positions, run along each sequence. What has no such form stays, and the token-mixing
check refuses it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..runtime import ops
from .base import (
    PackGraph,
    PassResult,
    argument,
    axis_argument,
    is_op,
    is_tensor,
    op_family,
    op_name,
    operands,
    shape_of,
)
from .coordinates import Opaque, only_coordinate
from .expressions import Const, Expr, linear_form
from .infer import infer, input_types
from .pull_back import PullBack
from .rules_math import FILLS
from .types import Mixes, Tok, TokenType

__all__ = ["rewrite_positions"]

aten = torch.ops.aten


def rewrite_positions(graph: PackGraph) -> PassResult:
    """Replace what depends on the slot's index, where it is a known function of position."""
    result = PassResult("rewrite_positions")
    reader = PullBack(graph)
    types: dict[fx.Node, TokenType | Mixes] = dict(input_types(graph))
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node in types:
            continue
        types[node] = kind = _infer(graph, node, types)
        if isinstance(kind, Mixes):
            of_tokens = reader.positional.depends_on_tokens(node)
            replacement = _along_sequences(graph, node, types) if of_tokens else _at_positions(graph, node, reader)
            if replacement is not None:
                result.matched.append(f"{op_name(node)} -> {replacement.name}")
                result.changed += 1
                node.replace_all_uses_with(replacement)
                types[replacement] = Tok(graph.token_axes(node)[0])
        _limit_by_table(graph, node, reader)
    graph.finish()
    return result


def _infer(graph: PackGraph, node: fx.Node, types: dict[fx.Node, Any]) -> TokenType | Mixes:
    mixing = [types[source] for source in node.all_input_nodes if isinstance(types.get(source), Mixes)]
    if mixing and op_family(node) not in FILLS:  # which read no value, only a shape
        return mixing[0]
    return infer(graph, node, types)


def _at_positions(graph: PackGraph, node: fx.Node, reader: PullBack) -> fx.Node | None:
    """The value of a position-only ``node``, computed from ``position_ids``; None if it has no such form."""
    axes = graph.token_axes(node)
    if len(axes) != 1 or not is_tensor(node):
        return None
    if is_op(node, "aten.slice") and not graph.mentions_length(shape_of(operands(node)[0])[axes[0]]):
        return _rows_of_table(graph, node, axes[0])
    if any(size != 1 for axis, size in enumerate(shape_of(node)) if axis != axes[0]):
        return None
    try:
        return _affine(graph, node, reader.read(node, only_coordinate(node, axes[0])))
    except Opaque:
        return None


def _along_sequences(graph: PackGraph, node: fx.Node, types: dict[fx.Node, Any]) -> fx.Node | None:
    """A running sum of whole numbers over the tokens, along each sequence; None for anything else."""
    if not is_op(node, "aten.cumsum") or node.meta["val"].dtype != torch.int64:
        return None
    source = operands(node)[0]
    axis = axis_argument(node, len(shape_of(node)))
    if types[source] != Tok(axis) or source.meta["val"].dtype.is_floating_point:
        return None
    with graph.graph.inserting_after(node):
        whole = graph.call(aten.to.dtype, (source, torch.int64), like=node)
    with graph.graph.inserting_after(whole):
        return graph.call(ops.prefix_sum._opoverload, (whole, graph.layout("subtree_end"), axis), like=node)


def _affine(graph: PackGraph, node: fx.Node, value: Expr) -> fx.Node | None:
    form = linear_form(value) if not isinstance(value, Const) else {"": value.value}
    if form is None or set(form) - {"q", ""}:
        return None
    slope, start, dtype = form.get("q", 0), form.get("", 0), node.meta["val"].dtype
    if slope != int(slope) or start != int(start):
        return None
    steps: list[tuple[Any, ...]] = [(aten.reshape.default, graph.view_sizes(node))]
    if slope != 1:
        steps.append((aten.mul.Scalar, int(slope)))
    if start != 0:
        steps.append((aten.add.Scalar, int(start)))
    if dtype != torch.int64:
        steps.append((aten.to.dtype, dtype))
    return _chain(graph, graph.layout("position_ids"), steps, node)


def _chain(graph: PackGraph, source: fx.Node, steps: list[tuple[Any, ...]], like: fx.Node) -> fx.Node:
    """Apply ``op(previous, with_)`` one after the other, in order, after ``like``."""
    previous, place = source, like
    for op, with_ in steps:
        with graph.graph.inserting_after(place):
            previous = place = graph.call(op, (previous, with_), like=like)
    return previous


def _rows_of_table(graph: PackGraph, node: fx.Node, axis: int) -> fx.Node | None:
    """``table[start:T] -> index_select(table, position_ids + start)``."""
    table, start, step = operands(node)[0], argument(node, "start") or 0, argument(node, "step")
    if not isinstance(start, int) or start < 0 or step != 1 or axis_argument(node, len(shape_of(node))) != axis:
        return None
    graph.limit_positions(int(shape_of(table)[axis]) - start)
    flat: list[tuple[Any, ...]] = [(aten.reshape.default, [-1])]
    rows = _chain(graph, graph.layout("position_ids"), flat + ([(aten.add.Scalar, start)] if start else []), node)
    with graph.graph.inserting_after(rows):
        return graph.call(aten.index_select.default, (table, axis, rows), like=node)


def _limit_by_table(graph: PackGraph, node: fx.Node, reader: PullBack) -> None:
    """Tables end somewhere: remember where, so that a batch beyond it gets a clear error."""
    for size, index in _lookups(node):
        if index is graph.layout("input_ids") and is_op(node, "aten.embedding"):
            graph.vocab_size = int(size)
        axes = graph.token_axes(index)
        if reader.positional.depends_on_tokens(index) or len(axes) != 1 or graph.mentions_length(size):
            continue
        form = _form(reader, index, axes[0])
        if form is not None and form.get("q") == 1 and not set(form) - {"q", ""}:
            graph.limit_positions(int(size) - int(form.get("", 0)))


def _lookups(node: fx.Node) -> list[tuple[Any, fx.Node]]:
    """What ``node`` looks up: the size of the axis that is looked along, and the node that says where."""
    if is_op(node, "aten.embedding"):
        return [(shape_of(argument(node, "weight"))[0], argument(node, "indices"))]
    if is_op(node, "aten.gather", "aten.index_select"):
        source = shape_of(argument(node, "self"))
        return [(source[axis_argument(node, len(source))], argument(node, "index"))]
    if is_op(node, "aten.index"):
        source = shape_of(argument(node, "self"))
        return [(source[axis], index) for axis, index in enumerate(argument(node, "indices")) if index is not None]
    return []


def _form(reader: PullBack, index: fx.Node, axis: int) -> dict[str, float] | None:
    try:
        return linear_form(reader.read(index, only_coordinate(index, axis)))
    except Opaque:
        return None
