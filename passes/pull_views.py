"""Reading through views: the coordinates change, the element does not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.functions import Max

from .base import PackGraph, argument, axis_argument, op_family, operands, shape_of
from .coordinates import ZERO, Coordinates, Opaque, Reader, reads
from .expressions import LENGTH, Capture, Const, Expr, Op, simplify, variables, walk

__all__ = ["VIEWS"]


@reads("contiguous", "clone", "alias", "lift_fresh_copy", "dropout")
def same(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """The same element. A dropout that is still here is active; who reads through it decides what that means."""
    if op_family(node) == "dropout":
        raise Opaque(node, "dropout that is active")
    return reader.read(operands(node)[0], where)


@reads("detach")
def detach(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """The same element, if no gradient could flow through it: an expression cannot say that it stops there."""
    value = reader.read(operands(node)[0], where)
    captured = [part.node for part in walk(value) if isinstance(part, Capture)]
    if "s" in variables(value) or any(_is_learned(reader.graph, captured_node) for captured_node in captured):
        raise Opaque(node, "a gradient that is stopped in the middle of a score")
    return value


def _is_learned(graph: PackGraph, node: fx.Node) -> bool:
    """True if a gradient through ``node`` reaches a parameter."""
    seen, stack = {node}, [node]
    while stack:
        source = stack.pop()
        if source.op == "placeholder" and source.name in graph.parameters:
            return True
        fresh = [n for n in source.all_input_nodes if n not in seen]
        seen.update(fresh)
        stack += fresh
    return False


@reads("transpose", "swapaxes", "swapdims")
def transpose(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """Two axes change places."""
    source, a, b = operands(node)
    return _swapped(reader, source, where, int(a) % len(where), int(b) % len(where))


@reads("t", "mT", "numpy_T")
def last_two(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """The transpose of a matrix."""
    if len(where) < 2 or (op_family(node) == "numpy_T" and len(where) != 2):
        raise Opaque(node, "a transpose of something that is not a matrix")
    return _swapped(reader, operands(node)[0], where, len(where) - 2, len(where) - 1)


def _swapped(reader: Reader, source: fx.Node, where: Coordinates, a: int, b: int) -> Expr:
    read_at = list(where)
    read_at[a], read_at[b] = where[b], where[a]
    return reader.read(source, read_at)


@reads("permute")
def permute(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """Axis ``n`` of the result is axis ``dims[n]`` of the source."""
    order = [int(axis) % len(where) for axis in argument(node, "dims")]
    return reader.read(operands(node)[0], [where[order.index(axis)] for axis in range(len(order))])


@reads("expand", "expand_as", "broadcast_to")
def expand(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """Coordinates along sizes of 1 do not matter."""
    return reader.value(operands(node)[0], where)


@reads("repeat")
def repeat(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """The whole tensor over and over."""
    source = operands(node)[0]
    sizes = shape_of(source)
    inner, outer = where[len(where) - len(sizes) :], shape_of(node)[len(where) - len(sizes) :]
    read_at: list[Expr] = []
    for w, size, out in zip(inner, sizes, outer, strict=True):
        if reader.graph.mentions_length(size):
            if not (reader.graph.is_length(size) and reader.graph.is_length(out)):
                raise Opaque(node, "an axis of tokens is repeated")
            read_at.append(w)
        else:
            read_at.append(w if isinstance(out, int) and size == out else Op("remainder", (w, Const(int(size)))))
    return reader.read(source, [simplify(w) for w in read_at])


@reads("repeat_interleave")
def repeat_interleave(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """Each element several times in a row."""
    source, repeats = operands(node)[:2]
    if not isinstance(repeats, int) or argument(node, "dim", None) is None:
        raise Opaque(node, "repeat_interleave with computed repeats")
    axis = axis_argument(node, len(where))
    read_at = list(where)
    read_at[axis] = simplify(Op("floordiv", (where[axis], Const(repeats))))
    return reader.read(source, read_at)


@reads("slice")
def slice_(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``source[start::step]``; where it ends does not matter to what is in it."""
    source = operands(node)[0]
    axis, step = axis_argument(node, len(where)), argument(node, "step")
    start = _start(reader.graph, argument(node, "start") or 0, shape_of(source)[axis])
    if start is None or not isinstance(step, int):
        raise Opaque(node, "a slice that counts from the end or from a computed place")
    moved = Op("add", (Op("mul", (where[axis], Const(step))), start))
    return reader.read(source, (*where[:axis], simplify(moved), *where[axis + 1 :]))


def _start(graph: PackGraph, start: Any, size: Any) -> Expr | None:
    """Where a slice begins: at a place, or at the last T of N places, which limits rows to N tokens."""
    if isinstance(start, int):
        return Const(start) if start >= 0 else None
    value = start.meta.get("val")
    if not isinstance(value, torch.SymInt):
        return None
    places = value.node.expr
    if graph.is_length(size) and places == -graph.length:  # the last T of T tokens
        return ZERO
    if not isinstance(size, int):
        return None
    at_least_zero = isinstance(places, Max) and 0 in places.args  # `max(0, N - T)`: a row of more than N tokens fails
    if at_least_zero:
        (places,) = [arg for arg in places.args if arg != 0]
    count = places + graph.length  # the place is `count - T`
    if not count.is_Integer:
        return None
    if at_least_zero and count <= 1:  # no row is shorter
        return ZERO
    count = int(count) if count > 0 else int(count) + size  # a negative place counts from the end
    graph.limit_positions(count)
    return Op("sub", (Const(count), LENGTH))


