"""What an expert dispatch is made of.

A region (``region.py``) is accepted as a whole after a numerical proof. Numbers alone can be fooled: by a mean over
tokens behind a gate that starts at zero, by a maximum that random tokens never reach. So a region may hold only ops
that sort, count, gather and scatter tokens, multiply them in groups, or act inside a token; whatever combines *values*
along an axis as long as the row is foreign to a dispatch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .base import PackGraph, argument, is_size, op_family, op_name, operands, shape_of

__all__ = ["foreign_op"]

_MOVES = frozenset({
    "arange", "sort", "argsort", "topk", "histc", "bincount", "one_hot", "nonzero", "index", "index_select",
    "index_put", "index_put_", "index_add", "index_add_", "scatter", "scatter_", "scatter_add", "scatter_add_",
    "gather", "embedding",
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "transpose", "permute", "t",
    "expand", "expand_as", "repeat", "repeat_interleave", "slice", "select", "narrow", "chunk", "split",
    "split_with_sizes", "unbind", "getitem", "cat", "concat", "stack", "pad", "to", "_to_copy", "type_as", "contiguous",
    "clone", "detach", "alias", "lift_fresh_copy", "masked_fill", "masked_fill_", "where", "dropout",
})  # fmt: skip
_MAKES = frozenset({
    "empty", "empty_like", "zeros", "zeros_like", "ones", "ones_like", "full", "full_like", "new_zeros", "new_ones",
    "new_full", "new_empty", "scalar_tensor",
})  # fmt: skip
_ALONG_AN_AXIS = frozenset(
    {"sum", "softmax", "_softmax", "log_softmax", "cumsum", "mean", "amax", "max", "argmax", "norm", "any"}
)
_POINTWISE = frozenset({
    "relu", "silu", "gelu", "softplus", "clamp", "rsub", "floor_divide", "remainder", "div_", "mul_", "add_", "sub_",
})  # fmt: skip
"""Pointwise ops that torch does not tag as such."""
_GROUPED = ("grouped_mm", "_grouped_mm")
_PRODUCTS = frozenset({"matmul", "mm", "bmm"})


def foreign_op(graph: PackGraph, nodes: Sequence[fx.Node]) -> str | None:
    """What does not belong in a dispatch, or ``None``."""
    for node in nodes:
        if not _belongs(graph, node):
            return f"it has {op_name(node)}"
    return None


def _belongs(graph: PackGraph, node: fx.Node) -> bool:
    family = op_family(node)
    if is_size(node) or family in _MOVES or family in _MAKES or _is_grouped_product(node):
        return True
    if family == "sum" and _says_how_many(node):
        return True
    if family in _ALONG_AN_AXIS:
        return not any(graph.mentions_length(size) for size in _combined_sizes(node))
    if family in _PRODUCTS:
        return not graph.mentions_length(shape_of(operands(node)[0])[-1])
    if family in ("linear", "addmm"):
        return True  # the contracted axis is that of a weight
    if family in ("layer_norm", "rms_norm"):
        return not any(graph.mentions_length(size) for size in argument(node, "normalized_shape"))
    return _is_pointwise(node)


def _is_grouped_product(node: fx.Node) -> bool:
    return any(name in op_name(node) for name in _GROUPED)


def _is_pointwise(node: fx.Node) -> bool:
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return True
    return op_family(node) in _POINTWISE


def _says_how_many(node: fx.Node) -> bool:
    """True for counts that become sizes, of the groups that tokens are split into, and nothing else."""
    if is_size(node):
        return True
    moved = op_family(node) in ("sum", "select", "unbind", "getitem", "to", "_to_copy")
    value = node.meta["val"]
    whole = not any(part.is_floating_point() for part in (value if isinstance(value, (list, tuple)) else [value]))
    return moved and whole and all(map(_says_how_many, node.users))


def _combined_sizes(node: fx.Node) -> list[Any]:
    """Sizes of the axes along which values are combined; all of them where no axis is given."""
    shape = shape_of(operands(node)[0])
    axes = argument(node, "dim", None)
    if axes is None or axes == []:
        return list(shape)
    return [shape[axis] for axis in (axes if isinstance(axes, (list, tuple)) else [axes])]
