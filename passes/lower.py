"""lower: pick the attention backend of every site, for the device the model is on, and say why.

cpu     cascade    one kernel call per segment and one per its descendants, merged by log-sum-exp
cuda    flex       FlexAttention inside the graph, block lists computed from ``subtree_end`` by interval arithmetic
other   reference  a dense mask; runs anywhere

``flex`` is not an op of its own: its sites become calls of plain torch code that ``torch.compile`` inlines,

before    prefix_attention(query, key, value, layout, how)[0]
after     flex_prefix_attention(query, key, value, layout, block_lists(layout, window), how)

with one ``block_lists`` for all sites that have the same window.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from ..runtime import ops
from .base import PackGraph, PassResult, shape_of
from .lower_unshared import lower_unshared
from .site import Site

__all__ = ["BACKENDS", "lower"]

BACKENDS = ("auto", "cascade", "flex", "reference")
_BLOCK = 128
_SMALLEST_FLEX_HEAD = 16
"""Inductor's FlexAttention kernels refuse smaller heads on CUDA."""


def lower(graph: PackGraph, *, backend: str = "auto") -> PassResult:
    """Set the backend of every site.

    Args:
        graph: the packed graph.
        backend: ``"auto"`` for the best one of the device, or a name to insist on.

    Raises:
        ValueError: an unknown name, or a backend that cannot run a site on the model's device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; accepted: {', '.join(BACKENDS)}")
    result = PassResult("lower")
    blocks: dict[int, list[fx.Node]] = {}
    for site in graph.sites:
        assert site.attention is not None, "rewrite_attention runs before lower"
        attention = site.attention
        site.backend, site.why = _choose(graph, attention, backend)
        attention.args = (*attention.args[:-1], site.backend)
        if site.backend == "flex":
            _to_flex(graph, site, attention, blocks)
        result.matched.append(f"{site.module}: {site.backend}, {site.why}")
        result.changed += 1
    unshared = lower_unshared(graph)
    result.matched += unshared
    result.changed += len(unshared)
    graph.finish()
    return result


def _choose(graph: PackGraph, attention: fx.Node, backend: str) -> tuple[str, str]:
    device = graph.layout("input_ids").meta["val"].device
    if device.type == "meta":
        return "reference", "no weights; flex on cuda, cascade on cpu"
    if backend != "auto":
        reason = _unsupported(attention, backend, device)
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot run this model: {reason}")
        return backend, "asked for"
    if device.type == "cpu":
        return "cascade", "best on cpu"
    reason = _unsupported(attention, "flex", device)
    return ("reference", reason) if reason else ("flex", f"best on {device.type}")


def _unsupported(attention: fx.Node, backend: str, device: Any) -> str | None:
    heads = [int(shape_of(node)[-1]) for node in attention.args[:3]]  # type: ignore[arg-type]
    if backend == "flex" and device.type == "cuda" and min(heads) < _SMALLEST_FLEX_HEAD:
        return f"FlexAttention needs heads of at least {_SMALLEST_FLEX_HEAD}, these have {min(heads)}"
    *_, sinks, scale, score, visible, window, _ = attention.args
    how = ops.Score(scale, score, visible, window, (), None if sinks is None else sinks.meta["val"])  # type: ignore[arg-type, union-attr]
    reason: str | None = ops.attention_backend(backend).unsupported(device, how, False)
    return reason


def _to_flex(graph: PackGraph, site: Site, attention: fx.Node, blocks: dict[int, list[fx.Node]]) -> None:
    query, key, value, position_ids, subtree_end, _, captures, sinks, *how = attention.args
    window = site.meaning.window
    if window not in blocks:
        blocks[window] = _block_lists(graph, position_ids, subtree_end, window)
    flex = ops.attention_backend("flex").flex_prefix_attention
    arguments = (query, key, value, position_ids, subtree_end, blocks[window], captures, sinks, *how[:-1])
    (out,) = (user for user in attention.users if user.args[1] == 0)
    with graph.graph.inserting_before(attention):
        node = graph.graph.call_function(flex, arguments)
    node.meta = dict(out.meta)
    out.replace_all_uses_with(node)
    site.attention = node


def _block_lists(graph: PackGraph, position_ids: Any, subtree_end: Any, window: int) -> list[fx.Node]:
    """The eight tensors of ``ppcompile::block_lists``, made right after the inputs that they are made from."""
    first = next(node for node in graph.graph.nodes if node.op != "placeholder")
    with graph.graph.inserting_before(first):
        lists = graph.call(ops.block_lists_op(), (position_ids, subtree_end, window, _BLOCK), like=first)
        return [graph.item(lists, n) for n in range(len(lists.meta["val"]))]
