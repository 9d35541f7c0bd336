"""infer: the token type of a node from the types of its inputs.

What holds for every op is checked here, once, so that no rule can forget it: nothing is overwritten, no *value* depends
on the number of tokens, and a tensor of tokens has one axis of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from . import rules_layout, rules_lookup, rules_math
from .base import PackGraph, argument, input_nodes, is_mutable, is_size, op_family, op_name, operands, shape_of
from .types import RULES, Const, Mixes, Rows, Tok, TokenType, Tuple, Types
from .unshare import is_marker

__all__ = ["infer", "input_types"]

_RULE_FILES = (rules_layout, rules_lookup, rules_math)  # importing them fills RULES

_SIZES = ("size", "shape", "sizes", "repeats")
"""Arguments that say how large a result is, not what is in it."""


def input_types(graph: PackGraph) -> dict[fx.Node, TokenType]:
    """Types of the graph's inputs: the model's state is constant, the layout holds one value per slot."""
    tokens = {"input_ids": Tok(1), "position_ids": Tok(1), "subtree_end": Tok(0), "targets": Tok(0)}
    return {node: tokens.get(node.name, Const()) for node in input_nodes(graph.graph)}


def infer(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    """Type of ``node`` from the types of its inputs, or how it mixes tokens."""
    if any(types[source] == Rows() for source in node.all_input_nodes) and not is_marker(node):
        return Mixes(f"{op_name(node)} reads what a module on unpacked rows does not return one row per token")
    reads_tokens = any(isinstance(types[source], (Tok, Tuple)) for source in node.all_input_nodes)
    if is_mutable(node):
        return Mixes(f"{op_name(node)} overwrites a tensor that other parts of the model may still read")
    if is_size(node):
        return Mixes("a number computed from the tokens") if reads_tokens and not _is_shape(node) else Const()
    kind = _checked(graph, node, _by_rule(graph, node, types)) if reads_tokens else _from_constants(graph, node)
    if not isinstance(kind, Mixes) and _value_depends_on_length(graph, node):
        return Mixes(f"{op_name(node)} computes with the number of tokens in the row")
    return kind


def _is_shape(node: fx.Node) -> bool:
    return op_family(node).startswith("sym_") and "item" not in op_family(node)


def _by_rule(graph: PackGraph, node: fx.Node, types: Types) -> TokenType | Mixes:
    family = op_family(node)
    if family in RULES:
        return RULES[family](graph, node, types)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return rules_math.pointwise(graph, node, types)
    return Mixes(f"there is no typing rule for {op_name(node)}, so it cannot be proved to keep tokens apart")


def _checked(graph: PackGraph, node: fx.Node, kind: TokenType | Mixes) -> TokenType | Mixes:
    """``kind``, if the value has the axis of tokens that it says, and no other."""
    if isinstance(kind, (Mixes, Rows)):
        return kind
    value = node.meta["val"]
    parts = zip(value, kind.items, strict=True) if isinstance(kind, Tuple) else [(value, kind)]
    for part, its_kind in parts:
        expected = (its_kind.axis,) if isinstance(its_kind, Tok) else ()
        if _axes_of_tokens(graph, part) != expected:
            shape = ", ".join(str(size) for size in part.shape)
            return Mixes(f"{op_name(node)} makes [{shape}], which is not one value per token")
    return kind


def _axes_of_tokens(graph: PackGraph, value: Any) -> tuple[int, ...]:
    """Axes whose size depends on the number of tokens; -1 stands for one that is not that number itself."""
    axes = []
    for axis, size in enumerate(value.shape):
        if graph.is_length(size) or graph.is_scored(size):
            axes.append(axis)
        elif graph.mentions_length(size):
            axes.append(-1)
    return tuple(axes)


def _value_depends_on_length(graph: PackGraph, node: fx.Node) -> bool:
    """True if T enters the values: ``x / T``, ``full([], T)``, ``table[T - 1]``. Sequences have other lengths."""
    sizes = [argument(node, name, None) for name in _SIZES]
    values = [arg for arg in operands(node) if not any(arg is size for size in sizes)]
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return any(graph.mentions_length(source.meta.get("val")) for source in found)


def _from_constants(graph: PackGraph, node: fx.Node) -> TokenType | Mixes:
    """No tokens go in. A token axis that comes out must hold the same in every slot: no op may count slots."""
    if not any(graph.mentions_length(size) or graph.is_scored(size) for size in shape_of(node)):
        return Const()
    axes = graph.token_axes(node)
    if op_family(node) in rules_math.FILLS or op_family(node) in ("expand", "repeat"):
        # A constant has no axis of T tokens, so what expand or repeat makes one of has the size 1 there.
        return _checked(graph, node, Tok(axes[0])) if axes else Mixes(f"{op_name(node)} multiplies the tokens")
    return Mixes(f"{op_name(node)} makes values that depend on the slot's index in the row")
