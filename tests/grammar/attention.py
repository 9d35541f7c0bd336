"""Attention, drawn by name: every table holds the ways to write one of its steps.

Tables called ``WRONG_...`` hold what no causal model does: they let a token see a later one, or the row's end.
Shapes: ``L`` tokens, ``C`` width, ``H`` query heads, ``G`` key heads, ``D`` size of a key, ``E`` of a value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POSITIONS = 512
"""Length of tables by position."""
INF = float("inf")


@dataclass(frozen=True)
class Attention:
    """What an attention is made of: keys of the tables below, and sizes."""

    written: str = "fused_causal"
    project: str = "apart"
    groups: str = "one_each"
    repeat: str = "interleave"
    normed: str = "no"
    turn: str = "no"
    queries: str = "as_they_are"
    scaled: str = "scores"
    change: str = "no"
    bias: str = "no"
    past: str = "compared"
    sees: str = "past"
    hide: str = "fill_inf"
    softmax: str = "softmax"
    sinks: str = "no"
    twice: str = "no"
    gate: str = "no"
    merge: str = "transposed"
    span: int = 4
    key_size: int = 8
    value_size: int = 8


Change = Callable[..., Tensor]

# --------------------------------------------------------------------------- heads out of tokens, and back


def _project_apart(m: Any, x: Tensor) -> list[Tensor]:
    return [_heads(linear(x), size) for linear, size in zip((m.q, m.k, m.v), m.sizes, strict=True)]


def _project_at_once(m: Any, x: Tensor) -> list[Tensor]:
    weight = torch.cat([m.q.weight, m.k.weight, m.v.weight])
    bias = torch.cat([m.q.bias, m.k.bias, m.v.bias])
    widths = [linear.out_features for linear in (m.q, m.k, m.v)]
    parts = F.linear(x, weight, bias).split(widths, dim=2)
    return [_heads(part, size) for part, size in zip(parts, m.sizes, strict=True)]


def _project_by_equation(m: Any, x: Tensor) -> list[Tensor]:
    weights = [linear.weight.view(-1, size, x.shape[2]) for linear, size in zip((m.q, m.k, m.v), m.sizes, strict=True)]
    return [torch.einsum("blc,hdc->bhld", x, weight) for weight in weights]


def _project_permuted(m: Any, x: Tensor) -> list[Tensor]:
    parts = zip((m.q, m.k, m.v), m.sizes, strict=True)
    return [linear(x).unflatten(-1, (-1, size)).permute(0, 2, 1, 3).contiguous() for linear, size in parts]


def _heads(x: Tensor, size: int) -> Tensor:
    B, L, _ = x.shape
    return x.view(B, L, -1, size).transpose(1, 2)


PROJECT: dict[str, Change] = {
    "apart": _project_apart,
    "at_once": _project_at_once,
    "by_equation": _project_by_equation,
    "permuted": _project_permuted,
}

MERGE: dict[str, Change] = {
    "transposed": lambda m, y: m.out(y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)),
    "flattened": lambda m, y: m.out(y.permute(0, 2, 1, 3).contiguous().flatten(2)),
    "by_equation": lambda m, y: torch.einsum("bhle,hec->blc", y, m.out.weight.T.reshape(y.shape[1], y.shape[3], -1)),
    "head_by_head": lambda m, y: m.out(torch.cat([part.squeeze(1) for part in y.split(1, dim=1)], dim=-1)),
}

GROUPS: dict[str, Callable[[int], int]] = {
    "one_each": lambda heads: heads, "two_each": lambda heads: heads // 2, "one_for_all": lambda heads: 1
}  # fmt: skip

REPEAT: dict[str, Callable[[Tensor, int], Tensor]] = {
    "interleave": lambda t, times: t.repeat_interleave(times, dim=1),
    "expand": lambda t, times: t[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2),
    "expand_reshape": lambda t, times: (
        t[:, :, None]
        .expand(t.shape[0], t.shape[1], times, t.shape[2], t.shape[3])
        .reshape(t.shape[0], t.shape[1] * times, t.shape[2], t.shape[3])
    ),
    "tile": lambda t, times: t.repeat(1, times, 1, 1),
    "stack": lambda t, times: torch.stack([t] * times, dim=2).flatten(1, 2),
    "by_the_kernel": lambda t, times: t,  # fused: enable_gqa=True
    "five_axes": lambda t, times: t[:, :, None],  # written out: queries are [B, G, H / G, L, D] then
}

# --------------------------------------------------------------------------- queries and keys


def _rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


NORMED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no": lambda x, weight: x,
    "rms": lambda x, weight: _rms(x) * weight,
    "unit": lambda x, weight: F.normalize(x, dim=-1) * 3 * weight,
    "layer": lambda x, weight: F.layer_norm(x, x.shape[-1:], weight),
}


def _angles(x: Tensor, index: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return index[:, None] * 20.0 ** (-torch.arange(half, device=x.device) / half)


def _halves(x: Tensor, index: Tensor) -> Tensor:
    angle = torch.cat([_angles(x, index)] * 2, dim=-1)
    a, b = x.chunk(2, dim=-1)
    return x * angle.cos() + torch.cat([-b, a], dim=-1) * angle.sin()


def _pairs(x: Tensor, index: Tensor) -> Tensor:
    angle = _angles(x, index)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, dim=-1).flatten(-2)


def _complex(x: Tensor, index: Tensor) -> Tensor:
    angle = _angles(x, index)
    turned = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2)


def _partly(x: Tensor, index: Tensor) -> Tensor:
    turned, kept = x.split([x.shape[-1] // 2, x.shape[-1] - x.shape[-1] // 2], dim=-1)
    return torch.cat([_halves(turned, index), kept], dim=-1)


TURN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "no": lambda x, index: x,
    "halves": _halves,
    "pairs": _pairs,
    "complex": _complex,
    "partly": _partly,
}

QUERIES: dict[str, Change] = {
    "as_they_are": lambda m, q, index: q,
    "by_log_position": lambda m, q, index: q * torch.log(index + 2.0)[:, None],
    "by_temperature": lambda m, q, index: q * m.temperature.exp().view(-1, 1, 1),
}

SCALED = ("scores", "queries", "both")

# --------------------------------------------------------------------------- scores

CHANGE: dict[str, Change] = {
    "no": lambda m, s: s,
    "softcap": lambda m, s: torch.tanh(s / 3) * 3,
    "clamp": lambda m, s: s.clamp(-4.0, 4.0),
    "temperature": lambda m, s: s * m.by_head(m.temperature.exp()),
    "squash": lambda m, s: s / (1 + s.abs() / 5),
    "mixed_heads": lambda m, s: torch.einsum("hg,bgij->bhij", m.mix, s),
}


def _alibi(m: Any, distance: Tensor) -> Tensor:
    slopes = 2.0 ** -torch.arange(1, m.heads + 1, device=distance.device)
    return -slopes[:, None, None] * distance


def _t5(m: Any, distance: Tensor) -> Tensor:
    """A learned bias for each bucket of distances, which widen: 0, 1, 2, 3, then by logarithm up to 7."""
    far = distance.clamp(min=0)
    wide = 4 + (torch.log(far.float() / 4 + 1e-6) / math.log(8) * 4).long()
    bucket = torch.where(far < 4, far, wide.clamp(max=7))
    return m.table(bucket).permute(2, 0, 1)


BIAS: dict[str, Change | None] = {
    "no": None,
    "alibi": _alibi,
    "t5": _t5,
    "by_distance": lambda m, distance: m.table.weight[distance.clamp(0, 7)].permute(2, 0, 1),
    "by_log_distance": lambda m, distance: -m.temperature.exp()[:, None, None] * torch.log1p(distance.clamp(min=0)),
    "by_parity": lambda m, distance: torch.where(distance % 2 == 0, 0.0, m.temperature[:, None, None]),
}

# --------------------------------------------------------------------------- who sees whom

PAST: dict[str, Change] = {
    "compared": lambda m, p: p[None, :] <= p[:, None],
    "by_difference": lambda m, p: (p[:, None] - p) >= 0,
    "tril": lambda m, p: torch.ones(p.shape[0], p.shape[0], device=p.device).tril() == 1,
    "not_triu": lambda m, p: (
        ~torch.triu(torch.ones(p.shape[0], p.shape[0], dtype=torch.bool, device=p.device), diagonal=1)
    ),
    "buffer": lambda m, p: m.triangle[: p.shape[0], : p.shape[0]],
    "filled": lambda m, p: torch.full((p.shape[0], p.shape[0]), -INF, device=p.device).triu(1) == 0,
}
"""``(module, positions [L]) -> bool [L, L]``, True where the key is not later than the query."""

SEES: dict[str, Change] = {
    "past": lambda past, p, w, ids: past,
    "window": lambda past, p, w, ids: past & (p[:, None] - p < w),
    "band": lambda past, p, w, ids: past & torch.ones_like(past).triu(1 - w),
    "chunk": lambda past, p, w, ids: past & (p[:, None] // w == p // w),
    "window_and_first": lambda past, p, w, ids: past & ((p[:, None] - p < w) | (p < 2)),
    "dilated": lambda past, p, w, ids: past & ((p[:, None] - p) % w == 0),
    "even_or_self": lambda past, p, w, ids: past & ((p % 2 == 0) | (p == p[:, None])),
    "some_words": lambda past, p, w, ids: past & ((ids % 3 != 1)[:, None, None, :] | (p == p[:, None])),
    "own_document": lambda past, p, w, ids: past & _same((ids == 5).cumsum(1)),
}
"""``(past [L, L], positions [L], span, ids [B, L]) -> bool [L, L] or [B, 1, L, L]``."""

WRONG_SEES: dict[str, Change] = {
    "all": lambda past, p, w, ids: torch.ones_like(past),
    "one_ahead": lambda past, p, w, ids: p <= p[:, None] + 1,
    "own_chunk_whole": lambda past, p, w, ids: past | (p[:, None] // w == p // w),
    "prefix_whole": lambda past, p, w, ids: past | (p < w),
    "window_both_ways": lambda past, p, w, ids: (p[:, None] - p).abs() < w,
    "window_from_the_end": lambda past, p, w, ids: past & ((p >= p.shape[0] - w) | (p == p[:, None])),
    "window_by_length": lambda past, p, w, ids: past & (p[:, None] - p <= p.shape[0] // w),
    "last_always": lambda past, p, w, ids: past | (p == p.shape[0] - 1),
    "future": lambda past, p, w, ids: past.T,
    "words_ahead": lambda past, p, w, ids: past | (ids % 3 == 1)[:, None, None, :],
    "window_by_words": lambda past, p, w, ids: (
        past & ((p[:, None] - p) < w + (ids % 3 == 1).sum(1)[:, None, None, None])
    ),
}


def _same(document: Tensor) -> Tensor:
    return document[:, None, :, None] == document[:, None, None, :]


HIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "fill_inf": lambda s, sees: s.masked_fill(~sees, -INF),
    "fill_1e4": lambda s, sees: s.masked_fill(~sees, -1e4),
    "fill_1e9": lambda s, sees: s.masked_fill(sees == 0, -1e9),
    "fill_min": lambda s, sees: s.masked_fill(sees.logical_not(), torch.finfo(s.dtype).min),
    "where": lambda s, sees: torch.where(sees, s, -1e9),
    "where_tensor": lambda s, sees: torch.where(sees, s, torch.full([], torch.finfo(s.dtype).min, dtype=s.dtype)),
    "add": lambda s, sees: s + torch.zeros_like(sees, dtype=s.dtype).masked_fill(~sees, -INF),
    "one_minus": lambda s, sees: s + (1.0 - sees.to(s.dtype)) * -1e9,
    "times": lambda s, sees: s * sees.to(s.dtype) - 1e9 * (1 - sees.to(s.dtype)),
    "log": lambda s, sees: s + sees.to(s.dtype).log(),
}
WRONG_HIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a_little": lambda s, sees: s.masked_fill(~sees, -2.0),
    "as_zero": lambda s, sees: s * sees.to(s.dtype),
    "add_ones": lambda s, sees: s + sees.to(s.dtype),
    "capped_after": lambda s, sees: torch.tanh(s.masked_fill(~sees, -INF) / 4) * 4,
}

SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: s.softmax(-1),
    "function": lambda s: F.softmax(s, dim=-1, dtype=s.dtype),
    "shifted": lambda s: (s - s.amax(-1, keepdim=True)).softmax(-1),
    "of_log": lambda s: s.log_softmax(-1).exp(),
    "exp_over_sum": lambda s: _over_sum((s - s.amax(-1, keepdim=True)).exp()),
}
WRONG_SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "over_queries": lambda s: s.softmax(-2),
    "over_all_pairs": lambda s: s.flatten(-2).softmax(-1).view_as(s),
    "shifted_by_the_column": lambda s: (s - s.amax(-2, keepdim=True)).softmax(-1),
    "weights_over_queries": lambda s: s.softmax(-1) / (1 + s.softmax(-1).sum(-2, keepdim=True)),
}


def _over_sum(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


SINKS = ("no", "column", "zero_column", "factor")
TWICE = ("no", "outputs", "weights")
GATE: dict[str, Change] = {
    "no": lambda m, x, y: y,
    "by_head": lambda m, x, y: y * m.gate(x).sigmoid().transpose(1, 2)[..., None],
}

FUSED = ("fused_causal", "fused_bool", "fused_float")
WRITTEN = (*FUSED, "matmul", "einsum", "bmm")


def consistent(a: Attention) -> Attention:
    """``a``, written so that it can say all that it says: fused attention takes no sinks, for example."""
    beyond_fused = (a.change, a.sinks, a.softmax, a.hide in WRONG_HIDE) != ("no", "no", "softmax", False)
    if a.written in FUSED and (beyond_fused or a.twice == "weights"):
        a = dataclasses.replace(a, written="matmul")
    if a.written in FUSED and a.bias != "no":
        a = dataclasses.replace(a, written="fused_float")
    if a.written == "fused_causal" and a.sees != "past":
        a = dataclasses.replace(a, written="fused_bool")
    if a.repeat == "by_the_kernel" and a.written not in FUSED:
        a = dataclasses.replace(a, repeat="expand")
    if a.repeat == "five_axes" and (a.written not in ("matmul", "einsum") or a.change == "mixed_heads"):
        a = dataclasses.replace(a, repeat="interleave")
    return a


# --------------------------------------------------------------------------- the module


class Attend(nn.Module):
    """Attention as ``spec`` says, from ``x [B, L, C]``, the tokens' positions ``[L]`` and ids ``[B, L]``."""

    def __init__(self, spec: Attention, width: int, heads: int) -> None:
        super().__init__()
        self.spec, self.heads, self.kv_heads = spec, heads, GROUPS[spec.groups](heads)
        twofold = 1 if spec.twice == "no" else 2
        self.sizes = (twofold * spec.key_size, twofold * spec.key_size, spec.value_size)
        self.q = nn.Linear(width, heads * self.sizes[0])
        self.k = nn.Linear(width, self.kv_heads * self.sizes[1])
        self.v = nn.Linear(width, self.kv_heads * self.sizes[2])
        self.out = nn.Linear(heads * spec.value_size, width)
        self.q_norm, self.k_norm = (nn.Parameter(torch.ones(self.sizes[0])) for _ in range(2))
        self.temperature, self.sinks = nn.Parameter(torch.zeros(heads)), nn.Parameter(torch.zeros(heads))
        self.mix, self.table = nn.Parameter(torch.eye(heads)), nn.Embedding(8, heads)
        self.share, self.gate = nn.Parameter(torch.tensor(0.4)), nn.Linear(width, heads)
        triangle = torch.ones(POSITIONS, POSITIONS, dtype=torch.bool).tril()
        self.register_buffer("triangle", triangle, persistent=False)

    def forward(self, x: Tensor, index: Tensor, ids: Tensor) -> Tensor:
        spec = self.spec
        q, k, v = PROJECT[spec.project](self, x)
        q, k = NORMED[spec.normed](q, self.q_norm), NORMED[spec.normed](k, self.k_norm)
        q, k = TURN[spec.turn](q, index), TURN[spec.turn](k, index)
        q = QUERIES[spec.queries](self, q, index)
        times = self.heads // self.kv_heads
        if times > 1 or spec.repeat == "five_axes":
            k, v = REPEAT[spec.repeat](k, times), REPEAT[spec.repeat](v, times)
        if spec.repeat == "five_axes":
            q = q.unflatten(1, (self.kv_heads, times))
        past = PAST[spec.past](self, index)
        sees = (SEES | WRONG_SEES)[spec.sees](past, index, spec.span, ids)
        y = self._attend(q, k, v, self._bias(index), sees)
        y = y.flatten(1, 2) if spec.repeat == "five_axes" else y
        return MERGE[spec.merge](self, GATE[spec.gate](self, x, y))

    def by_head(self, values: Tensor) -> Tensor:
        """``[H]`` or ``[H, L, L]`` so that it broadcasts with scores."""
        values = values if values.dim() == 3 else values[:, None, None]
        return values.unflatten(0, (self.kv_heads, -1)) if self.spec.repeat == "five_axes" else values

    def _bias(self, index: Tensor) -> Tensor | None:
        make = BIAS[self.spec.bias]
        return None if make is None else make(self, index[:, None] - index)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sees: Tensor) -> Tensor:
        if self.spec.twice == "no":
            return self._once(q, k, v, bias, sees)
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        if self.spec.twice == "outputs":
            return self._once(q1, k1, v, bias, sees) - self.share * self._once(q2, k2, v, bias, sees)
        return self._sum(self._weights(q1, k1, bias, sees) - self.share * self._weights(q2, k2, bias, sees), v)

    def _once(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, sees: Tensor) -> Tensor:
        if self.spec.written not in FUSED:
            y = self._sum(self._weights(q, k, bias, sees), v)
            if self.spec.sinks == "factor":
                total = self._scores(q, k, bias, sees).logsumexp(-1, keepdim=True)
                y = y * torch.sigmoid(total - self.by_head(self.sinks))
            return y
        scale, many = None, self.spec.repeat == "by_the_kernel"
        if self.spec.scaled == "queries":
            q, scale = q * q.shape[-1] ** -0.5, 1.0
        if self.spec.written == "fused_causal":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=many)
        mask = sees
        if self.spec.written == "fused_float":
            mask = torch.zeros_like(sees, dtype=q.dtype).masked_fill(~sees, -INF)
            mask = mask if bias is None else mask + bias
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=many)

    def _scores(self, q: Tensor, k: Tensor, bias: Tensor | None, sees: Tensor) -> Tensor:
        spec, scale = self.spec, q.shape[-1] ** -0.5
        if spec.scaled == "queries":
            s = self._product(q * scale, k)
        elif spec.scaled == "both":
            s = self._product(q * scale**0.5, k * scale**0.5)
        else:
            s = self._product(q, k) / math.sqrt(q.shape[-1])
        s = CHANGE[spec.change](self, s)
        s = s if bias is None else s + self.by_head(bias).to(s.dtype)
        sees = sees[:, None] if sees.dim() == 4 and s.dim() == 5 else sees
        return (HIDE | WRONG_HIDE)[spec.hide](s, sees)

    def _weights(self, q: Tensor, k: Tensor, bias: Tensor | None, sees: Tensor) -> Tensor:
        s = self._scores(q, k, bias, sees)
        softmax = (SOFTMAX | WRONG_SOFTMAX)[self.spec.softmax]
        if "column" not in self.spec.sinks:
            return softmax(s)
        sinks = self.by_head(self.sinks if self.spec.sinks == "column" else torch.zeros_like(self.sinks))
        return softmax(torch.cat([s, sinks.expand(*s.shape[:-1], 1)], dim=-1))[..., :-1]

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        if self.spec.written == "einsum":
            if q.dim() == 5:
                return torch.einsum("bgniu,bgju->bgnij", q, k.squeeze(2))
            return torch.einsum("bhiu,bhju->bhij", q, k)
        if self.spec.written == "bmm":
            return torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2)).unflatten(0, q.shape[:2])
        return q @ k.transpose(-1, -2)

    def _sum(self, weights: Tensor, v: Tensor) -> Tensor:
        if self.spec.written == "einsum" and weights.dim() == 4:
            return torch.einsum("bhij,bhje->bhie", weights, v)
        if self.spec.written == "bmm":
            return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, v.shape[:2])
        return weights @ v


class MultiheadAttention(nn.Module):
    """torch's own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor, index: Tensor, ids: Tensor) -> Tensor:
        mask = torch.ones(index.shape[0], index.shape[0], dtype=torch.bool, device=x.device).triu(1)
        y, _ = self.attention(x, x, x, attn_mask=mask, need_weights=False)
        return y
