"""Typing rules of arithmetic: pointwise ops, reductions, norms and products."""

from __future__ import annotations

from typing import Any

from torch import fx

from .base import PackGraph, argument, op_family, op_name, operands, shape_of
from .types import Const, Mixes, Tok, TokenType, Tuple, Types, rule, tensors_of, type_of, within_token

__all__ = ["FILLS", "normalization", "pointwise"]

FILLS = (
    "ones", "zeros", "full", "ones_like", "zeros_like", "full_like", "new_ones", "new_zeros", "new_full", "fill",
    "zero", "empty", "empty_like", "new_empty",
)  # fmt: skip
"""Ops that write one value everywhere, or nothing yet, whatever tensor they take the shape from."""

_BY_ELEMENT = (
    "where", "masked_fill", "_to_copy", "dropout", "native_dropout", "contiguous", "clone", "detach", "alias",
    "lift_fresh_copy", "relu", "silu", "gelu", "softplus", "clamp", "rsub", "nan_to_num", "hardswish", "leaky_relu",
    "elu", "mish", "log_sigmoid", "hardtanh", "relu6", "selu", "celu", "square", "isnan", "isinf", "floor_divide",
    "divide", "multiply", "subtract", "greater", "greater_equal", "less", "less_equal", "not_equal", "absolute",
    "negative", "__and__", "__or__", "__xor__", "polar", "complex", "real", "imag", "_conj", "conj_physical",
    "resolve_conj", "resolve_neg", "angle", "clip", "fix", "arctan2", "true_divide", "float_power", "isclose",
)  # fmt: skip
"""Pointwise ops that torch does not tag as such in every version or overload."""


