"""Token types, and where the typing rules of ops are filed.

A tensor of the packed graph is one of

    Const       no axis of tokens; the same for every token
    Tok(d)      axis ``d`` holds the tokens; what stands at slot t depends on slot t alone, or went through
                ``prefix_attention``, which is exact by its own definition
    Rows        what one module on rows of whole sequences hands to another; no op may read it

A rule takes an op and the types of its inputs and returns the type of its output, or a :class:`Mixes` that says how
the op would let one slot see another. The rules stand in ``rules_math`` (arithmetic), ``rules_layout`` (views, cuts and
joins) and ``rules_lookup`` (tables, attention, epilogues); ``infer`` applies them. To add one: find the kind whose
reason holds for the op and add its name there, or write a function and register it with :func:`rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx

from .base import PackGraph, is_tensor, operands, shape_of

__all__ = [
    "RULES",
    "Const",
    "Mixes",
    "Rows",
    "Rule",
    "Tok",
    "TokenType",
    "Tuple",
    "Types",
    "rule",
    "tensors_of",
    "type_of",
    "within_token",
]


@dataclass(frozen=True)
class Const:
    """No axis of tokens."""

    def __str__(self) -> str:
        return "Const"


@dataclass(frozen=True)
class Tok:
    """Axis ``axis`` holds the tokens; no other axis has a size that depends on their number."""

    axis: int

    def __str__(self) -> str:
        return f"Tok({self.axis})"


@dataclass(frozen=True)
class Rows:
    """Of whole sequences, not of the pack."""

    def __str__(self) -> str:
        return "Rows"


@dataclass(frozen=True)
class Tuple:
    """What a multi-output op returns."""

    items: tuple[TokenType, ...]


@dataclass(frozen=True)
class Mixes:
    """Why an op is not token-wise."""

    reason: str


TokenType: TypeAlias = "Const | Tok | Rows | Tuple"
Types = Mapping[fx.Node, TokenType]
Rule = Callable[[PackGraph, fx.Node, Types], "TokenType | Mixes"]

RULES: dict[str, Rule] = {}
"""Op family (``base.op_family``) -> rule."""


def rule(*families: str) -> Callable[[Rule], Rule]:
    """File a function as the rule of these op families."""

    def register(function: Rule) -> Rule:
        for family in families:
            assert family not in RULES, f"two typing rules for {family}"
            RULES[family] = function
        return function

    return register


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The tensors that ``node`` reads."""
    return [source for source in node.all_input_nodes if is_tensor(source)]


def type_of(arg: Any, types: Types) -> TokenType:
    """Type of an argument: numbers and absent tensors are the same for every token."""
    return types[arg] if isinstance(arg, fx.Node) else Const()


def within_token(node: fx.Node, types: Types, axes: Sequence[int], what: str) -> Tok | Mixes:
    """An op along ``axes`` of its first input leaves tokens apart if the token axis is none of them."""
    source = operands(node)[0]
    kind, rank = types[source], len(shape_of(source))
    if not isinstance(kind, Tok):
        return Mixes(f"{what} with tokens in an unexpected argument")
    if kind.axis in {axis % rank for axis in axes}:
        return Mixes(f"{what} over the tokens of the row")
    return kind
