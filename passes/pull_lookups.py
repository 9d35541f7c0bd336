"""Reading through lookups, where the coordinates are values themselves, and through sums along positions."""

from __future__ import annotations

import torch
from torch import fx

from .base import argument, axis_argument, is_tensor, operands, shape_of
from .coordinates import ZERO, Coordinates, Opaque, Reader, reads
from .expressions import Const, Expr, Op, Var, at, may_be_negative, simplify

_ANYWHERE = Var("n")
"""A coordinate of its own: what reads the same there reads the same at every place."""

_COUNTING = (torch.int64, torch.int32, torch.float32, torch.float64)


@reads("index")
def index(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``source[:, i, j]`` with tensors ``i`` and ``j``."""
    source, given = operands(node)
    indices = [*given, *[None] * (len(shape_of(source)) - len(given))]
    advanced = [axis for axis, i in enumerate(indices) if i is not None]
    if advanced != list(range(advanced[0], advanced[-1] + 1)):
        raise Opaque(node, "indices separated by slices")
    if any(indices[axis].meta["val"].dtype in (torch.bool, torch.uint8) for axis in advanced):
        raise Opaque(node, "a mask as an index")
    spread = max(len(shape_of(indices[axis])) for axis in advanced)
    first = advanced[0]
    values = [reader.value(indices[axis], where[first : first + spread]) for axis in advanced]
    return _looked_up(reader, node, source, (*where[:first], *values, *where[first + spread :]))


@reads("index_select")
def index_select(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """A lookup along one axis."""
    source, _, chosen = operands(node)
    axis = axis_argument(node, len(where))
    place = reader.read(chosen, (where[axis],))
    return _looked_up(reader, node, source, (*where[:axis], place, *where[axis + 1 :]))


@reads("embedding")
def embedding(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """A row of a table."""
    row = reader.read(argument(node, "indices"), where[:-1])
    return _looked_up(reader, node, argument(node, "weight"), (row, where[-1]))


@reads("gather")
def gather(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """A lookup along one axis, at a place for each element; on the other axes it reads where it writes."""
    source, _, chosen = operands(node)[:3]
    axis = axis_argument(node, len(where))
    place = reader.read(chosen, where)
    return _looked_up(reader, node, source, (*where[:axis], place, *where[axis + 1 :]))


@reads("scatter")
def scatter(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """Places that are written are known only once the row is."""
    raise Opaque(node, "each query sees the keys that it picks from the whole row (sparse attention)")


def _looked_up(reader: Reader, node: fx.Node, source: fx.Node, where: Coordinates) -> Expr:
    """``source`` at computed coordinates. A negative one counts from the end, which only a real table can do."""
    if not any(may_be_negative(w) for w in where):
        return reader.read(source, where)
    sizes = [reader.graph.mentions_length(size) for size in shape_of(source)]
    if any(sizes) or reader.positional.depends_on_tokens(source):
        raise Opaque(node, "a lookup at places that may be negative")
    return at(source, *where)


@reads("cumsum")
def cumsum(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """Of one number over and over: that number times how many there are."""
    source = operands(node)[0]
    axis = axis_argument(node, len(where))
    if reader.positional.depends_on_tokens(source) or node.meta["val"].dtype not in _COUNTING:
        raise Opaque(node, "a running sum over tokens, or in low precision")
    each = reader.read(source, (*where[:axis], _ANYWHERE, *where[axis + 1 :]))
    if not isinstance(each, Const):
        raise Opaque(node, "a running sum of different numbers")
    count = Op("add", (where[axis], Const(1)))
    return Op("mul", (count, Const(each.value + 0)))  # + 0: of booleans the sum is an integer


@reads("diff")
def diff(reader: Reader, node: fx.Node, where: Coordinates) -> Expr:
    """``x[n] - x[n-1]`` where one value stands before the first, so that the axis keeps its length."""
    source, before = operands(node)[0], argument(node, "prepend")
    axis = axis_argument(node, len(where))
    one_before = is_tensor(before) and shape_of(before)[axis] == 1
    if argument(node, "n") != 1 or argument(node, "append") is not None or not one_before:
        raise Opaque(node, "differences that change the number of tokens")
    if source.meta["val"].dtype == torch.bool:
        raise Opaque(node, "differences of truth values")

    def element(place: Expr) -> Expr:
        return reader.read(source, (*where[:axis], simplify(place), *where[axis + 1 :]))

    at_start = Op("sub", (element(ZERO), reader.read(before, where)))
    later = Op("sub", (element(where[axis]), element(Op("sub", (where[axis], Const(1))))))
    return Op("where", (Op("eq", (where[axis], ZERO)), at_start, later))