@reads("select")
def select(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """One place of an axis that disappears."""
    axis, place = axis_argument(node, len(where) + 1), argument(node, "index")
    if not isinstance(place, int) or place < 0:
        raise Opaque(node, "a select that counts from the end or from a computed place")
    return reader.read(operands(node)[0], (*where[:axis], Const(place), *where[axis:]))


@reads("slice_scatter")
def slice_scatter(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``source`` with ``source[start:end]`` replaced."""
    source, written = operands(node)[:2]
    axis, start, end = axis_argument(node, len(where)), argument(node, "start") or 0, argument(node, "end")
    if not isinstance(start, int) or start < 0 or argument(node, "step") != 1:
        raise Opaque(node, "a write into a slice that counts from the end or from a computed place")
    place = where[axis]
    inside = simplify(Op("sub", (place, Const(start))))
    new = reader.read(written, (*where[:axis], inside, *where[axis + 1 :]))
    replaced: Expr = Op("ge", (place, Const(start)))
    if not _is_last(shape_of(source)[axis], end):
        stop = start + _count(node, shape_of(written)[axis])
        replaced = Op("and_", (replaced, Op("lt", (place, Const(stop)))))
    return Op("where", (replaced, new, reader.read(source, where)))


def _is_last(size: Any, end: Any) -> bool:
    return end is None or (isinstance(end, int) and isinstance(size, int) and end >= size) or end == sys.maxsize


def _count(node: fx.Node, size: Any) -> int:
    if not isinstance(size, int):
        raise Opaque(node, "a write into a computed number of places")
    return size


@reads("select_scatter")
def select_scatter(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``source`` with one place along an axis replaced."""
    source, written = operands(node)[:2]
    axis, place = axis_argument(node, len(where)), argument(node, "index")
    if not isinstance(place, int) or place < 0:
        raise Opaque(node, "a write into a place that counts from the end or is computed")
    new = reader.read(written, (*where[:axis], *where[axis + 1 :]))
    return Op("where", (Op("eq", (where[axis], Const(place))), new, reader.read(source, where)))


@reads("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as",
       "ravel")  # fmt: skip
def view(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """The same elements in the same order, in another shape."""
    if argument(node, "dtype", None) is not None:
        raise Opaque(node, "the bytes of a tensor read as another dtype")
    source = operands(node)[0]
    return reader.read(source, _reshaped(reader.graph, node, shape_of(source), shape_of(node), where))


def _reshaped(
    graph: PackGraph, node: fx.Node, inner: Sequence[Any], outer: Sequence[Any], where: Coordinates
) -> list[Expr]:
    """Coordinates in a tensor of shape ``inner`` of the element at ``where`` in its view of shape ``outer``."""
    left, right = [n for n, s in enumerate(inner) if s != 1], [n for n, s in enumerate(outer) if s != 1]
    read_at: list[Expr] = [ZERO] * len(inner)
    while left or right:
        group_in, group_out = _matching_axes(graph, node, inner, outer, left, right)
        flat: Expr = where[group_out[0]]
        for axis in group_out[1:]:
            flat = Op("add", (Op("mul", (flat, Const(outer[axis]))), where[axis]))
        for axis in reversed(group_in[1:]):
            read_at[axis] = Op("remainder", (flat, Const(inner[axis])))
            flat = Op("floordiv", (flat, Const(inner[axis])))
        read_at[group_in[0]] = flat
    return [simplify(w) for w in read_at]


def _matching_axes(
    graph: PackGraph, node: fx.Node, inner: Sequence[Any], outer: Sequence[Any], left: list[int], right: list[int]
) -> tuple[list[int], list[int]]:
    """Pop the shortest leading runs of axes that hold the same elements on both sides."""
    if not left or not right:
        raise Opaque(node, "a view whose axes do not match")
    group_in, group_out = [left.pop(0)], [right.pop(0)]
    sizes = [inner[group_in[0]], outer[group_out[0]]]
    if all(graph.is_length(size) for size in sizes):
        return group_in, group_out
    if any(graph.mentions_length(size) for size in sizes):
        raise Opaque(node, "a view that merges or splits the token axis")
    while sizes[0] != sizes[1]:
        side, rest, group, shape = (0, left, group_in, inner) if sizes[0] < sizes[1] else (1, right, group_out, outer)
        if not rest or graph.mentions_length(shape[rest[0]]):
            raise Opaque(node, "a view that merges or splits the token axis")
        group.append(rest.pop(0))
        sizes[side] *= shape[group[-1]]
    return group_in, group_out


VIEWS = (
    "contiguous", "clone", "detach", "alias", "lift_fresh_copy", "transpose", "swapaxes", "swapdims", "t", "mT",
    "numpy_T", "permute", "expand", "expand_as", "broadcast_to", "slice", "select", "view", "reshape",
    "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel",
)  # fmt: skip
"""Families that only rearrange: cheaper to read through than to compute."""
