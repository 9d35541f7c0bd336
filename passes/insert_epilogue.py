"""insert epilogue: the logits become log-probabilities of the scored tokens.

before    hidden [1,T,C] ── head (linear, scale, softcap, ...) ── logits [1,T,V]
after     hidden [1,T,C] ── index_select(predecessors) [U,C] ── token_logps(head program, targets) [U]

The head is everything between the contraction that makes the vocabulary axis and the output. It is carried over as a
program on rows, which the epilogue runs in chunks: no ``[T, V]`` or ``[U, V]`` tensor exists, forward or backward.
"""

from __future__ import annotations

import torch
from torch import fx

from ..runtime import ops
from .base import PackGraph, PassResult, output_node, shape_of
from .head import read_head
from .pooling import pool_epilogue

__all__ = ["EPILOGUES", "insert_epilogue"]

aten = torch.ops.aten


EPILOGUES = ("scores", "logits")


def insert_epilogue(graph: PackGraph, *, epilogue: str = "scores") -> PassResult:
    """Replace the logits by ``token_logps``; of a model that returns one value per sequence, take that per sequence.

    Args:
        graph: a graph that returns logits ``[1, T, V]``, or one value per sequence ``[1, K]``.
        epilogue: ``"scores"`` as above, or ``"logits"`` to return the logits of every slot, ``[T, V]``.

    Raises:
        NotPackable: the logits are not a row-wise function of one hidden state per token.
    """
    logits = output_node(graph.graph)
    output = next(n for n in reversed(graph.graph.nodes) if n.op == "output")
    if not any(graph.mentions_length(size) for size in shape_of(logits)):
        return pool_epilogue(graph, logits, output)
    if epilogue == "logits":
        return _keep_logits(graph, logits, output)
    with graph.graph.inserting_before(output):
        head = read_head(graph, logits)
        (axis,) = graph.token_axes(head.hidden)
        rows = graph.call(aten.index_select.default, (head.hidden, axis, graph.layout("predecessors")), like=logits)
        if len(shape_of(rows)) != 2:
            rows = graph.call(aten.reshape.default, (rows, [-1, int(shape_of(head.hidden)[-1])]), like=logits)
        arguments = (rows, graph.layout("targets"), head.captures, head.program)
        scored = graph.call(ops.token_logps._opoverload, arguments, like=logits)
        output.args = ((graph.item(scored, 0),),)
    graph.finish()
    return PassResult("insert_epilogue", [f"head: {head.program}"], 1)


def _keep_logits(graph: PackGraph, logits: fx.Node, output: fx.Node) -> PassResult:
    with graph.graph.inserting_before(output):
        rows = graph.call(aten.reshape.default, (logits, [-1, int(shape_of(logits)[-1])]), like=logits)
        output.args = ((rows,),)
    graph.finish()
    return PassResult("insert_epilogue", ["logits of every slot, as asked for"], 1)
