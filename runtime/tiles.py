"""Which rectangles of the score matrix hold visible pairs: the tile plan of an exact, block-wise attention.

Row ranges are packed slots of queries, column ranges packed slots of keys. A forest in depth-first order
makes the plan short: a segment ``[a, b)`` with subtree end ``e`` is seen causally by itself and entirely
by ``[b, e)``::

            a     b        e
        a   ##                         # = CAUSAL (cut into a staircase of CAUSAL and FULL tiles)
        b   FFF   ##                   F = FULL   (nothing hidden, no mask needed)
            FFF   ..##                 . = hidden: siblings, in no tile

A sliding window is measured in logical positions. They grow by one inside a segment, so each tile is cut
by interval arithmetic into hidden keys (dropped), partly visible keys (``MASKED``) and visible keys
(``FULL``); no mask is looked at to make the plan. A segment whose positions stand still is padding: with a
window its tiles are ``MASKED``, which is right whatever the positions are.
"""

from __future__ import annotations

import bisect
import enum
import functools
import itertools
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Grain", "Kind", "Plan", "Tile", "plan_tiles"]


class Kind(enum.Enum):
    """What a tile hides."""

    CAUSAL = "causal"
    """Query and key range coincide; slot ``j`` is visible iff ``j <= i``."""
    FULL = "full"
    """Every pair is visible."""
    MASKED = "masked"
    """Forest and window must be evaluated for each pair."""


class Tile(NamedTuple):
    """Queries ``[q0, q1)`` on keys ``[k0, k1)``."""

    q0: int
    q1: int
    k0: int
    k1: int
    kind: Kind


class Grain(NamedTuple):
    """How finely to cut.

    Attributes:
        rows: largest edge of a tile on the diagonal, at most ``query_limit``.
        query_limit: most queries of a tile whose mask or scores are materialized.
        key_limit: most keys of such a tile.
        fuse: neighbouring segments of at most this many slots together share one MASKED tile on the
            diagonal, because many small kernel calls cost more than the hidden pairs of one.
        whole: leave FULL tiles whole, for a kernel that materializes nothing.
    """

    rows: int
    query_limit: int
    key_limit: int
    fuse: int
    whole: bool


@dataclass(frozen=True)
class Plan:
    """Tiles that together cover each visible pair exactly once.

    Attributes:
        diagonal: square tiles that cover each slot exactly once, both as query and as key. Their results
            can be *written*; those of ``others`` must be merged in (and their gradients added).
        others: the tiles off the diagonal.
    """

    diagonal: tuple[Tile, ...]
    others: tuple[Tile, ...]


class _Segment(NamedTuple):
    """One row of ``segments``, with what the plan needs to know about its positions."""

    start: int
    stop: int
    subtree_end: int
    position: int
    """Logical position of the first slot."""
    counts: bool
    """True where positions grow by one from slot to slot."""


def plan_tiles(segments: Tensor, position_ids: Tensor, window: int, grain: Grain) -> Plan:
    """The tile plan of a pack.

    Args:
        segments: int64 ``[S, 4]`` on the host, see :class:`runtime.ops.Layout`.
        position_ids: int64 ``[1, T]``, looked at only where there is a window.
        window: visible iff ``q - k < window`` in logical positions; 0 for no window.
        grain: how finely to cut.

    Returns:
        A plan, cached by the *content* of what it reads, so that the layers of a model and its backward
        share it and it is never stale.
    """
    edges = torch.stack([segments[:, 0], segments[:, 1] - 1])
    # Without a window positions decide nothing: the plan of any positions will do.
    positions = position_ids[0, edges.to(position_ids.device)].cpu() if window else edges
    content = torch.cat([segments[:, :3], positions.T], dim=1).numpy().tobytes()
    return _cached_plan(content, window, grain)


