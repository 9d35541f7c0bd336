"""Attention over a forest of prefixes on the CPU, tile by tile, no key copied and no block wasted.

Each segment attends causally to itself, its descendants attend to it without a mask, and the parts are
merged by log-sum-exp (Cascade Inference; FlashAttention-2, arXiv 2307.08691, gives the backward)::

    lse = logaddexp(lse_1, lse_2)        out = exp(lse_1 - lse) out_1 + exp(lse_2 - lse) out_2

Backward needs nothing but the merged output and log-sum-exp: with ``P = exp(s - lse)`` and
``delta = rowsum(grad_out * out)``, the gradient of the scores is ``P * (grad_out @ value^T - delta)`` on
each tile by itself.

Two kernels compute a tile:

- *flash*, torch's fused CPU kernel, where scores are plain. It takes grouped heads, forward and backward
  (``H != G``), returns the log-sum-exp, and takes an additive mask for the tiles that a window or a
  visibility program cuts through. It wants ``E == D`` and a unit stride along the head.
- *explicit*, where a score program stands between product and softmax, or ``E != D``: the scores of one
  tile in float32 (float64 for float64 input), pulled back with ``torch.func.vjp``.

Largest temporary: ``H * QUERY_LIMIT * KEY_LIMIT`` scores (a few of them), whatever the length of the pack.

Shapes: ``H`` query heads, ``G`` key/value heads, ``T`` slots, ``D`` head size, ``E`` value head size; of
one tile ``Q`` queries and ``K`` keys; ``N = H // G * Q`` the queries that share a key head.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import Layout, Score
from ..program import ALWAYS, PLAIN, compile_program
from ..tiles import Grain, Kind, Plan, Tile, plan_tiles

__all__ = ["KEY_LIMIT", "QUERY_LIMIT", "backward", "forward", "unsupported"]

QUERY_LIMIT, KEY_LIMIT = 256, 512
"""Most queries and keys of a tile whose scores or mask are materialized."""

DIAGONAL = 160
"""Edge of causal tiles. The flash kernel computes a square of up to 512 keys whole before it masks it, so
a staircase of causal and full tiles does less work; much smaller edges lose it to call overhead."""

WHOLE = Grain(DIAGONAL, QUERY_LIMIT, KEY_LIMIT, fuse=64, whole=True)
BOUNDED = Grain(DIAGONAL, QUERY_LIMIT, KEY_LIMIT, fuse=128, whole=False)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

NEVER = float("-inf")


def unsupported(device: torch.device, how: Score, needs_grad: bool) -> str | None:
    """Every score program runs here, with gradients, on the CPU."""
    return None if device.type == "cpu" else f"the cascade backend drives CPU kernels; the tensors are on {device}"


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: Score) -> tuple[Tensor, Tensor]:
    """See :func:`runtime.ops.prefix_attention`. Tiles are accumulated in float32 at least."""
    site = _Site(query, key, value, layout, how)
    out = torch.empty((1, site.heads, site.length, value.shape[-1]), dtype=site.wide)
    lse = torch.empty((1, site.heads, site.length), dtype=site.wide)
    for tile in site.plan.diagonal:
        tile_out, tile_lse = site.attend(tile)
        _queries(out, tile).copy_(tile_out)
        _queries(lse, tile).copy_(tile_lse)
    for tile in site.plan.others:
        if not site.hides_all(tile):
            _merge(_queries(out, tile), _queries(lse, tile), *site.attend(tile))
    if how.sinks is not None:
        _add_sinks(out, lse, how.sinks)
    return out.to(query.dtype), lse


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, layout: Layout, how: Score
) -> list[Tensor]:
    """See :func:`runtime.ops.prefix_attention_backward`.

    Every floating capture gets its gradient, whether it is wanted or not: the op cannot know.
    """
    pull = _Pull(_Site(query, key, value, layout, how), grad_out, (query, key, value), out, lse)
    for tile in pull.site.plan.diagonal:
        pull.write(tile)
    for tile in pull.site.plan.others:
        pull.add(tile)
    direct = [grad.to(query.dtype) for grad in (pull.dquery, pull.dkey, pull.dvalue)]
    return [*direct, pull.dsinks(), *pull.dcaptures()]


def _queries(tensor: Tensor, tile: Tile) -> Tensor:
    return tensor[:, :, tile.q0 : tile.q1]


def _keys(tensor: Tensor, tile: Tile) -> Tensor:
    return tensor[:, :, tile.k0 : tile.k1]


def _unit_stride(tensor: Tensor) -> Tensor:
    """The flash kernel reads rows of a head as if they were dense, and does not check."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _merge(out: Tensor, lse: Tensor, tile_out: Tensor, tile_lse: Tensor) -> None:
    """Fold one tile into the running output, in place. Rows that have seen no key yet have ``lse == -inf``."""
    share = torch.sigmoid(tile_lse - lse).nan_to_num_(nan=0.0)  # exp(tile_lse) / (exp(lse) + exp(tile_lse))
    out.lerp_(tile_out.to(out.dtype), share[..., None])
    torch.logaddexp(lse, tile_lse, out=lse)


