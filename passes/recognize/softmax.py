"""The written-out spelling: the softmax sandwich.

    query ── matmul ── pointwise chain ── softmax over keys ── matmul ── output
    key^T ──┘          scale, softcap, bias, mask, sinks       │
    value ─────────────────────────────────────────────────────┘

The chain between the contraction and the softmax is read, element by element, as a score expression; of sinks there
are two spellings (``passes.sinks``).
"""

from __future__ import annotations

from torch import fx

from ..base import PackGraph, Refusal, argument, axis_argument, is_op, op_family, op_name, operands, shape_of
from ..coordinates import ZERO, Coordinates, Opaque, score_coordinates
from ..expressions import Const, Expr, Op, Var
from ..pull_back import PullBack
from ..sinks import logit_per_head, scaled_by_sinks, without_casts, without_column
from ..site import NoMatch, Site, dropout_refusal, head_count, understand_score

__all__ = ["SPELLING", "recognize"]

SPELLING = "softmax"
_CONTRACTIONS = ("aten.matmul", "aten.bmm", "aten.baddbmm")
_AFTER = ("aten.to", "aten.type_as", "aten.contiguous", "aten.clone", "aten.view", "aten.reshape", "aten.expand",
          "aten.slice", "aten.dropout", "aten.squeeze", "aten.unsqueeze")  # fmt: skip


def recognize(graph: PackGraph, node: fx.Node) -> Site | NoMatch | None:
    """A :class:`Site` if ``node`` is a softmax over keys, why not, or ``None`` if it is another softmax."""
    if not is_op(node, "aten.softmax", "aten._softmax"):
        return None
    shape = shape_of(node)
    axis = axis_argument(node, len(shape))
    if not graph.mentions_length(shape[axis]):
        return None
    if axis != len(shape) - 1 or len(shape) < 2 or not graph.is_length(shape[-2]):
        return NoMatch(Refusal.at(node, "a softmax over tokens that is not attention of tokens over tokens"))
    try:
        return _match(graph, node)
    except Opaque as opaque:
        return NoMatch(opaque.refusal("attention scores that cannot be read"))


def _match(graph: PackGraph, node: fx.Node) -> Site | NoMatch:
    where = score_coordinates(shape_of(node))
    scores, sink = without_column(_without_shift(operands(node)[0]))
    contraction = _Contraction(graph)
    expr = contraction.reader.read(scores, where)
    if contraction.node is None:
        return NoMatch(Refusal.at(node, "a softmax over tokens whose scores are not a product of queries and keys"))
    meaning = understand_score(node, expr, scale=1.0)
    if isinstance(meaning, NoMatch):
        return meaning
    product = _weighted_sum(graph, node, where)
    if isinstance(product, NoMatch):
        return product
    value, output = operands(product)[1], product
    sinks = None if sink is None else logit_per_head(graph, sink, (*where[:-1], ZERO))
    if sinks is None and (scaled := scaled_by_sinks(graph, scores, product, where)) is not None:
        output, sinks = scaled
    query, key = _factors(contraction.node)
    return Site(SPELLING, output, query, key, value, True, meaning, head_count(shape_of(node)), sinks)


# --------------------------------------------------------------------------- before the softmax


def _factors(contraction: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Left and right of a product."""
    given = operands(contraction)
    left, right = given[1:3] if is_op(contraction, "aten.baddbmm") else given[:2]
    return left, right


class _Contraction:
    """Stops the reader at the product of queries and keys, and remembers it."""

    def __init__(self, graph: PackGraph) -> None:
        self.graph = graph
        self.node: fx.Node | None = None
        self.reader = PullBack(graph, self._leaf)

    def _leaf(self, node: fx.Node, where: Coordinates) -> Expr | None:
        if not is_op(node, *_CONTRACTIONS) or len(self.graph.token_axes(node)) != 2:
            return None
        if not all(self.reader.positional.depends_on_tokens(factor) for factor in _factors(node)):
            return None
        if where != score_coordinates(shape_of(node)):
            raise Opaque(node, "scores that are not read query by key, head by head")
        if self.node is not None and self.node is not node:
            raise Opaque(node, "scores that combine two products of queries and keys")
        self.node = node
        return self._with_bias(node, where)

    def _with_bias(self, node: fx.Node, where: Coordinates) -> Expr:
        if not is_op(node, "aten.baddbmm"):
            return Var("s")
        beta, alpha = argument(node, "beta"), argument(node, "alpha")
        product = Op("mul", (Var("s"), Const(alpha)))
        if beta == 0:  # then torch does not even look at the bias
            return product
        return Op("add", (product, Op("mul", (self.reader.value(operands(node)[0], where), Const(beta)))))


def _without_shift(scores: fx.Node) -> fx.Node:
    """``x - max(x)`` before a softmax changes nothing, if all keys of a query are shifted alike."""
    if not is_op(scores, "aten.sub") or argument(scores, "alpha", 1) != 1:
        return scores
    x, shift = operands(scores)[:2]
    if is_op(shift, "aten.detach"):
        shift = operands(shift)[0]
    if is_op(shift, "getitem") and operands(shift)[1] == 0:
        shift = operands(shift)[0]
    if not is_op(shift, "aten.max", "aten.amax") or operands(shift)[0] is not x:
        return scores
    return x if _is_alike_for_all_keys(shift, len(shape_of(x))) else scores


def _is_alike_for_all_keys(maximum: fx.Node, rank: int) -> bool:
    given = argument(maximum, "dim", None)
    if given is None:
        return op_name(maximum) == "aten.max.default"
    axes = given if isinstance(given, (list, tuple)) else [given]
    return bool(argument(maximum, "keepdim")) and (not axes or any(axis % rank == rank - 1 for axis in axes))


# --------------------------------------------------------------------------- after the softmax


def _weighted_sum(graph: PackGraph, softmax: fx.Node, where: Coordinates) -> fx.Node | NoMatch:
    """The contraction with the values, provided the weights reach it unchanged."""
    node = softmax
    while True:
        if len(node.users) != 1:
            return NoMatch(Refusal.at(softmax, "attention weights that are used for more than weighing values"))
        (user,) = node.users
        if is_op(user, "aten.matmul", "aten.bmm") and operands(user)[0] is node:
            return _checked_weights(graph, softmax, user, where)
        if not is_op(user, *_AFTER):
            reason = f"attention weights go through {op_name(user)} before they weigh the values"
            return NoMatch(Refusal.at(user, reason))
        if op_family(user) == "dropout":
            return NoMatch(dropout_refusal(user, float(argument(user, "p"))))
        node = user


def _checked_weights(graph: PackGraph, softmax: fx.Node, product: fx.Node, where: Coordinates) -> fx.Node | NoMatch:
    """Read the weights through the views between softmax and product: they must be ``weight[h, q, k]``."""

    def leaf(node: fx.Node, at_: Coordinates) -> Expr | None:
        return (Var("s") if at_ == where else ZERO) if node is softmax else None

    weights, value = operands(product)[:2]
    read = PullBack(graph, leaf).read(weights, score_coordinates(shape_of(weights)))
    if without_casts(read) != Var("s") or len(shape_of(value)) < 2:
        return NoMatch(Refusal.at(product, "attention weights that are rearranged before they weigh the values"))
    return product
