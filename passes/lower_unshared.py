"""lower unshared: the marker of an unshared module becomes its call on unpacked rows.

before    unshared([x, mask], "layers.0.mamba", output 0)
after     repack(layers.0.mamba(unpack(x, rows), mask)[0], copies)
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ..runtime import ops
from .base import PackGraph, argument
from .unshare import Axes, UnsharedCall, is_row_per_token, markers_by_call, stays_on_rows

__all__ = ["lower_unshared"]


def lower_unshared(graph: PackGraph) -> list[str]:
    """Replace the markers; returns one line for each call."""
    markers = markers_by_call(graph)
    on_rows: dict[fx.Node, fx.Node] = {}
    for name, nodes in markers.items():
        _replace(graph, graph.unshared[name], nodes, on_rows)
    return [f"{graph.unshared[name].path}: itself, on unpacked rows" for name in markers]


def _replace(graph: PackGraph, call: UnsharedCall, markers: list[fx.Node], on_rows: dict[fx.Node, fx.Node]) -> None:
    """Replace the markers of one call; ``on_rows`` holds the values that stay on rows, by their markers."""
    unpack, repack = ops.row_functions()
    target = f"unshared_{len([n for n in graph.graph.nodes if n.op == 'call_module'])}"
    graph.module.add_submodule(target, call.module)
    first = markers[0]
    with graph.graph.inserting_before(first):
        inputs = []
        for source, axes in zip(argument(first, "inputs"), call.inputs, strict=True):
            if source in on_rows:
                inputs.append(on_rows[source])
            elif is_row_per_token(axes) and any(graph.is_length(size) for size in source.meta["val"].shape):
                inputs.append(_along(graph, unpack, source, "rows", axes, first))
            else:
                inputs.append(source)
        results = graph.graph.call_module(target, tuple(inputs))
    results.meta = {key: value for key, value in first.meta.items() if key != "val"}
    for marker in markers:
        place = argument(marker, "output")
        stays = stays_on_rows(graph, marker)
        with graph.graph.inserting_before(marker):
            row_value = graph.graph.call_function(operator.getitem, (results, place))
            row_value.meta = dict(results.meta)
            if stays:
                on_rows[marker] = row_value
                continue
            back = _along(graph, repack, row_value, "copies", call.outputs[place], marker)
        back.meta["val"] = marker.meta["val"]
        marker.replace_all_uses_with(back)


def _along(graph: PackGraph, function: Any, source: fx.Node, index: str, axes: Axes, like: fx.Node) -> fx.Node:
    (token_axis,) = axes.tokens
    node = graph.graph.call_function(function, (source, graph.layout(index), token_axis, axes.batch))
    node.meta = {key: value for key, value in like.meta.items() if key != "val"}
    return node
