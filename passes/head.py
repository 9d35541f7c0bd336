"""The head of the model: what happens between the last hidden state and the logits, as a program on rows.

    hidden [1,T,C] ── linear, scale, softcap, norm over the vocabulary, ... ── logits [1,T,V]

becomes a program in ``x``, rows of hidden states (``runtime.program``), if every op in between works on each row by
itself. There may be several products, as a low-rank adapter on the head has; they start from one hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from .base import (
    NotPackable,
    PackGraph,
    Refusal,
    argument,
    axis_argument,
    is_op,
    is_tensor,
    op_family,
    op_name,
    operands,
    shape_of,
)

__all__ = ["Head", "read_head"]

_PRODUCTS = ("aten.linear", "aten.matmul", "aten.addmm", "aten.mm")
_BINARY = ("add", "sub", "mul", "div", "pow", "minimum", "maximum", "lt", "le", "gt", "ge")
_UNARY = ("tanh", "sigmoid", "neg", "exp", "log", "relu", "silu", "abs", "sqrt", "rsqrt", "erf", "sin", "cos")
_VIEWS = (
    "view", "reshape", "_unsafe_view", "unsqueeze", "squeeze", "flatten", "contiguous", "clone", "alias",
)  # fmt: skip
_CASTS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float64: "float64"}
_ALONG_THE_ROW = ("log_softmax", "softmax", "logsumexp", "mean", "sum", "amax")


class Head:
    """A head read from the graph.

    Attributes:
        hidden: the hidden states that enter it, one row per token.
        captures: the tensors that the program reads.
        program: the logits as a function of ``x``.
    """

    def __init__(self, graph: PackGraph, hidden: fx.Node, logits: fx.Node) -> None:
        self.graph, self.hidden = graph, hidden
        self.captures: list[fx.Node] = []
        self.program = self._text(logits)

    # ------------------------------------------------------------------ reading

    def _text(self, node: fx.Node) -> str:
        """Program text of ``node``, whose rows are tokens."""
        if node is self.hidden:
            return "x"
        _check_rows(self.graph, node)
        family = op_family(node)
        if family in _VIEWS:  # with one row per token before and after, nothing moves
            return self._text(operands(node)[0])
        read = _READERS.get(family)
        if read is not None and (text := read(self, node)) is not None:
            return text
        reason = f"the logits go through {op_name(node)}, which is not known to work by rows"
        raise NotPackable(Refusal.at(node, reason, "passes/head.py lists the ops that are"))

    def _side(self, node: fx.Node, side: Any) -> str:
        """Text of an operand: a number, a value per word that is the same for all tokens, or a row."""
        if not isinstance(side, fx.Node):
            return repr(side)
        if not is_tensor(side):
            raise NotPackable(Refusal.at(node, "logits that depend on the number of tokens in the row"))
        if not self.graph.token_axes(side) and all(size == 1 for size in shape_of(side)[:-1]):
            return self._capture(side, 1)
        return self._text(side)

    def _capture(self, node: fx.Node, rank: int) -> str:
        """Name of a tensor that is the same for all tokens, without the axes of size 1 that it has too many."""
        if len(shape_of(node)) > rank:
            shape = [int(size) for size in shape_of(node)[-rank:]]
            node = self.graph.call(torch.ops.aten.reshape.default, (node, shape), like=node)
        if node not in self.captures:
            self.captures.append(node)
        return f"c{self.captures.index(node)}"

    # ------------------------------------------------------------------ products

    def _linear(self, node: fx.Node) -> str:
        rows, weight, bias = operands(node)
        captures = [self._capture(n, rank) for n, rank in ((weight, 2), (bias, 1)) if n is not None]
        return f"linear({self._text(rows)}, {', '.join(captures)})"

    def _matmul(self, node: fx.Node) -> str | None:
        rows, weight = operands(node)[:2]
        if self.graph.token_axes(weight) or any(size != 1 for size in shape_of(weight)[:-2]):
            return None
        return f"matmul({self._text(rows)}, {self._capture(weight, 2)})"

    def _addmm(self, node: fx.Node) -> str:
        bias, rows, weight, beta, alpha = operands(node)
        product = f"matmul({self._text(rows)}, {self._capture(weight, 2)})"
        return f"add({_times(product, alpha)}, {_times(self._side(node, bias), beta)})"

    # ------------------------------------------------------------------ pointwise

    def _binary(self, node: fx.Node) -> str:
        op, rounding = op_family(node), argument(node, "rounding_mode", None)
        if rounding is not None:
            op = {"floor": "floordiv", "trunc": "truncdiv"}[rounding]
        left, right = (self._side(node, side) for side in operands(node)[:2])
        return f"{op}({left}, {_times(right, argument(node, 'alpha', 1))})"

    def _unary(self, node: fx.Node) -> str:
        return f"{op_family(node)}({self._side(node, operands(node)[0])})"

    def _gelu(self, node: fx.Node) -> str:
        how = "" if argument(node, "approximate") == "none" else f", {argument(node, 'approximate')!r}"
        return f"gelu({self._side(node, operands(node)[0])}{how})"

    def _cast(self, node: fx.Node) -> str | None:
        dtype = node.meta["val"].dtype
        return f"{_CASTS[dtype]}({self._text(operands(node)[0])})" if dtype in _CASTS else None

    def _clamp(self, node: fx.Node) -> str:
        low, high = (argument(node, bound, None) for bound in ("min", "max"))
        return f"clamp({self._side(node, operands(node)[0])}, {self._bound(node, low)}, {self._bound(node, high)})"

    def _expand(self, node: fx.Node) -> str:
        text, width = self._side(node, operands(node)[0]), shape_of(node)[-1]
        return text if width == shape_of(operands(node)[0])[-1] else f"wide({text}, {width})"

    def _bound(self, node: fx.Node, bound: Any) -> str:
        return "None" if bound is None else self._side(node, bound)

    def _where(self, node: fx.Node) -> str:
        return f"where({', '.join(self._side(node, side) for side in operands(node))})"

    def _masked_fill(self, node: fx.Node) -> str:
        x, mask, value = (self._side(node, side) for side in operands(node))
        return f"where({mask}, {value}, {x})"

    # ------------------------------------------------------------------ along the row

    def _along_the_row(self, node: fx.Node) -> str | None:
        """Reductions that keep their axis, and softmaxes, over the words of one token."""
        source, dtype = operands(node)[0], argument(node, "dtype", None)
        rank, given = len(shape_of(source)), argument(node, "dim", None)
        axes = list(given) if isinstance(given, (list, tuple)) else [given]
        if axes not in ([-1], [rank - 1]) or not argument(node, "keepdim", True) or (dtype and dtype not in _CASTS):
            return None
        row = f"{_CASTS[dtype]}({self._text(source)})" if dtype else self._text(source)
        return f"{op_family(node)}({row})"

    def _norm(self, node: fx.Node) -> str | None:
        rank = len(shape_of(node))
        over_words = [axis % rank for axis in argument(node, "dim") or ()] == [rank - 1]
        if not over_words or not argument(node, "keepdim") or argument(node, "ord") != 2 or argument(node, "dtype"):
            return None
        return f"norm({self._text(operands(node)[0])})"

    def _slice(self, node: fx.Node) -> str | None:
        source, start, end = operands(node)[0], argument(node, "start") or 0, argument(node, "end")
        words = shape_of(source)[-1]
        last = axis_argument(node, len(shape_of(node))) == len(shape_of(node)) - 1
        if not last or argument(node, "step") != 1 or not isinstance(start, int) or not isinstance(words, int):
            return None
        start, end, _ = slice(start, end if isinstance(end, int) else None).indices(words)
        return f"columns({self._text(source)}, {start}, {end})"


def _times(text: str, factor: Any) -> str:
    return text if factor == 1 else f"mul({text}, {factor!r})"


_READERS: dict[str, Callable[[Head, fx.Node], str | None]] = {
    "linear": Head._linear,
    "matmul": Head._matmul,
    "mm": Head._matmul,
    "addmm": Head._addmm,
    "gelu": Head._gelu,
    "clamp": Head._clamp,
    "clamp_min": Head._clamp,
    "clamp_max": Head._clamp,
    "where": Head._where,
    "masked_fill": Head._masked_fill,
    "linalg_vector_norm": Head._norm,
    "slice": Head._slice,
    "expand": Head._expand,
    "expand_as": Head._expand,
    **dict.fromkeys(_BINARY, Head._binary),
    **dict.fromkeys(_UNARY, Head._unary),
    **dict.fromkeys(("to", "type_as", "_to_copy"), Head._cast),
    **dict.fromkeys(_ALONG_THE_ROW, Head._along_the_row),
}


def read_head(graph: PackGraph, logits: fx.Node) -> Head:
    """The head that makes ``logits``.

    Raises:
        NotPackable: the logits are not a row-wise function of one hidden state per token.
    """
    inputs = _inputs_of_products(graph, logits)
    if not inputs:
        reason = "logits that do not come from a product of hidden states and weights"
        raise NotPackable(Refusal.at(logits, reason))
    refusals = []
    for hidden in inputs:
        _check_rows(graph, hidden)
        try:
            return Head(graph, hidden, logits)
        except NotPackable as refused:
            refusals.append(refused)
    raise refusals[0]


def _check_rows(graph: PackGraph, node: fx.Node) -> None:
    """Refuse what is not one row of words, or of hidden units, for each token."""
    shape, axes = shape_of(node), graph.token_axes(node)
    others = [size for axis, size in enumerate(shape[:-1]) if axis not in axes]
    if len(axes) != 1 or axes[0] == len(shape) - 1 or not isinstance(shape[-1], int) or set(others) - {1}:
        text = ", ".join(map(str, shape))
        raise NotPackable(Refusal.at(node, f"logits [{text}] that are not one row for each token"))


def _inputs_of_products(graph: PackGraph, logits: fx.Node) -> list[fx.Node]:
    """What enters the last products on each way to ``logits``, first in the graph first."""
    found, stack, seen = set(), [logits], {logits}
    while stack:
        node = stack.pop()
        if is_op(node, *_PRODUCTS):
            rows = operands(node)[1 if is_op(node, "aten.addmm") else 0]
            found.add(rows)
            continue
        readable = op_family(node) in _READERS or op_family(node) in _VIEWS
        for source in node.all_input_nodes if node.op == "call_function" and readable else ():
            if is_tensor(source) and graph.token_axes(source) and source not in seen:
                seen.add(source)
                stack.append(source)
    return [node for node in graph.graph.nodes if node in found]
