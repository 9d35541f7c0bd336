"""The written-out spelling: the softmax sandwich.

    query ── matmul ── pointwise chain ── softmax over keys ── matmul ── output
    key^T ──┘          scale, softcap, bias, mask, sinks       │
    value ─────────────────────────────────────────────────────┘

The chain between the contraction and the softmax is read, element by element, as a score expression. Sinks are
an extra column that is concatenated before the softmax and cut off after it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..base import PackGraph, Refusal, is_op, op_name, shape_of
from ..expressions import Capture, Const, Expr, Op, Var, simplify
from ..pull_back import Coordinates, Opaque, PullBack
from ..site import NoMatch, Site, head_count, understand_score

__all__ = ["recognize"]

SPELLING = "softmax"
_CONTRACTIONS = ("aten.matmul", "aten.bmm", "aten.baddbmm")
_AFTER = ("aten.to", "aten.type_as", "aten.contiguous", "aten.clone", "aten.view", "aten.reshape", "aten.expand",
          "aten.slice", "aten.dropout", "aten.squeeze", "aten.unsqueeze")  # fmt: skip


def recognize(graph: PackGraph, node: fx.Node) -> Site | NoMatch | None:
    """A :class:`Site` if ``node`` is a softmax over keys, why not, or ``None`` if it is another softmax."""
    if not is_op(node, "aten.softmax", "aten._softmax") or not _is_over_keys(graph, node):
        return None
    try:
        return _match(graph, node)
    except Opaque as opaque:
        return NoMatch(Refusal.at(opaque.node, f"attention scores that cannot be read: {opaque.reason}"))


def _is_over_keys(graph: PackGraph, node: fx.Node) -> bool:
    shape = shape_of(node)
    axis = int(node.args[1]) % len(shape)  # type: ignore[arg-type]
    return graph.mentions_length(shape[axis])


def _match(graph: PackGraph, node: fx.Node) -> Site | NoMatch:
    shape = shape_of(node)
    if int(node.args[1]) % len(shape) != len(shape) - 1 or len(shape) < 2 or not graph.is_length(shape[-2]):  # type: ignore[arg-type]
        return NoMatch(Refusal.at(node, "a softmax over tokens that is not attention of tokens over tokens"))
    scores, sink = _without_sinks(_without_shift(node.args[0]))  # type: ignore[arg-type]
    contraction = _Contraction(graph)
    where = _coordinates(shape)
    expr = contraction.reader.read(scores, where)
    if contraction.node is None:
        return NoMatch(Refusal.at(node, "a softmax over tokens whose scores are not a product of queries and keys"))
    meaning = understand_score(node, expr, contraction.scale)
    if isinstance(meaning, NoMatch):
        return meaning
    product = _weighted_sum(graph, node, where)
    if isinstance(product, NoMatch):
        return product
    sinks = None if sink is None else _sink_logits(graph, sink, where)
    query, key = contraction.operands
    value: Any = product.args[1]
    return Site(SPELLING, product, query, key, value, True, meaning, head_count(shape), sinks)


def _coordinates(shape: tuple[Any, ...]) -> Coordinates:
    """``(0, h, q, k)`` for a score tensor; several leading axes share the head index, most significant first."""
    leading: list[Expr] = []
    rest: Expr = Var("h")
    for size in reversed(shape[:-2]):
        leading.insert(0, Op("remainder", (rest, Const(int(size)))))
        rest = Op("floordiv", (rest, Const(int(size))))
    first = next((n for n, size in enumerate(shape[:-2]) if size != 1), None)
    for n, size in enumerate(shape[:-2]):
        if size == 1:
            leading[n] = Const(0)
        elif n == first and isinstance(leading[n], Op):  # the remainder of the most significant axis is itself
            leading[n] = leading[n].args[0]  # type: ignore[union-attr]
    return (*(simplify(e) for e in leading), Var("q"), Var("k"))


class _Contraction:
    """Stops the reader at the product of queries and keys, and remembers it."""

    def __init__(self, graph: PackGraph) -> None:
        self.graph = graph
        self.node: fx.Node | None = None
        self.scale = 1.0
        self.reader = PullBack(graph, self._leaf)

    @property
    def operands(self) -> tuple[fx.Node, fx.Node]:
        assert self.node is not None
        query, key = self.node.args[1:3] if is_op(self.node, "aten.baddbmm") else self.node.args[:2]
        return query, key  # type: ignore[return-value]

    def _leaf(self, node: fx.Node, where: Coordinates) -> Expr | None:
        if not is_op(node, *_CONTRACTIONS) or len(self.graph.token_axes(node)) != 2:
            return None
        operands = node.args[1:3] if is_op(node, "aten.baddbmm") else node.args[:2]
        if not all(self.reader.positional.depends_on_tokens(operand) for operand in operands):  # type: ignore[arg-type]
            return None
        if where != _coordinates(shape_of(node)):
            raise Opaque(node, "scores that are not read query by key, head by head")
        if self.node is not None and self.node is not node:
            raise Opaque(node, "scores that combine two products of queries and keys")
        self.node = node
        return self._with_bias(node, where)

    def _with_bias(self, node: fx.Node, where: Coordinates) -> Expr:
        if not is_op(node, "aten.baddbmm"):
            return Var("s")
        beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
        bias = self.reader.value(node.args[0], where) if beta != 0 else Const(0)
        product = Op("mul", (Var("s"), Const(alpha)))  # type: ignore[arg-type]
        return Op("add", (product, Op("mul", (bias, Const(beta)))))  # type: ignore[arg-type]


def _without_shift(scores: fx.Node) -> fx.Node:
    """``x - max(x)`` before a softmax changes nothing."""
    if not is_op(scores, "aten.sub"):
        return scores
    x, shift = scores.args[:2]
    if op_name(shift) == "getitem":  # type: ignore[arg-type]
        shift = shift.args[0]  # type: ignore[union-attr]
    return x if is_op(shift, "aten.max", "aten.amax") and shift.args[0] is x else scores  # type: ignore[union-attr, return-value]


def _without_sinks(scores: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    if not is_op(scores, "aten.cat"):
        return scores, None
    parts: Any = scores.args[0]
    if len(parts) != 2 or shape_of(parts[1])[-1] != 1:
        raise Opaque(scores, "a concatenation of scores that is not one column of sinks")
    return parts[0], parts[1]


def _sink_logits(graph: PackGraph, sink: fx.Node, where: Coordinates) -> fx.Node:
    value = PullBack(graph).read(sink, (*where[:-1], Const(0)))
    while isinstance(value, Op) and value.name in ("float32", "bfloat16", "float16"):
        value = value.args[0]
    if isinstance(value, Op) and value.name == "at" and value.args[1:] == (Var("h"),):
        assert isinstance(value.args[0], Capture)
        return value.args[0].node
    raise Opaque(sink, "sinks that are not one logit per head")


def _weighted_sum(graph: PackGraph, softmax: fx.Node, where: Coordinates) -> fx.Node | NoMatch:
    """The contraction with the values, provided the weights reach it unchanged."""
    node = softmax
    while True:
        if len(node.users) != 1:
            return NoMatch(Refusal.at(softmax, "attention weights that are used for more than weighing values"))
        (user,) = node.users
        if is_op(user, "aten.matmul", "aten.bmm") and user.args[0] is node:
            return _checked_weights(graph, softmax, user, where)
        if not is_op(user, *_AFTER):
            return NoMatch(
                Refusal.at(user, f"attention weights go through {op_name(user)} before they weigh the values")
            )
        if is_op(user, "aten.dropout"):
            from .sdpa import dropout_refusal

            return NoMatch(dropout_refusal(user, float(user.args[1])))  # type: ignore[arg-type]
        node = user


def _checked_weights(graph: PackGraph, softmax: fx.Node, product: fx.Node, where: Coordinates) -> fx.Node | NoMatch:
    """Read the weights through the views between softmax and product: they must be ``weight[h, q, k]``."""

    def leaf(node: fx.Node, at_: Coordinates) -> Expr | None:
        return (Var("s") if at_ == where else Const(0)) if node is softmax else None

    weights: Any = product.args[0]
    reader = PullBack(graph, leaf)
    read = reader.read(weights, _coordinates(shape_of(weights)))
    while isinstance(read, Op) and read.name in ("float32", "bfloat16", "float16"):
        read = read.args[0]
    if read != Var("s"):
        return NoMatch(Refusal.at(product, "attention weights that are rearranged before they weigh the values"))
    return product
