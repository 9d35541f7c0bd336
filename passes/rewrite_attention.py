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
from .base import NotPackable, PackGraph, PassResult, Refusal, is_op, shape_of
from .expressions import to_program
from .site import Site, head_count

__all__ = ["rewrite_attention"]

aten = torch.ops.aten


def rewrite_attention(graph: PackGraph) -> PassResult:
    result = PassResult("rewrite_attention")
    for site in graph.sites:
        with graph.graph.inserting_before(site.output):
            packed = _packed_attention(graph, site)
        site.output.replace_all_uses_with(packed)
        result.matched.append(str(site))
        result.changed += 1
        site.output = packed
    graph.finish()
    return result


def _packed_attention(graph: PackGraph, site: Site) -> fx.Node:
    query = _as_heads(graph, site.query, site)
    key = _transposed(graph, site.key) if site.key_is_transposed else site.key
    key, value = _grouped_heads(graph, key, site), _grouped_heads(graph, site.value, site)
    key_heads = int(shape_of(key)[1])
    if key_heads != int(shape_of(value)[1]):
        key, value = _as_heads(graph, _transposed_key(graph, site), site), _as_heads(graph, site.value, site)
        key_heads = site.heads
    site.key_heads = key_heads
    captures: list[fx.Node] = []
    score, visible = to_program(site.meaning.score, captures), to_program(site.meaning.visible, captures)
    layout = [graph.layout(name) for name in ("position_ids", "subtree_end", "segments")]
    how = (captures, site.sinks, site.meaning.scale, score, visible, site.meaning.window, "reference")
    both = graph.call(ops.prefix_attention._opoverload, (query, key, value, *layout, *how), like=site.output)
    out = graph.item(both, 0)
    wanted = shape_of(site.output)
    if len(wanted) == 4 and wanted[0] == 1:
        return out
    shape = [-1 if graph.is_length(size) else int(size) for size in wanted]
    return graph.call(aten.reshape.default, (out, shape), like=site.output)


def _transposed_key(graph: PackGraph, site: Site) -> fx.Node:
    return _transposed(graph, site.key) if site.key_is_transposed else site.key


def _transposed(graph: PackGraph, node: fx.Node) -> fx.Node:
    """``[..., D, T] -> [..., T, D]``, which usually means taking the input of the model's own transpose."""
    rank = len(shape_of(node))
    if is_op(node, "aten.transpose") and {int(a) % rank for a in node.args[1:3]} == {rank - 2, rank - 1}:  # type: ignore[arg-type]
        return node.args[0]  # type: ignore[return-value]
    return graph.call(aten.transpose.int, (node, -2, -1), like=node)


def _as_heads(graph: PackGraph, node: fx.Node, site: Site) -> fx.Node:
    """``[..., T, D] -> [1, H, T, D]``."""
    shape = shape_of(node)
    if len(shape) == 4 and shape[0] == 1:
        return node
    return graph.call(aten.reshape.default, (node, [1, head_count(shape), -1, int(shape[-1])]), like=node)


def _grouped_heads(graph: PackGraph, node: fx.Node, site: Site) -> fx.Node:
    """Keys or values with as few heads as the model computed, ``[1, G, T, D]``."""
    base = _before_repetition(graph, node)
    grouped = _as_heads(graph, base, site)
    if site.heads % int(shape_of(grouped)[1]):
        reason = f"{site.heads} query heads cannot share {shape_of(grouped)[1]} key heads evenly"
        raise NotPackable(Refusal.at(site.output, reason))
    return grouped


def _before_repetition(graph: PackGraph, node: fx.Node) -> fx.Node:
    """Undo ``repeat_kv``: ``[1,G,T,D] -> unsqueeze(2) -> expand -> reshape -> [1,H,T,D]``, or repeat_interleave."""
    if is_op(node, "aten.repeat_interleave") and isinstance(node.args[1], int) and _axis(node, 2) in (1, -3):
        return node.args[0]  # type: ignore[return-value]
    if not is_op(node, "aten.reshape", "aten.view", "aten._unsafe_view"):
        return node
    expand: Any = node.args[0]
    if not is_op(expand, "aten.expand") or not is_op(expand.args[0], "aten.unsqueeze"):
        return node
    unsqueeze = expand.args[0]
    base, wide = unsqueeze.args[0], shape_of(expand)
    merged = len(wide) == 5 and int(unsqueeze.args[1]) % 5 == 2 and len(shape_of(node)) == 4
    if not merged or not all(graph.is_length(shape_of(n)[-2]) for n in (base, node)):
        return node
    kept = shape_of(base)[1] == wide[1] and shape_of(base)[3] == wide[4] and shape_of(node)[1] == wide[1] * wide[2]
    return base if kept else node


def _axis(node: fx.Node, position: int) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get("dim")
