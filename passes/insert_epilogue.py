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
    output_node,
    shape_of,
)

__all__ = ["insert_epilogue"]

aten = torch.ops.aten
_CONTRACTIONS = ("aten.linear", "aten.matmul", "aten.addmm", "aten.mm")
_BINARY = ("add", "sub", "mul", "div")
_UNARY = ("tanh", "sigmoid", "neg", "exp", "relu", "silu", "gelu")
_VIEWS = ("view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "contiguous", "clone", "expand", "alias")
_CASTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}


def insert_epilogue(graph: PackGraph) -> PassResult:
    """Replace the logits by ``token_logps``.

    Raises:
        NotPackable: the logits are not a row-wise function of one hidden state per token.
    """
    logits = output_node(graph.graph)
    head = _Head(graph)
    program = head.program(logits)
    hidden = head.hidden(logits)
    (axis,) = graph.token_axes(hidden)
    output = next(n for n in reversed(graph.graph.nodes) if n.op == "output")
    with graph.graph.inserting_before(output):
        rows = graph.call(aten.index_select.default, (hidden, axis, graph.layout("predecessors")), like=logits)
        if len(shape_of(rows)) != 2:
            rows = graph.call(aten.reshape.default, (rows, [-1, int(shape_of(hidden)[-1])]), like=logits)
        arguments = (rows, graph.layout("targets"), head.captures, program)
        scored = graph.call(ops.token_logps._opoverload, arguments, like=logits)
        output.args = ((graph.item(scored, 0),),)
    graph.finish()
    return PassResult("insert_epilogue", [f"head: {program}"], 1)


class _Head:
    """The head as a program on rows ``x``.

    Attributes:
        captures: the tensors that the program reads.
        contraction: the product that makes the vocabulary axis, where ``x`` enters.
    """

    def __init__(self, graph: PackGraph) -> None:
        self.graph = graph
        self.captures: list[fx.Node] = []
        self.contraction: fx.Node | None = None

    def program(self, node: fx.Node) -> str:
        """Program text of ``node``, whose rows are tokens."""
        family = op_family(node)
        if not self._is_one_row_per_token(node):
            shape = ", ".join(map(str, shape_of(node)))
            raise NotPackable(Refusal.at(node, f"logits [{shape}] that are not one row for each token"))
        if is_op(node, *_CONTRACTIONS):
            return self._product(node)
        if family in _VIEWS:  # with one row per token before and after, nothing moves
            return self.program(operands(node)[0])
        if family in ("to", "type_as", "_to_copy") and node.meta["val"].dtype in _CASTS:
            return f"{_CASTS[node.meta['val'].dtype]}({self.program(operands(node)[0])})"
        if family in _UNARY and argument(node, "approximate", "none") == "none":
            return f"{family}({self.program(operands(node)[0])})"
        if family in _BINARY and argument(node, "alpha", 1) == 1 and argument(node, "rounding_mode", None) is None:
            return self._binary(node)
        raise NotPackable(
            Refusal.at(node, f"the logits go through {op_name(node)}, which is not known to work by rows")
        )

    def hidden(self, logits: fx.Node) -> fx.Node:
        """The hidden states that enter the head."""
        node = self.contraction
        if node is None:
            reason = "logits that do not come from a product of hidden states and weights"
            raise NotPackable(Refusal.at(logits, reason))
        hidden: fx.Node = operands(node)[1 if is_op(node, "aten.addmm") else 0]
        if not self._is_one_row_per_token(hidden):
            raise NotPackable(Refusal.at(logits, "the logits are not computed from one hidden state per token"))
        return hidden

    def _is_one_row_per_token(self, node: fx.Node) -> bool:
        shape = shape_of(node)
        axes = self.graph.token_axes(node)
        others = [size for axis, size in enumerate(shape[:-1]) if axis not in axes]
        return len(axes) == 1 and axes[0] < len(shape) - 1 and isinstance(shape[-1], int) and set(others) <= {1}

    def _product(self, node: fx.Node) -> str:
        if self.contraction is not None:
            raise NotPackable(Refusal.at(node, "logits that combine two products"))
        self.contraction = node
        if is_op(node, "aten.linear"):
            _, weight, bias = operands(node)
            return f"linear(x, {', '.join(self._capture(n) for n in (weight, bias) if n is not None)})"
        if is_op(node, "aten.addmm"):
            bias, _, weight, *scales = operands(node)
            if scales != [1, 1]:
                raise NotPackable(Refusal.at(node, "a head with scaled products"))
            return f"add(matmul(x, {self._capture(weight)}), {self._capture(bias)})"
        weight = operands(node)[1]
        if len(shape_of(weight)) != 2:
            raise NotPackable(Refusal.at(node, "a head with several weight matrices"))
        return f"matmul(x, {self._capture(weight)})"

    def _binary(self, node: fx.Node) -> str:
        left, right = (self._side(node, side) for side in operands(node)[:2])
        return f"{op_family(node)}({left}, {right})"

    def _side(self, node: fx.Node, side: Any) -> str:
        if not isinstance(side, fx.Node):
            return repr(side)
        if not is_tensor(side):
            raise NotPackable(Refusal.at(node, "logits that depend on the number of tokens in the row"))
        if len(shape_of(side)) <= 1:  # a scalar or one value per word: broadcasts over rows
            return self._capture(side)
        return self.program(side)

    def _capture(self, node: fx.Node) -> str:
        if node not in self.captures:
            self.captures.append(node)
        return f"c{self.captures.index(node)}"
