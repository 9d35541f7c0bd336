"""insert epilogue: the logits become log-probabilities of the scored tokens.

before    hidden [1,T,C] ── head (linear, scale, softcap, ...) ── logits [1,T,V]
after     hidden [1,T,C] ── index_select(predecessors) [U,C] ── token_logps(head program, targets) [U]

The head is everything between the contraction that makes the vocabulary axis and the output. It is carried over as a
program on rows, which the epilogue runs in chunks: no ``[T, V]`` or ``[U, V]`` tensor exists, forward or backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..runtime import ops
from .base import NotPackable, PackGraph, PassResult, Refusal, is_op, op_name, output_node, shape_of

__all__ = ["insert_epilogue"]

aten = torch.ops.aten
_CONTRACTIONS = ("aten.linear", "aten.matmul", "aten.addmm", "aten.mm")
_BINARY = {"add": "add", "sub": "sub", "mul": "mul", "div": "div"}
_UNARY = ("tanh", "sigmoid", "neg", "exp", "relu", "silu", "gelu")
_VIEWS = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "contiguous", "clone", "expand", "alias")
_CASTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


def insert_epilogue(graph: PackGraph) -> PassResult:
    """Replace the logits by ``token_logps``.

    Raises:
        NotPackable: the logits are not a row-wise function of one hidden state per token.
    """
    logits = output_node(graph.graph)
    captures: list[fx.Node] = []
    head, contraction = _head_program(logits, captures)
    hidden = _hidden_of(contraction)
    axis = _token_axis(graph, hidden, logits)
    with graph.graph.inserting_before(next(n for n in reversed(graph.graph.nodes) if n.op == "output")):
        rows = graph.call(aten.index_select.default, (hidden, axis, graph.layout("predecessors")), like=contraction)
        if len(shape_of(rows)) != 2:
            rows = graph.call(aten.reshape.default, (rows, [-1, int(shape_of(hidden)[-1])]), like=contraction)
        scored = graph.call(
            ops.token_logps._opoverload, (rows, graph.layout("targets"), captures, head), like=contraction
        )
        logps = graph.item(scored, 0)
    next(n for n in reversed(graph.graph.nodes) if n.op == "output").args = ((logps,),)
    graph.finish()
    return PassResult("insert_epilogue", [f"head: {head}"], 1)


def _token_axis(graph: PackGraph, hidden: fx.Node, logits: fx.Node) -> int:
    axes = graph.token_axes(hidden)
    if len(axes) != 1 or axes[0] == len(shape_of(hidden)) - 1:
        raise NotPackable(Refusal.at(logits, "the logits are not computed from one hidden state per token"))
    return axes[0]


def _hidden_of(contraction: fx.Node) -> fx.Node:
    return contraction.args[1 if is_op(contraction, "aten.addmm") else 0]  # type: ignore[return-value]


def _head_program(node: fx.Node, captures: list[fx.Node]) -> tuple[str, fx.Node]:
    """Program text of ``node`` in rows ``x``, and the contraction where ``x`` enters."""
    name = op_name(node).removeprefix("aten.").partition(".")[0]
    if is_op(node, *_CONTRACTIONS):
        return _contraction_program(node, captures), node
    if name in _VIEWS or is_op(node, "aten.slice"):
        return _head_program(node.args[0], captures)  # type: ignore[arg-type]
    if name in ("to", "type_as", "_to_copy"):
        inner, contraction = _head_program(node.args[0], captures)  # type: ignore[arg-type]
        return f"{_CASTS[node.meta['val'].dtype]}({inner})", contraction
    if name in _UNARY and not node.kwargs:
        inner, contraction = _head_program(node.args[0], captures)  # type: ignore[arg-type]
        return f"{name}({inner})", contraction
    if name in _BINARY and not node.kwargs:
        return _binary_program(node, _BINARY[name], captures)
    reason = f"the logits go through {op_name(node)}, which is not known to work row by row"
    raise NotPackable(Refusal.at(node, reason))


def _contraction_program(node: fx.Node, captures: list[fx.Node]) -> str:
    if is_op(node, "aten.linear"):
        names = [_capture(arg, captures) for arg in node.args[1:] if arg is not None]
        return f"linear(x, {', '.join(names)})"
    if is_op(node, "aten.addmm"):
        if node.kwargs:
            raise NotPackable(Refusal.at(node, "a head with scaled products"))
        return f"add(matmul(x, {_capture(node.args[2], captures)}), {_capture(node.args[0], captures)})"
    return f"matmul(x, {_capture(node.args[1], captures)})"


def _binary_program(node: fx.Node, name: str, captures: list[fx.Node]) -> tuple[str, fx.Node]:
    left, right = node.args[:2]
    sides: list[str] = []
    contraction: fx.Node | None = None
    for side in (left, right):
        if not isinstance(side, fx.Node):
            sides.append(repr(side))
        elif len(shape_of(side)) <= 1:  # a scalar or one value per word: broadcasts over rows
            sides.append(_capture(side, captures))
        elif contraction is None:
            text, contraction = _head_program(side, captures)
            sides.append(text)
        else:
            raise NotPackable(Refusal.at(node, "logits that combine two products"))
    if contraction is None:
        raise NotPackable(Refusal.at(node, "logits that do not come from a product of hidden states and weights"))
    return f"{name}({sides[0]}, {sides[1]})", contraction


def _capture(node: Any, captures: list[fx.Node]) -> str:
    if node not in captures:
        captures.append(node)
    return f"c{captures.index(node)}"
