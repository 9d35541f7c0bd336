"""The tile plan covers exactly the visible pairs, whatever the forest, the window and the grain."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ppcompile.runtime.ops import Layout
from ppcompile.runtime.tiles import Grain, Kind, Plan, plan_tiles

GRAINS = {
    "fine": Grain(rows=4, query_limit=5, key_limit=3, fuse=3, whole=False),
    "fused": Grain(rows=16, query_limit=16, key_limit=16, fuse=16, whole=True),
    "coarse": Grain(rows=160, query_limit=256, key_limit=512, fuse=64, whole=True),
}
WINDOWS = [0, 1, 2, 7, 19, 1000]


def visible_pairs(layout: Layout, window: int) -> Tensor:
    """The definition, ``[T, T]``."""
    slot, position = torch.arange(layout.subtree_end.numel()), layout.position_ids[0]
    seen = (slot[None] <= slot[:, None]) & (slot[:, None] < layout.subtree_end[None])
    return seen & (position[:, None] - position[None] < window) if window else seen


def times_computed(plan: Plan, seen: Tensor) -> Tensor:
    """How often the tiles compute each pair, ``[T, T]``."""
    count = torch.zeros(seen.shape, dtype=torch.int64)
    for q0, q1, k0, k1, kind in (*plan.diagonal, *plan.others):
        part = torch.ones(q1 - q0, k1 - k0, dtype=torch.int64)
        if kind is Kind.CAUSAL:
            assert (q0, q1) == (k0, k1)
            part = part.tril()
        count[q0:q1, k0:k1] += part * seen[q0:q1, k0:k1] if kind is Kind.MASKED else part
    return count


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("grain", GRAINS.values(), ids=GRAINS.keys())
def test_every_visible_pair_once_and_no_other(layout, window, grain):
    seen = visible_pairs(layout, window)
    plan = plan_tiles(layout.segments, layout.position_ids, window, grain)
    assert torch.equal(times_computed(plan, seen), seen.long())


@pytest.mark.parametrize("window", [0, 50, 200])
@pytest.mark.parametrize("grain", GRAINS.values(), ids=GRAINS.keys())
def test_long_segments(long_layout, window, grain):
    seen = visible_pairs(long_layout, window)
    plan = plan_tiles(long_layout.segments, long_layout.position_ids, window, grain)
    assert torch.equal(times_computed(plan, seen), seen.long())


@pytest.mark.parametrize("grain", GRAINS.values(), ids=GRAINS.keys())
def test_positions_that_jump_are_masked(layout, grain):
    """No pack has them, but a plan must not trust positions that it has not understood."""
    jumping = replace(layout, position_ids=3 * layout.position_ids)
    seen = visible_pairs(jumping, 7)
    plan = plan_tiles(jumping.segments, jumping.position_ids, 7, grain)
    assert torch.equal(times_computed(plan, seen), seen.long())


@pytest.mark.parametrize("window", [0, 7])
def test_the_diagonal_covers_each_slot_once(layout, window):
    plan = plan_tiles(layout.segments, layout.position_ids, window, GRAINS["fine"])
    slots = [slot for q0, q1, k0, k1, _ in plan.diagonal for slot in range(q0, q1)]
    assert slots == list(range(layout.subtree_end.numel()))
    assert all((tile.q0, tile.q1) == (tile.k0, tile.k1) for tile in plan.diagonal)


def test_limits_hold(long_layout):
    grain = GRAINS["fine"]
    plan = plan_tiles(long_layout.segments, long_layout.position_ids, 100, grain)
    assert all(tile.q1 - tile.q0 <= grain.query_limit for tile in plan.others)
    assert all(tile.k1 - tile.k0 <= grain.key_limit for tile in plan.others)


def test_two_responses_cost_one_tile_off_the_diagonal(make_layout):
    layout = make_layout([(100, [(80, []), (90, [])])])
    plan = plan_tiles(layout.segments, layout.position_ids, 0, GRAINS["coarse"])
    assert [tile.kind for tile in plan.diagonal] == [Kind.CAUSAL] * 3
    assert plan.others == ((100, 270, 0, 100, Kind.FULL),)


def test_a_window_drops_hidden_tiles(make_layout):
    """Far responses do not visit the prompt's beginning: the tiles hold little more than the band."""
    layout = make_layout([(1000, [(500, []), (500, [])])])
    plan = plan_tiles(layout.segments, layout.position_ids, 64, GRAINS["coarse"])
    area = sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1, _ in (*plan.diagonal, *plan.others))
    assert area < 3 * 64 * 2000


def test_plans_are_cached_by_content(make_layout):
    one, same, other = (make_layout([(5, [(n, []), (3, [])])]) for n in (4, 4, 6))
    first = plan_tiles(one.segments, one.position_ids, 0, GRAINS["fine"])
    assert plan_tiles(same.segments, same.position_ids, 0, GRAINS["fine"]) is first
    one.segments.copy_(other.segments)  # the same tensor, other content
    assert plan_tiles(one.segments, one.position_ids, 0, GRAINS["fine"]) is not first
