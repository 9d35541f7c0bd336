"""Typing rules of layout: views, permutations, cuts and joins. The token axis must stay an axis of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .base import PackGraph, argument, axis_argument, op_family, op_name, operands, shape_of
from .types import Const, Mixes, Tok, TokenType, Tuple, Types, rule, within_token


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
      "ravel")  # fmt: skip
def view(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """The token axis stays an axis of its own: as many elements stand before it as did."""
    source = operands(node)[0]
    kind = types[source]
    if not isinstance(kind, Tok):
        return Mixes("a view of several tensors")
    if argument(node, "dtype", None) is not None and kind.axis == len(shape_of(source)) - 1:
        return Mixes("the bytes of neighbouring tokens are read as one number")
    before = _count(shape_of(source)[: kind.axis])
    axes = graph.token_axes(node)
    if len(axes) == 1 and _count(shape_of(node)[: axes[0]]) == before:
        return Tok(axes[0])
    return Mixes(f"a view that merges or splits the token axis: {_show(source)} -> {_show(node)}")


def _count(sizes: Sequence[Any]) -> int:
    total = 1
    for size in sizes:
        total *= int(size)
    return total


def _show(node: fx.Node) -> str:
    return "[" + ", ".join(str(size) for size in shape_of(node)) + "]"


@rule("view_as_complex", "view_as_real")
def complex_view(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Pairs of numbers on the last axis are complex numbers, or become such pairs."""
    pairs = [-1] if op_family(node) == "view_as_complex" else []
    return within_token(node, types, pairs, "a pair of neighbouring tokens as one complex number")


@rule("transpose", "permute", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "mT", "mH", "adjoint", "numpy_T")
def permutation(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Axes change places; the token axis is found by its size, of which there is one."""
    return _only_axis(graph, node, "a permutation of several axes of tokens")


@rule("repeat", "repeat_interleave", "tile")
def repeat(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Repetition along other axes; a repeated token axis would no longer have the size T."""
    if types[operands(node)[0]] == Const():
        return Mixes("a repetition that depends on the tokens")
    return _only_axis(graph, node, "tokens are repeated")


def _only_axis(graph: PackGraph, node: fx.Node, otherwise: str) -> TokenType | Mixes:
    axes = graph.token_axes(node)
    return Tok(axes[0]) if len(axes) == 1 else Mixes(otherwise)


@rule("expand", "expand_as", "broadcast_to")
def expand(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Sizes of 1 grow; a constant that grows along the tokens is the same in every slot."""
    source = operands(node)[0]
    kind, axes = types[source], graph.token_axes(node)
    if len(axes) != 1:
        return Mixes("tokens are repeated along another axis of tokens")
    if kind == Const():
        return Tok(axes[0])
    grown = len(shape_of(node)) - len(shape_of(source))
    return Tok(kind.axis + grown) if isinstance(kind, Tok) else Mixes("several tensors are expanded at once")


@rule("slice", "narrow")
def slice_(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """The same part of each token."""
    return within_token(node, types, [argument(node, "dim")], "a slice")


@rule("select")
def select(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """The same element of each token."""
    axis = axis_argument(node, len(shape_of(operands(node)[0])))
    kind = within_token(node, types, [axis], "selecting one slot")
    return Tok(kind.axis - 1) if isinstance(kind, Tok) and axis < kind.axis else kind


@rule("unfold")
def windows(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Windows along an axis within each token; they become a new last axis."""
    return within_token(node, types, [argument(node, "dimension")], "windows")


@rule("tril", "triu")
def triangle(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """A triangle of a matrix that each token has for itself."""
    return within_token(node, types, [-2, -1], "a triangle")


@rule("diagonal")
def diagonal(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """The diagonal of a matrix that each token has for itself; two axes become one, at the end."""
    rank = len(shape_of(node)) + 1
    axes = [axis_argument(node, rank, name) for name in ("dim1", "dim2")]
    kind = within_token(node, types, axes, "a diagonal")
    return Tok(kind.axis - sum(axis < kind.axis for axis in axes)) if isinstance(kind, Tok) else kind


@rule("cat", "concat", "concatenate", "stack")
def concatenate(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Side by side within each token."""
    kinds = {types[part] for part in argument(node, "tensors")}
    if len(kinds) != 1 or not isinstance(kind := kinds.pop(), Tok):
        return Mixes("tokens are concatenated with something that is not per token")
    axis = axis_argument(node, len(shape_of(node)))
    if op_family(node) == "stack":
        return Tok(kind.axis + (1 if axis <= kind.axis else 0))
    return Mixes("a concatenation along the tokens of the row") if axis == kind.axis else kind


@rule("slice_scatter", "select_scatter")
def write_into(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """The same part of each token is replaced by what that token has for it."""
    source, written = operands(node)[:2]
    axis = axis_argument(node, len(shape_of(node)))
    kind, part = types[source], types[written]
    if not isinstance(kind, Tok) or not isinstance(part, Tok) or kind.axis == axis:
        return Mixes(f"{op_name(node)} writes into slots of the row")
    lost = op_family(node) == "select_scatter" and axis < kind.axis
    return kind if part.axis == kind.axis - lost else Mixes("one slot is overwritten with another")


@rule("pad", "constant_pad_nd")
def pad(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Padding within each token; over tokens it would shift the row."""
    kind, amounts = types[operands(node)[0]], argument(node, "pad")
    rank, padded = len(shape_of(node)), len(amounts) // 2
    touched = {rank - 1 - n for n in range(padded) if any(amounts[2 * n : 2 * n + 2])}
    if not isinstance(kind, Tok) or kind.axis in touched:
        return Mixes("padding along the tokens of the row (a shift by one token leaks neighbours)")
    return kind


@rule("getitem")
def item(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """One output of a multi-output op."""
    several, place = operands(node)
    kind = types[several]
    return kind.items[place] if isinstance(kind, Tuple) else Mixes("an item of something that has no items")
