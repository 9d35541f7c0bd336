"""Layouts for the tests of attention: forests drawn as nested tuples."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ppcompile.runtime.ops import Layout

Tree = tuple[int, Sequence[Any]]
"""Length of a segment, and its children."""

FORESTS: dict[str, tuple[Sequence[Tree], int]] = {
    "one sequence": ([(23, [])], 0),
    "one response": ([(9, [(14, [])])], 0),
    "two responses": ([(20, [(7, []), (12, [])])], 0),
    "nine unequal responses": ([(11, [(n, []) for n in (3, 9, 1, 14, 2, 2, 7, 20, 5)])], 0),
    "groups in a row": ([(15, [(6, []), (9, [])]), (4, [(11, []), (3, [])]), (30, [(2, []), (8, []), (5, [])])], 6),
    "three levels": ([(6, [(9, [(4, []), (12, [(3, []), (5, [])])]), (7, [])]), (3, [(8, [(10, []), (2, [])])])], 0),
    "segments of one slot": ([(1, [(1, []), (1, [(1, []), (1, [])])]), (1, []), (1, [(1, [])])], 1),
}
"""``(trees, padding slots)`` by name, small enough for dense comparisons."""

LONG_FOREST = (
    [(300, [(40, []), (220, []), (1, [])]), (7, [(5, [(3, []), (9, [])]), (170, [])]), (90, [(260, [])])],
    13,
)
"""Crosses every limit of the cascade's tiles, with short segments in between."""


def build_layout(trees: Sequence[Tree], padding: int = 0) -> Layout:
    """The layout tensors of a forest. Written independently of ``runtime.forest``, as a check on both."""
    segments: list[list[int]] = []
    positions: list[int] = []

    def visit(tree: Tree, parent: int, position: int) -> None:
        length, children = tree
        mine = len(segments)
        segments.append([len(positions), len(positions) + length, 0, parent])
        positions.extend(range(position, position + length))
        for child in children:
            visit(child, mine, position + length)
        segments[mine][2] = len(positions)

    for tree in trees:
        visit(tree, -1, 0)
    if padding:
        stop = len(positions) + padding
        segments.append([len(positions), stop, stop, -1])
        positions.extend([0] * padding)
    subtree_end = torch.cat([torch.full((stop - start,), end) for start, stop, end, _ in segments])
    return Layout(torch.tensor([positions]), subtree_end, torch.tensor(segments))


@pytest.fixture(params=FORESTS.keys())
def layout(request) -> Layout:
    return build_layout(*FORESTS[request.param])


@pytest.fixture
def long_layout() -> Layout:
    return build_layout(*LONG_FOREST)


@pytest.fixture
def make_layout() -> Callable[..., Layout]:
    return build_layout
