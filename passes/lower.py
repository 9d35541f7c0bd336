"""lower: pick the attention backend of every site, for the device the model is on, and say why.

cpu     cascade    one kernel call per segment and one per its descendants, merged by log-sum-exp
cuda    flex       FlexAttention inside the graph, block lists computed from ``subtree_end`` by interval arithmetic
other   reference  a dense mask; runs anywhere
"""

from __future__ import annotations

from typing import Any

from torch import fx

from .base import PackGraph, PassResult, is_op
from .site import Site

__all__ = ["BACKENDS", "lower"]

BACKENDS = ("auto", "cascade", "flex", "reference")
_PREFERRED = {"cpu": "cascade"}


def lower(graph: PackGraph, *, backend: str = "auto") -> PassResult:
    """Set the backend of every site.

    Args:
        backend: ``"auto"`` for the best one of the device, or a name to insist on.

    Raises:
        ValueError: an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; accepted: {', '.join(BACKENDS)}")
    result = PassResult("lower")
    device = graph.layout("input_ids").meta["val"].device.type
    for site in graph.sites:
        site.backend, site.why = _choose(device, backend)
        _set_backend(site)
        result.matched.append(f"{site.module}: {site.backend}, {site.why}")
        result.changed += 1
    graph.finish()
    return result


def _choose(device: str, backend: str) -> tuple[str, str]:
    if backend != "auto":
        return backend, "asked for"
    chosen = _PREFERRED.get(device)
    return (chosen, f"best on {device}") if chosen else ("reference", f"no other backend runs on {device}")


def _set_backend(site: Site) -> None:
    attention = _attention_node(site.output)
    attention.args = (*attention.args[:-1], site.backend)


def _attention_node(node: fx.Node) -> fx.Node:
    """Up from a site's output through the view back to the model's shape."""
    current: Any = node
    while not is_op(current, "ppcompile.prefix_attention"):
        current = current.args[0]
    return current
