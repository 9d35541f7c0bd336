"""recognize attention: find every site, one recognizer per spelling.

Recognizers only read. Each module here has ``recognize(graph, node) -> Site | NoMatch | None``; a node that two of
them claim is an error in ppcompile, a node that one of them knows and cannot prove is a refusal of the model.
"""

from __future__ import annotations

from ..base import NotPackable, PackGraph, PassResult
from ..site import NoMatch
from . import sdpa, softmax

__all__ = ["RECOGNIZERS", "recognize_attention"]

RECOGNIZERS = {module.SPELLING: module.recognize for module in (sdpa, softmax)}


def recognize_attention(graph: PackGraph) -> PassResult:
    """Fill ``graph.sites``.

    Raises:
        NotPackable: an attention whose mask, score or shape cannot be proved to survive packing.
    """
    result = PassResult("recognize_attention")
    for node in graph.graph.nodes:
        found = {name: match for name, rule in RECOGNIZERS.items() if (match := rule(graph, node)) is not None}
        if len(found) > 1:
            raise RuntimeError(f"{node} is claimed by {', '.join(found)}")
        for match in found.values():
            if isinstance(match, NoMatch):
                raise NotPackable(match.refusal)
            graph.sites.append(match)
            result.matched.append(str(match))
    return result
