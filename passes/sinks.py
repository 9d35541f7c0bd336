"""Sinks: one more logit per head, which takes part in the softmax's denominator and has no value.

Written as a column         cat([scores, sinks], -1) ── softmax ── [..., :-1] ── matmul
or as a factor afterwards   scores ── softmax ── matmul ── * sigmoid(logsumexp(scores, -1) - sinks)

which is the same: with z the sum of exponentials, z / (z + exp(sink)) = sigmoid(log z - sink).
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .base import PackGraph, argument, axis_argument, is_op, operands, shape_of
from .coordinates import ZERO, Coordinates, Opaque
from .expressions import Capture, Expr, Op, Var
from .pull_back import PullBack

__all__ = ["logit_per_head", "scaled_by_sinks", "without_casts", "without_column"]

_CASTS = ("aten.to", "aten.type_as", "aten._to_copy")


def without_column(scores: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Scores, and the column of sinks that is concatenated to them, if there is one.

    Raises:
        Opaque: something else is concatenated to the scores.
    """
    if not is_op(scores, "aten.cat"):
        return scores, None
    parts = argument(scores, "tensors")
    rank = len(shape_of(scores))
    if len(parts) != 2 or shape_of(parts[1])[-1] != 1 or axis_argument(scores, rank) != rank - 1:
        raise Opaque(scores, "a concatenation of scores that is not one column of sinks")
    return parts[0], parts[1]


def scaled_by_sinks(
    graph: PackGraph, scores: fx.Node, product: fx.Node, where: Coordinates
) -> tuple[fx.Node, fx.Node] | None:
    """The scaled ``product`` and the sinks, if it is scaled by ``sigmoid(logsumexp(scores) - sinks)``.

    Args:
        graph: the captured graph.
        scores: what the softmax reads, ``[..., T, T]``.
        product: attention weights times values, ``[..., T, E]``.
        where: the coordinates of a score.

    Raises:
        Opaque: it is, by sinks that are not one logit per head.
    """
    if len(product.users) != 1:
        return None
    (scaled,) = product.users
    if not is_op(scaled, "aten.mul"):
        return None
    left, right = operands(scaled)[:2]
    difference = _argument_of_sigmoid(right if left is product else left)
    if not is_op(difference, "aten.sub") or argument(difference, "alpha") != 1:
        return None
    total, sinks = operands(difference)[:2]
    total = _before_casts(total)
    if not is_op(total, "aten.logsumexp") or operands(total)[0] is not scores:
        return None
    rank = len(shape_of(scores))
    if [axis % rank for axis in argument(total, "dim")] != [rank - 1]:
        return None
    at_sinks = (*where[:-1], ZERO) if argument(total, "keepdim") else where[:-1]
    return scaled, logit_per_head(graph, sinks, at_sinks)


def _argument_of_sigmoid(factor: Any) -> Any:
    """``x`` of ``sigmoid(x)``, or of ``sigmoid(x).unsqueeze(-1)`` where ``x`` has lost its last axis."""
    factor = _before_casts(factor)
    if is_op(factor, "aten.unsqueeze") and argument(factor, "dim") in (-1, len(shape_of(factor)) - 1):
        factor = _before_casts(operands(factor)[0])
    return _before_casts(operands(factor)[0]) if is_op(factor, "aten.sigmoid") else None


def _before_casts(node: Any) -> Any:
    while is_op(node, *_CASTS):
        node = operands(node)[0]
    return node


def logit_per_head(graph: PackGraph, sinks: fx.Node, where: Coordinates) -> fx.Node:
    """The tensor ``[H]`` that ``sinks``, broadcast against ``where``, reads at head ``h``.

    Raises:
        Opaque: there is none.
    """
    value = without_casts(PullBack(graph).value(sinks, where))
    if isinstance(value, Op) and value.name == "at" and value.args[1:] == (Var("h"),):
        table = value.args[0]
        if isinstance(table, Capture):
            return table.node
    raise Opaque(sinks, "sinks that are not one logit per head")


def without_casts(expr: Expr) -> Expr:
    """``expr`` before its rounding to a dtype."""
    while isinstance(expr, Op) and expr.name in ("float32", "bfloat16", "float16"):
        expr = expr.args[0]
    return expr