def _add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> None:
    """A sink takes part in the denominator only: it scales each row down. In place."""
    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype)[None, :, None])
    out.mul_(torch.exp(lse - with_sink)[..., None])
    lse.copy_(with_sink)


class _Site:
    """One attention call: its tensors, its plan, and the kernels that compute a tile of it."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: Score) -> None:
        self.query, self.key, self.value = (_unit_stride(t) for t in (query, key, value))
        self.layout, self.how = layout, how
        self.heads, self.groups, self.length = query.shape[1], key.shape[1], query.shape[2]
        self.wide = torch.promote_types(query.dtype, torch.float32)
        self.fused = how.program == PLAIN and value.shape[-1] == query.shape[-1]
        grain = WHOLE if self.fused and how.visible == ALWAYS else BOUNDED
        self.plan: Plan = plan_tiles(layout.segments, layout.position_ids, how.window, grain)
        self._slot = torch.arange(self.length)
        self._head = torch.arange(self.heads)[:, None, None]

    def variables(self, tile: Tile) -> dict[str, Tensor]:
        """What score and visibility programs may read, broadcasting to ``[H, Q, K]``."""
        position, slot = self.layout.position_ids[0], self._slot
        return {
            "h": self._head,
            "q": position[None, tile.q0 : tile.q1, None],
            "k": position[None, None, tile.k0 : tile.k1],
            "i": slot[None, tile.q0 : tile.q1, None],
            "j": slot[None, None, tile.k0 : tile.k1],
        }

    def seen(self, tile: Tile) -> Tensor | None:
        """Bool broadcasting to ``[H, Q, K]``, or ``None`` where everything is visible.

        This is the definition, evaluated on one tile: what the plan knows already is left out.
        """
        where = self.variables(tile)
        seen: Tensor | None = None
        if tile.kind is not Kind.FULL:
            end = self.layout.subtree_end[None, None, tile.k0 : tile.k1]
            seen = (where["j"] <= where["i"]) & (where["i"] < end)
        if tile.kind is Kind.MASKED and self.how.window:
            near = where["q"] - where["k"] < self.how.window
            seen = near if seen is None else seen & near
        if self.how.visible == ALWAYS:
            return seen
        chosen = torch.as_tensor(compile_program(self.how.visible, tuple(where))(*where.values(), self.how.captures))
        return chosen if seen is None else seen & chosen

    def hides_all(self, tile: Tile) -> bool:
        """True where a visibility program leaves nothing of a tile: chunks, blocks of another modality."""
        if self.how.visible == ALWAYS:
            return False
        seen = self.seen(tile)
        return seen is not None and not bool(seen.any())

    def attend(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """Output ``[1, H, Q, E]`` and log-sum-exp ``[1, H, Q]`` of one tile; 0 and -inf for a row that sees nothing."""
        return self._attend_fused(tile) if self.fused else self._attend_explicit(tile)

    # ---- flash

    def mask(self, tile: Tile) -> tuple[bool, Tensor | None]:
        """``(is_causal, additive mask [1, H or 1, Q, K])`` for the flash kernel."""
        if self.how.visible == ALWAYS and tile.kind is not Kind.MASKED:
            return tile.kind is Kind.CAUSAL, None
        seen = self.seen(tile)
        if seen is None:
            return False, None
        seen = seen.expand(-1, tile.q1 - tile.q0, tile.k1 - tile.k0)
        return False, torch.zeros(seen.shape, dtype=self.wide).masked_fill_(~seen, NEVER)[None]

    def _attend_fused(self, tile: Tile) -> tuple[Tensor, Tensor]:
        causal, mask = self.mask(tile)
        query, key, value = _queries(self.query, tile), _keys(self.key, tile), _keys(self.value, tile)
        out, lse = _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=self.how.scale)
        sees_itself = tile.q0 == tile.k0 and self.how.visible == ALWAYS
        if mask is not None and not sees_itself:
            # The kernel reports 0 for a row without a visible key, which a merge would take for a key of score 0.
            lse = lse.masked_fill((mask == NEVER).all(-1), NEVER)
        return out, lse

    # ---- explicit

    def raw_scores(self, tile: Tile) -> Tensor:
        """``scale * <query, key>`` of one tile, ``[H, Q, K]``."""
        query_GND = self.by_group(_queries(self.query, tile)) * self.how.scale
        key_GKD = _keys(self.key, tile)[0].to(self.wide)
        return (query_GND @ key_GKD.mT).view(self.heads, tile.q1 - tile.q0, tile.k1 - tile.k0)

    def by_group(self, tensor: Tensor) -> Tensor:
        """``[1, H, Q, D]`` as ``[G, N, D]``: all queries that share a key head, in float32 at least."""
        return tensor[0].to(self.wide).reshape(self.groups, -1, tensor.shape[-1])

    def score(self, tile: Tile, raw_HQK: Tensor, captures: Sequence[Any]) -> Tensor:
        """The score program on one tile, nothing hidden yet."""
        where = self.variables(tile)
        program = compile_program(self.how.program, ("s", *where))
        return program(raw_HQK, *where.values(), captures).to(self.wide).expand_as(raw_HQK)

    def hide(self, tile: Tile, score_HQK: Tensor, hidden: float) -> Tensor:
        seen = self.seen(tile)
        return score_HQK if seen is None else score_HQK.masked_fill(~seen, hidden)

    def _attend_explicit(self, tile: Tile) -> tuple[Tensor, Tensor]:
        score_HQK = self.hide(tile, self.score(tile, self.raw_scores(tile), self.how.captures), NEVER)
        lse = torch.logsumexp(score_HQK, dim=-1)
        weight_GNK = _weights(score_HQK, lse).view(self.groups, -1, tile.k1 - tile.k0)
        out = weight_GNK @ _keys(self.value, tile)[0].to(self.wide)
        return out.view(1, self.heads, tile.q1 - tile.q0, -1), lse[None]


def _finite(lse: Tensor) -> Tensor:
    """Log-sum-exp of rows that see no key, made harmless: ``exp(-inf - 0) = 0``, ``exp(-inf - -inf)`` is NaN."""
    return lse.masked_fill(lse == NEVER, 0.0)


def _weights(score_HQK: Tensor, lse_HQ: Tensor) -> Tensor:
    return torch.exp(score_HQK - _finite(lse_HQ)[..., None])


class _Lookup:
    """A low-precision table held in float32, which reads as itself and whose gradient adds up in float32.

    Thousands of pairs may read one entry; in bfloat16 their sum stops growing after a few hundred.
    """

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        self.table, self.dtype = table, dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.table[index].to(self.dtype)


def _as_captured(wide: Tensor, n: int, how: Score) -> Tensor | _Lookup:
    """Capture ``n`` as the score program expects it, from its copy in float32 at least."""
    dtype = how.captures[n].dtype
    if wide.dtype == dtype:
        return wide
    named, looked_up = (len(re.findall(pattern, how.program)) for pattern in (rf"\bc{n}\b", rf"\bat\(c{n}\b"))
    return _Lookup(wide, dtype) if named == looked_up else wide.to(dtype)


class _Pull:
    """Gradients under accumulation: each tile of the plan is written (diagonal) or added (others) once."""

    def __init__(
        self, site: _Site, grad_out: Tensor, operands: tuple[Tensor, Tensor, Tensor], out: Tensor, lse: Tensor
    ) -> None:
        self.site = site
        # Slot-major once, or the kernel would make each tile so again.
        self.grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
        self.out, self.lse = _unit_stride(out), _finite(lse)
        self.dquery, self.dkey, self.dvalue = (torch.empty_like(t, dtype=site.wide) for t in operands)
        self.floating = [n for n, c in enumerate(site.how.captures) if c.is_floating_point()]
        wide = {n: torch.promote_types(site.how.captures[n].dtype, torch.float32) for n in self.floating}
        self.floats = {n: torch.zeros_like(site.how.captures[n], dtype=wide[n]) for n in self.floating}

    @functools.cached_property
    def delta(self) -> Tensor:
        """``rowsum(grad_out * out)``, ``[1, H, T]``."""
        return torch.linalg.vecdot(self.grad_out.to(self.site.wide), self.out.to(self.site.wide))

    def write(self, tile: Tile) -> None:
        for whole, part in zip(self._targets(tile), self._gradients(tile), strict=True):
            whole.copy_(part)

    def add(self, tile: Tile) -> None:
        if self.site.hides_all(tile):
            return
        for whole, part in zip(self._targets(tile), self._gradients(tile), strict=True):
            whole.add_(part)

    def _targets(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        return _queries(self.dquery, tile), _keys(self.dkey, tile), _keys(self.dvalue, tile)

    def _gradients(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        return self._gradients_fused(tile) if self.site.fused else self._gradients_explicit(tile)

    def _gradients_fused(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        site = self.site
        causal, mask = site.mask(tile)
        grad_out, query, out, lse = (_queries(t, tile) for t in (self.grad_out, site.query, self.out, self.lse))
        key, value = _keys(site.key, tile), _keys(site.value, tile)
        return _flash_backward(grad_out, query, key, value, out, lse, 0.0, causal, attn_mask=mask, scale=site.how.scale)

    def _gradients_explicit(self, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        site = self.site
        score_HQK, pull_score = self._score_and_pull(tile)
        score_HQK = site.hide(tile, score_HQK, NEVER)
        weight_HQK = torch.exp(score_HQK - _queries(self.lse, tile)[0][..., None])
        grad_GNE = site.by_group(_queries(self.grad_out, tile))
        value_GKE = _keys(site.value, tile)[0].to(site.wide)
        dweight_HQK = (grad_GNE @ value_GKE.mT).view_as(weight_HQK)
        dscore_HQK = dweight_HQK.sub_(_queries(self.delta, tile)[0][..., None]).mul_(weight_HQK)
        draw_GNK = pull_score(dscore_HQK).mul(site.how.scale).view(site.groups, -1, tile.k1 - tile.k0)
        dquery = draw_GNK @ _keys(site.key, tile)[0].to(site.wide)
        dkey = draw_GNK.mT @ site.by_group(_queries(site.query, tile))
        dvalue = weight_HQK.view_as(draw_GNK).mT @ grad_GNE
        return dquery.view(1, site.heads, -1, dquery.shape[-1]), dkey[None], dvalue[None]

    def _score_and_pull(self, tile: Tile):  # type: ignore[no-untyped-def]
        """The tile's scores, and the function that takes their gradient to that of ``scale * <query, key>``.

        It adds the gradients of captures on the way. ``torch.func``, not ``torch.autograd``: inside an op
        the autograd dispatch keys are switched off.
        """
        site, raw_HQK = self.site, self.site.raw_scores(tile)
        if site.how.program == PLAIN:
            return raw_HQK, lambda dscore: dscore

        def run(raw: Tensor, *wide: Tensor) -> Tensor:
            captures: list[Any] = list(site.how.captures)
            for n, value in zip(self.floating, wide, strict=True):
                captures[n] = _as_captured(value, n, site.how)
            return site.score(tile, raw, captures)

        wide = (site.how.captures[n].to(self.floats[n].dtype) for n in self.floating)
        score_HQK, vjp, *_ = torch.func.vjp(run, raw_HQK, *wide)

        def pull(dscore_HQK: Tensor) -> Tensor:
            draw_HQK, *grads = vjp(dscore_HQK)
            for n, grad in zip(self.floating, grads, strict=True):
                self.floats[n].add_(grad)
            return draw_HQK

        return score_HQK, pull

    def dsinks(self) -> Tensor:
        """A sink's weight is ``exp(sink - lse)`` and its value is zero, so its gradient is ``-weight * delta``."""
        sinks = self.site.how.sinks
        if sinks is None:
            return self.grad_out.new_empty(0)
        weight = torch.exp(sinks.to(self.lse.dtype)[None, :, None] - self.lse)
        return -(weight * self.delta).sum((0, 2)).to(sinks.dtype)

    def dcaptures(self) -> list[Tensor]:
        empty = self.grad_out.new_empty(0)
        captures = enumerate(self.site.how.captures)
        return [self.floats[n].to(c.dtype) if n in self.floats else empty.clone() for n, c in captures]
