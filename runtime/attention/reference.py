"""The definition of ``ppcompile::prefix_attention``: one dense mask, any device, any score program.

Shapes as in :mod:`runtime.ops`. Every other backend is tested against this file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import Layout, Score
from ..program import compile_program

__all__ = ["backward", "dense_attention", "forward", "unsupported", "visibility"]


def unsupported(device: torch.device, how: Score, needs_grad: bool) -> str | None:
    """The reference runs everything."""
    return None


def visibility(layout: Layout) -> Tensor:
    """Who sees whom, from the forest alone: bool ``[T, T]``, ``j <= i < subtree_end[j]`` at ``[i, j]``."""
    slot = torch.arange(layout.subtree_end.numel(), device=layout.subtree_end.device)
    return (slot[None, :] <= slot[:, None]) & (slot[:, None] < layout.subtree_end[None, :])


def dense_attention(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: Score) -> tuple[Tensor, Tensor]:
    """Attention in logical coordinates, written out. Scores are float32 at least.

    Returns:
        ``[1, H, T, E]`` in the dtype of ``query`` and the log-sum-exp ``[1, H, T]``.
    """
    heads, length = query.shape[1], query.shape[2]
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = heads // key.shape[1]
    key_HTD = key.to(wide).repeat_interleave(groups, dim=1)[0]
    value_HTE = value.to(wide).repeat_interleave(groups, dim=1)[0]
    s_HTT = how.scale * (query.to(wide)[0] @ key_HTD.transpose(-1, -2))

    position, device = layout.position_ids[0], query.device
    slot = torch.arange(length, device=device)
    where = {
        "h": torch.arange(heads, device=device)[:, None, None],
        "q": position[None, :, None],
        "k": position[None, None, :],
        "i": slot[None, :, None],
        "j": slot[None, None, :],
    }
    program = compile_program(how.program, ("s", *where))
    visible = compile_program(how.visible, tuple(where))
    s_HTT = program(s_HTT, *where.values(), how.captures).to(wide)

    seen = visibility(layout)[None] & visible(*where.values(), how.captures)
    if how.window:
        seen = seen & (where["q"] - where["k"] < how.window)
    s_HTT = s_HTT.masked_fill(~seen, float("-inf"))
    if how.sinks is not None:
        sink = how.sinks.to(wide)[:, None, None].expand(heads, length, 1)
        s_HTT = torch.cat([s_HTT, sink], dim=-1)
    lse = torch.logsumexp(s_HTT, dim=-1)
    weight = torch.exp(s_HTT - lse[..., None])[..., :length]
    return (weight @ value_HTE).to(query.dtype)[None], lse[None]


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: Score) -> tuple[Tensor, Tensor]:
    """See :func:`runtime.ops.prefix_attention`, whose definition this is."""
    return dense_attention(query, key, value, layout, how)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, layout: Layout, how: Score
) -> list[Tensor]:
    """Differentiate :func:`dense_attention` by re-running it; order as in ``prefix_attention_backward``."""
    floating = [n for n, c in enumerate(how.captures) if c.is_floating_point()]
    sinks = () if how.sinks is None else (how.sinks,)

    def run(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        captures = list(how.captures)
        for n, capture in zip(floating, rest[len(sinks) :], strict=True):
            captures[n] = capture
        varied = Score(how.scale, how.program, how.visible, how.window, tuple(captures), rest[0] if sinks else None)
        return dense_attention(query, key, value, layout, varied)[0]

    # torch.func, not torch.autograd: inside an op the autograd dispatch keys are switched off.
    _, vjp, *_ = torch.func.vjp(run, query, key, value, *sinks, *(how.captures[n] for n in floating))
    dquery, dkey, dvalue, *rest = vjp(grad_out)
    empty = query.new_empty(0)
    dsinks = rest.pop(0) if sinks else empty
    dcaptures = [empty.clone() for _ in how.captures]
    for n, grad in zip(floating, rest, strict=True):
        dcaptures[n] = grad
    return [dquery, dkey, dvalue, dsinks, *dcaptures]
