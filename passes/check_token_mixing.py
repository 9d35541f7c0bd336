"""check token mixing: the proof, on the graph that will execute.

Every node gets a token type (``passes.types``). A node that has none, and lies inside a module that as a whole maps
tokens to tokens (an expert layer that sorts tokens by expert and puts them back), may still be safe: the module's part
of the graph is then run on random tokens and must commute with permuting them and with leaving some out.
"""

from __future__ import annotations

import dataclasses

from torch import fx

from .base import NotPackable, PackGraph, PassResult, Refusal, is_mutable, module_path, output_node
from .infer import infer, input_types
from .positional import PositionalValues
from .region import Region, enclosing_regions, prove_token_wise
from .types import Const, Mixes, Tok, TokenType

__all__ = ["check_token_mixing"]


def check_token_mixing(graph: PackGraph) -> PassResult:
    """Type every node.

    Raises:
        NotPackable: at the first node that lets a slot see what it must not, or that has no rule.
    """
    result = PassResult("check_token_mixing")
    types = input_types(graph)
    covered: set[fx.Node] = set()
    positional = PositionalValues(graph)
    # What is made of slots' indices alone, and the node to blame for it: harmless until tokens read it.
    indices: dict[fx.Node, tuple[fx.Node, Mixes]] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":  # the body of a higher-order op, for which there is no rule
            types[node] = Const()
        if node.op != "call_function" or node in covered:
            continue
        read = next((source for source in node.all_input_nodes if source in indices), None)
        origin, kind = indices[read] if read is not None else (node, infer(graph, node, types))
        if isinstance(kind, Mixes) and not positional.depends_on_tokens(node) and not is_mutable(node):
            indices[node] = origin, kind
        elif isinstance(kind, Mixes):
            region = _proved_region(graph, node, origin, kind, types)
            result.matched.append(str(region))
            covered |= region.members
            types.update(region.types())
        else:
            types[node] = kind
    if graph.branches:
        raise NotPackable(graph.branches[0])
    final = types.get(output_node(graph.graph))
    if final != Tok(0):
        raise NotPackable(
            Refusal.at(output_node(graph.graph), f"the result is {final}, not one value per scored token")
        )
    return result


def _proved_region(
    graph: PackGraph, node: fx.Node, origin: fx.Node, why: Mixes, types: dict[fx.Node, TokenType]
) -> Region:
    """The smallest module around ``node`` that is proved token-wise; refuses ``origin`` if there is none."""
    findings = []
    for region in enclosing_regions(graph, node, types):
        finding = prove_token_wise(graph, region)
        if finding is None:
            return region
        findings.append(finding)
    reason = "; ".join((why.reason, *findings[:1]))
    hint = "if the op is token-wise, passes/types.py says where its rule belongs"
    raise NotPackable(dataclasses.replace(Refusal.at(origin, reason, hint), module=module_path(node)))
