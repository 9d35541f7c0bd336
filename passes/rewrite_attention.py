"""rewrite attention: every site becomes ``ppcompile::prefix_attention``.

before    query, key, value, mask ── sdpa or matmul..softmax..matmul ── output
after     query, key, value, layout ── prefix_attention(score program) ── output

Key and value heads that the model repeated for its kernel are taken before the repetition; the mask's nodes
are left without a reader and disappear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..runtime import ops
from .base import (
    NotPackable,
    PackGraph,
    PassResult,
    Refusal,
    argument,
    axis_argument,
    is_op,
    operands,
    shape_of,
)
from .expressions import to_program
from .site import Site, head_count

__all__ = ["rewrite_attention"]

aten = torch.ops.aten


def rewrite_attention(graph: PackGraph) -> PassResult:
    """Rewrite every site of ``graph.sites``.

    Raises:
        NotPackable: heads that cannot be laid out as the op wants them.
    """
    result = PassResult("rewrite_attention")
    for site in graph.sites:
        with graph.graph.inserting_before(site.output):
            packed = _packed_attention(graph, site)
        site.output.replace_all_uses_with(packed)
        result.matched.append(str(site))
        result.changed += 1
    graph.finish()
    return result


def _packed_attention(graph: PackGraph, site: Site) -> fx.Node:
    wanted = shape_of(site.output)
    if head_count(wanted) != site.heads:
        reason = f"values of {head_count(wanted)} heads for attention weights of {site.heads}"
        raise NotPackable(Refusal.at(site.output, reason))
    query = _all_heads(graph, site.query, wanted)
    whole_key = _transposed(graph, site.key) if site.key_is_transposed else site.key
    key, value = (_few_heads(graph, node, wanted) for node in (whole_key, site.value))
    if shape_of(key)[1] != shape_of(value)[1]:
        key, value = (_all_heads(graph, node, wanted) for node in (whole_key, site.value))
    site.key_heads = int(shape_of(key)[1])
    captures: list[fx.Node] = []
    score, visible = to_program(site.meaning.score, captures), to_program(site.meaning.visible, captures)
    layout = [graph.layout(name) for name in ("position_ids", "subtree_end", "segments")]
    how = (captures, site.sinks, site.meaning.scale, score, visible, site.meaning.window, "reference")
    both = graph.call(ops.prefix_attention._opoverload, (query, key, value, *layout, *how), like=site.output)
    site.attention = both
    out = graph.item(both, 0)
    if len(wanted) == 4 and wanted[0] == 1:
        return out
    return graph.call(aten.reshape.default, (out, graph.view_sizes(site.output)), like=site.output)


def _transposed(graph: PackGraph, node: fx.Node) -> fx.Node:
    """``[..., D, T] -> [..., T, D]``, which usually means taking the input of the model's own transpose."""
    rank = len(shape_of(node))
    if is_op(node, "aten.transpose"):
        source, *axes = operands(node)
        if {int(axis) % rank for axis in axes} == {rank - 2, rank - 1}:
            return source
    return graph.call(aten.transpose.int, (node, -2, -1), like=node)


# --------------------------------------------------------------------------- heads


def _all_heads(graph: PackGraph, node: fx.Node, wanted: tuple[Any, ...]) -> fx.Node:
    """``[..., T, D] -> [1, H, T, D]``, heads that are shared repeated."""
    leading = [int(size) for size in wanted[:-2]]
    if _leading(node, len(leading)) != leading:
        node = _expanded(graph, node, leading)
    return _as_heads(graph, node)


def _few_heads(graph: PackGraph, node: fx.Node, wanted: tuple[Any, ...]) -> fx.Node:
    """Keys or values with as few heads as the model computed, ``[1, G, T, D]``."""
    leading = [int(size) for size in wanted[:-2]]
    base = _before_repetition(graph, node)
    if _shares_in_groups(_leading(base, len(leading)), leading):
        return _as_heads(graph, base)
    return _all_heads(graph, node, wanted)


def _leading(node: fx.Node, rank: int) -> list[int]:
    """Leading axes of ``[..., T, D]``, filled up with 1 on the left."""
    own = [int(size) for size in shape_of(node)[:-2]]
    return [1] * (rank - len(own)) + own


def _shares_in_groups(own: list[int], leading: list[int]) -> bool:
    """True if query head ``h`` reads head ``h // (H // G)``: what is shared are the last axes of heads."""
    if len(own) == 2 and own[0] == leading[0] == 1:
        return leading[1] % own[1] == 0
    shared = [mine != all_of_them for mine, all_of_them in zip(own, leading, strict=True)]
    first = shared.index(True) if True in shared else len(own)
    return all(size == 1 for size in own[first:])


def _expanded(graph: PackGraph, node: fx.Node, leading: list[int]) -> fx.Node:
    own = shape_of(node)[:-2]
    if any(size not in (1, all_of_them) for size, all_of_them in zip(own[::-1], leading[::-1], strict=False)):
        groups = f"{list(map(int, own))} of {leading} heads"
        raise NotPackable(Refusal.at(node, f"keys and values that are shared in a way that is not known: {groups}"))
    return graph.call(aten.expand.default, (node, [*leading, -1, -1]), like=node)


def _as_heads(graph: PackGraph, node: fx.Node) -> fx.Node:
    """``[..., T, D] -> [1, heads, T, D]``."""
    shape = shape_of(node)
    if len(shape) == 4 and shape[0] == 1:
        return node
    return graph.call(aten.reshape.default, (node, [1, head_count(shape), -1, int(shape[-1])]), like=node)


def _before_repetition(graph: PackGraph, node: fx.Node) -> fx.Node:
    """Undo ``repeat_kv``: ``[1,G,T,D] -> unsqueeze(2) -> expand -> reshape -> [1,H,T,D]``, or repeat_interleave."""
    if len(shape_of(node)) != 4:
        return node
    if is_op(node, "aten.repeat_interleave"):
        base, repeats = operands(node)[:2]
        return base if isinstance(repeats, int) and argument(node, "dim", None) in (1, -3) else node
    if not is_op(node, "aten.reshape", "aten.view", "aten._unsafe_view"):
        return node
    expand: Any = operands(node)[0]
    unsqueeze: Any = operands(expand)[0] if is_op(expand, "aten.expand") else None
    if not is_op(unsqueeze, "aten.unsqueeze") or len(shape_of(expand)) != 5 or axis_argument(unsqueeze, 5) != 2:
        return node
    base = operands(unsqueeze)[0]
    before, wide, after = shape_of(base), shape_of(expand), shape_of(node)
    kept = before[0] == wide[0] == after[0] and before[1] == wide[1] and before[3] == wide[4] == after[3]
    merged = after[1] == wide[1] * wide[2] and all(graph.is_length(shape[-2]) for shape in (before, wide, after))
    return base if kept and merged else node