@rule(*_BY_ELEMENT)
def pointwise(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Each output element reads one element of each input, broadcast: token axes must coincide."""
    value: Any = node.meta["val"]
    outputs = value if isinstance(value, (tuple, list)) else (value,)
    kind = _broadcast(tensors_of(node), len(outputs[0].shape), types)
    if isinstance(kind, Tok) and isinstance(value, (tuple, list)):
        return Tuple((kind,) * len(value))
    return kind


def _broadcast(sources: list[fx.Node], rank: int, types: Types) -> TokenType | Mixes:
    axes = set()
    for source in sources:
        kind = types[source]
        if isinstance(kind, Tok):
            axes.add(rank - len(shape_of(source)) + kind.axis)
    if len(axes) != 1:
        return Mixes("tokens are combined with other tokens: their axes do not line up")
    (axis,) = axes
    for source in sources:
        if types[source] == Const() and _size_at(source, rank, axis) != 1:
            return Mixes(f"{source.name} has one value per slot of the row that is not a function of its token")
    return Tok(axis)


def _size_at(source: fx.Node, rank: int, axis: int) -> Any:
    shape = shape_of(source)
    own = axis - (rank - len(shape))
    return shape[own] if own >= 0 else 1


@rule("to", "type_as")
def cast(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """A cast; of a second tensor only the dtype and the device are read."""
    return types[operands(node)[0]]


@rule(*FILLS)
def fill(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """One value everywhere: of the tensor whose shape or dtype is taken no element is read."""
    axes = graph.token_axes(node)
    return Tok(axes[0]) if axes else Const()


@rule("one_hot")
def one_hot(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Each token's class as a new last axis; without a number of classes, their number is the largest in the row."""
    if argument(node, "num_classes") == -1:
        return Mixes("one_hot without a number of classes counts those of the row")
    return types[operands(node)[0]]


# --------------------------------------------------------------------------- along axes


@rule("mean", "sum", "amax", "amin", "var", "std", "norm", "linalg_vector_norm", "logsumexp", "prod", "all", "any",
      "argmax", "argmin", "nansum", "nanmean", "count_nonzero")  # fmt: skip
def reduction(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """A reduction within each token. Without ``keepdim`` the token axis moves down."""
    rank = len(shape_of(operands(node)[0]))
    axes = _axes(argument(node, "dim", None), rank)
    kind = within_token(node, types, axes, op_name(node))
    if isinstance(kind, Mixes) or argument(node, "keepdim", False):
        return kind
    return Tok(kind.axis - sum(axis % rank < kind.axis for axis in set(axes)))


def _axes(given: Any, rank: int) -> list[int]:
    """A ``dim`` argument as axes; absent or empty, it means all of them."""
    if given is None or given == []:
        return list(range(rank))
    return [int(axis) % rank for axis in given] if isinstance(given, (list, tuple)) else [int(given) % rank]


@rule("var_mean", "std_mean")
def two_reductions(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Two reductions within each token."""
    kind = reduction(graph, node, types)
    return Tuple((kind, kind)) if isinstance(kind, Tok) else kind


@rule("max", "min", "topk", "sort", "argsort", "chunk", "split", "split_with_sizes", "unbind", "cummax", "cummin",
      "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "tensor_split", "kthvalue", "median", "mode",
      "aminmax")  # fmt: skip
def along_axis(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Ops along one axis, often with several outputs: token-wise if that axis is not the token axis."""
    given = argument(node, "dim", None)
    if given is None:
        two = op_family(node) in ("max", "min") and len(tensors_of(node)) == 2
        return pointwise(graph, node, types) if two else Mixes(f"{op_name(node)} over the whole row")
    rank = len(shape_of(operands(node)[0]))
    kind = within_token(node, types, [given], op_name(node))
    if isinstance(kind, Mixes):
        return kind
    value = node.meta["val"]
    outputs = value if isinstance(value, (tuple, list)) else (value,)
    lost = len(outputs[0].shape) < rank and given % rank < kind.axis
    item = Tok(kind.axis - 1) if lost else kind
    return Tuple((item,) * len(outputs)) if isinstance(value, (tuple, list)) else item


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod", "flip", "roll", "glu", "logcumsumexp")
def along_given_axis(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Ops along the axes they are given, which they keep."""
    given = argument(node, "dims" if op_family(node) in ("flip", "roll") else "dim")
    return within_token(node, types, _axes(given, len(shape_of(operands(node)[0]))), op_name(node))


@rule("prefix_sum")
def prefix_sum(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """A running sum along each sequence of the forest, by definition."""
    values, subtree_end, axis = operands(node)
    if subtree_end is not graph.layout("subtree_end") or types[values] != Tok(axis):
        return Mixes("a running sum along another forest than the row's")
    return Tok(axis)


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def normalization(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Statistics over the trailing axes only."""
    if any(type_of(argument(node, name, None), types) != Const() for name in ("weight", "bias")):
        return Mixes("a norm whose weights depend on the tokens")
    trailing = len(argument(node, "normalized_shape"))
    kind = within_token(node, types, range(-trailing, 0), op_name(node))
    if isinstance(kind, Tok) and isinstance(node.meta["val"], (tuple, list)):
        return Tuple((kind,) * len(node.meta["val"]))
    return kind


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "instance_norm", "group_norm")
def batch_statistics(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Norms over more than one token."""
    return Mixes(f"{op_name(node)} computes statistics over the tokens of the row")


# --------------------------------------------------------------------------- products


@rule("linear")
def linear(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """A matrix applied to the last axis of each token."""
    if any(type_of(argument(node, name), types) != Const() for name in ("weight", "bias")):
        return Mixes("a linear layer whose weight depends on the tokens")
    return within_token(node, types, [-1], "a linear layer")


@rule("addmm", "baddbmm")
def add_product(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """``bias + left @ right``, the bias broadcast."""
    bias, left, right = operands(node)[:3]
    rank = len(shape_of(node))
    kind = _product(left, right, types, rank)
    if not isinstance(kind, Tok):
        return kind
    where = type_of(bias, types)
    if isinstance(where, Tok) and rank - len(shape_of(bias)) + where.axis != kind.axis:
        return Mixes("a bias of tokens added to other tokens")
    if where == Const() and _size_at(bias, rank, kind.axis) != 1:
        return Mixes("a bias with one value per slot of the row")
    return kind


@rule("mm", "bmm", "matmul", "mv")
def product(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """A matrix product."""
    left, right = operands(node)[:2]
    return _product(left, right, types, len(shape_of(node)))


def _product(left: fx.Node, right: fx.Node, types: Types, rank: int) -> TokenType | Mixes:
    """``[.., n, c] @ [.., c, m]``: tokens may be rows, columns, or a batch axis of both; never contracted."""
    a, b = types[left], types[right]
    ranks = len(shape_of(left)), len(shape_of(right))
    if min(ranks) < 2:
        return _product_with_vector(a, b, ranks)
    left_axis = a.axis - ranks[0] if isinstance(a, Tok) else None
    right_axis = b.axis - ranks[1] if isinstance(b, Tok) else None
    if left_axis == -1 or right_axis == -2:
        return Mixes("a matrix product that sums over the tokens of the row")
    if left_axis is not None and right_axis is not None:
        aligned = left_axis == right_axis and left_axis < -2
        return Tok(rank + left_axis) if aligned else Mixes("a matrix product of tokens with other tokens")
    axis = left_axis if left_axis is not None else right_axis
    return Tok(rank + axis) if axis is not None else Mixes("a product of items that are no tensors")


def _product_with_vector(a: TokenType, b: TokenType, ranks: tuple[int, int]) -> TokenType | Mixes:
    if ranks[1] == 1 and isinstance(a, Tok) and b == Const() and a.axis < ranks[0] - 1:
        return a
    return Mixes("a product of tokens with a vector of tokens")


@rule("outer", "ger")
def outer(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Every pair of two vectors, one of them of tokens."""
    found = [axis for axis, vector in enumerate(operands(node)[:2]) if isinstance(types[vector], Tok)]
    return Tok(found[0]) if len(found) == 1 else Mixes("products of tokens with other tokens")


@rule("convolution", "conv1d", "conv2d", "conv_transpose1d")
def convolution(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Neighbours in the row are not neighbours in a sequence."""
    return Mixes("a convolution over the tokens of the row lets neighbours of different responses see each other")
