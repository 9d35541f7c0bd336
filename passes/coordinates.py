"""coordinates: where the rules of reading are filed.

A rule says how one element of an op's result is read through its inputs: ``rule(reader, node, where)`` returns the
element of ``node`` at ``where`` as an expression, reading inputs with ``reader.read`` and ``reader.value``. The rules
stand in ``pull_views`` (views and slices), ``pull_values`` (pointwise ops and sources) and ``pull_lookups`` (lookups
and sums along an axis).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import fx

from .base import PackGraph, Refusal, shape_of
from .expressions import Const, Expr, Op, Var, simplify
from .positional import PositionalValues

__all__ = [
    "READERS",
    "ZERO",
    "Coordinates",
    "Opaque",
    "ReadRule",
    "Reader",
    "only_coordinate",
    "reads",
    "score_coordinates",
]

Coordinates = tuple[Expr, ...]
ZERO = Const(0)


class Opaque(Exception):
    """A node whose elements cannot be expressed; carries the node and why."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason

    def refusal(self, what: str) -> Refusal:
        """Why the model cannot be packed: ``what`` could not be read."""
        hint = "if the op can be read element by element, passes/coordinates.py says where its rule belongs"
        return Refusal.at(self.node, f"{what}: {self.reason}", hint)


class Reader(Protocol):
    """What a rule reads its inputs with (``pull_back.PullBack``)."""

    graph: PackGraph
    positional: PositionalValues

    def read(self, node: fx.Node, where: Sequence[Expr]) -> Expr:
        """The element of ``node`` at ``where``, one coordinate for each axis."""

    def value(self, arg: Any, where: Coordinates = ()) -> Expr:
        """``arg`` broadcast against ``where``: a node, or a number that is what it is."""


ReadRule = Callable[[Reader, fx.Node, Coordinates], Expr]

READERS: dict[str, ReadRule] = {}
"""Op family (``base.op_family``) -> rule."""


def reads(*families: str) -> Callable[[ReadRule], ReadRule]:
    """File a function as the reading rule of these op families."""

    def register(function: ReadRule) -> ReadRule:
        for family in families:
            assert family not in READERS, f"two reading rules for {family}"
            READERS[family] = function
        return function

    return register


def score_coordinates(shape: Sequence[Any]) -> Coordinates:
    """Of a ``[..., T, T]`` tensor of scores: ``q`` and ``k``, and the leading axes as digits of the head ``h``."""
    sizes = [1 if size == 1 else int(size) for size in shape[:-2]]
    leading: list[Expr] = [ZERO] * len(sizes)
    rest: Expr = Var("h")
    significant = next((n for n, size in enumerate(sizes) if size != 1), None)
    for n in reversed(range(len(sizes))):
        if sizes[n] != 1:  # the most significant digit needs no remainder
            leading[n] = simplify(rest if n == significant else Op("remainder", (rest, Const(sizes[n]))))
            rest = Op("floordiv", (rest, Const(sizes[n])))
    return (*leading, Var("q"), Var("k"))


def only_coordinate(node: fx.Node, axis: int, name: str = "q") -> list[Expr]:
    """Zero on every axis of ``node`` but one, which is read at the position ``name``."""
    where: list[Expr] = [ZERO] * len(shape_of(node))
    where[axis] = Var(name)
    return where