@functools.lru_cache(maxsize=128)
def _cached_plan(content: bytes, window: int, grain: Grain) -> Plan:
    rows = struct.iter_unpack("5q", content)
    forest = [_Segment(a, b, end, first, last - first == b - 1 - a) for a, b, end, first, last in rows]
    if window:
        # Edges of about half a window waste least: the visible band is cut into diagonal, masked and full parts.
        grain = grain._replace(rows=min(grain.rows, max(64, window // 2)))
    runs = list(_runs(forest, min(grain.fuse, grain.rows)))
    diagonal = tuple(tile for run in runs for tile in _diagonal(run, window, grain))
    found = [tile for run in runs for segment in run for tile in _below(segment, run[-1].stop, forest, window, grain)]
    others = tuple(part for tile in _coalesce(found) for part in _cut(tile, grain))
    return Plan(diagonal, others)


def _blocks(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut ``[start, stop)`` into the fewest pieces of at most ``size``, as equal as possible."""
    count = -(-(stop - start) // size)
    edges = [start + (stop - start) * n // count for n in range(count + 1)]
    return itertools.pairwise(edges)


def _runs(forest: list[_Segment], size: int) -> Iterator[list[_Segment]]:
    """Group neighbouring segments, whatever their kinship, as long as they hold at most ``size`` slots together."""
    run: list[_Segment] = []
    for segment in forest:
        if run and segment.stop - run[0].start > size:
            yield run
            run = []
        run.append(segment)
    if run:
        yield run


def _diagonal(run: list[_Segment], window: int, grain: Grain) -> Iterator[Tile]:
    start, stop = run[0].start, run[-1].stop
    if len(run) > 1:
        yield Tile(start, stop, start, stop, Kind.MASKED)
        return
    for q0, q1 in _blocks(start, stop, grain.rows):
        hides = window and (window < q1 - q0 or not run[0].counts)
        yield Tile(q0, q1, q0, q1, Kind.MASKED if hides else Kind.CAUSAL)


def _below(segment: _Segment, done: int, forest: list[_Segment], window: int, grain: Grain) -> Iterator[Tile]:
    """Tiles off the diagonal on the keys of ``segment``: its own staircase, then descendants from slot ``done`` on."""
    for q0, q1 in _blocks(segment.start, segment.stop, grain.rows):
        yield from _rectangle(segment, segment, q0, q1, q0, window)
    if not window:
        yield from _rectangle(segment, segment, done, segment.subtree_end, segment.stop, window)
        return
    first, last = (bisect.bisect_left(forest, slot, key=lambda s: s.start) for slot in (done, segment.subtree_end))
    for child in forest[first:last]:
        for q0, q1 in _blocks(child.start, child.stop, grain.rows):
            yield from _rectangle(child, segment, q0, q1, segment.stop, window)


def _rectangle(child: _Segment, segment: _Segment, q0: int, q1: int, stop: int, window: int) -> Iterator[Tile]:
    """Queries ``[q0, q1)`` of ``child`` on the earlier keys of ``segment`` up to ``stop``."""
    partly = fully = start = segment.start
    if window and segment.counts and child.counts:
        distance = child.position + q0 - child.start - segment.position
        partly = min(max(start, start + distance - window + 1), stop)  # first key that query q0 sees
        fully = min(max(start, start + distance + (q1 - q0) - window), stop)  # first key that query q1 - 1 sees
    elif window:
        fully = stop
    if partly < fully and q0 < q1:
        yield Tile(q0, q1, partly, fully, Kind.MASKED)
    if fully < stop and q0 < q1:
        yield Tile(q0, q1, fully, stop, Kind.FULL)


def _coalesce(tiles: Iterable[Tile]) -> Iterator[Tile]:
    """Join FULL tiles on the same keys whose queries touch: one large kernel call instead of several."""
    last: Tile | None = None
    for tile in tiles:
        joins = last is not None and tile.kind is last.kind is Kind.FULL and last.q1 == tile.q0
        if last is not None and joins and last[2:] == tile[2:]:
            last = last._replace(q1=tile.q1)
            continue
        if last is not None:
            yield last
        last = tile
    if last is not None:
        yield last


def _cut(tile: Tile, grain: Grain) -> Iterator[Tile]:
    """Apply the limits of ``grain`` to one tile."""
    if grain.whole and tile.kind is Kind.FULL:
        yield tile
        return
    for q0, q1 in _blocks(tile.q0, tile.q1, grain.query_limit):
        for k0, k1 in _blocks(tile.k0, tile.k1, grain.key_limit):
            yield Tile(q0, q1, k0, k1, tile.kind)
