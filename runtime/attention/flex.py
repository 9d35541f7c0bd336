"""FlexAttention over a forest of prefixes: plain torch code that ``torch.compile`` inlines into the model's graph.

FlexAttention fuses score and mask functions into one Triton kernel, but only as part of a graph that dynamo
traces; inside an opaque op it would run unfused and build ``T x T`` scores. So this backend is not reached
through ``ppcompile::prefix_attention``: lowering replaces that op by :func:`flex_prefix_attention`, and the
compiler finds it as ``attention_backend("flex").flex_prefix_attention``.

Which tiles to visit comes in as block lists (``ppcompile::block_lists``), one node for all sites with the
same window. A mask is evaluated on partial blocks only, from three integers per pair::

    j <= i < subtree_end[j]          and, with a window,          p[i] - p[j] < window

Shapes: ``H`` query heads, ``G`` key/value heads, ``T`` slots, ``D`` head size, ``E`` value head size,
``n = ceil(T / 128)`` blocks.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from ..ops import Layout, Score
from ..program import ALWAYS, PLAIN, Program, compile_program

__all__ = ["BLOCK_SIZE", "backward", "flex_prefix_attention", "forward", "unsupported"]

BLOCK_SIZE = 128
"""Slots per block of the block lists: FlexAttention's default."""


# Left to itself, torch takes a kernel meant for decoding where a pack has less than 128 slots, and compiles that too.
_KERNEL: Any = {"BACKEND": "TRITON"}


def unsupported(device: torch.device, how: Score, needs_grad: bool) -> str | None:
    """Why FlexAttention cannot run this site, or ``None``."""
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"FlexAttention is used on cuda, and on cpu without gradients; the tensors are on {device}"
    if needs_grad:
        return "FlexAttention has no backward on the CPU (torch raises NotImplementedError)"
    if how.sinks is not None:
        return "FlexAttention on the CPU does not return the log-sum-exp that attention sinks need"
    return None


def flex_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    subtree_end: Tensor,
    blocks: Sequence[Tensor],
    captures: Sequence[Tensor],
    sinks: Tensor | None,
    scale: float,
    score: str,
    visible: str,
    window: int,
) -> Tensor:
    """Attention in logical coordinates; differentiable on CUDA in everything floating, captures and sinks included.

    Called while dynamo traces, it becomes part of the caller's graph. Called eagerly, it runs one compiled
    artifact per ``(scale, score, visible, window)``, whatever the lengths (a pack of a single block, ``T <=
    128``, makes a second one).

    Args:
        query: ``[1, H, T, D]``.
        key: ``[1, G, T, D]``, query head ``h`` reads key head ``h // (H // G)``.
        value: ``[1, G, T, E]``.
        position_ids: int64 ``[1, T]``.
        subtree_end: int64 ``[T]``.
        blocks: int32 ``kv_num [1, 1, n]``, ``kv_indices [1, 1, n, n]``, the same two for full blocks, then all
            four by key block (``q_num``, ...), for the same ``window``, as ``ppcompile::block_lists`` gives them.
        captures, sinks, scale, score, visible, window: see :class:`runtime.ops.Score`.

    Returns:
        ``[1, H, T, E]`` in the dtype of ``query``, its strides in the order of ``query``'s.
    """
    tensors = (query, key, value, position_ids, subtree_end, tuple(blocks), tuple(captures), sinks)
    if torch.compiler.is_dynamo_compiling():
        return _attend(*tensors, scale, score, visible, window)
    return _compiled(scale, score, visible, window)(*tensors)


@functools.cache
def _compiled(scale: float, score: str, visible: str, window: int) -> Callable[..., Tensor]:
    """The artifact for eager callers.

    Its constants are literals of a function of its own: as arguments, dynamo would make scale and window
    symbolic, and all programs would count against the recompile limit of one function. ``fullgraph`` turns
    what cannot be fused into an error; otherwise FlexAttention would quietly build dense scores.
    """
    # Tensors are named, because dynamo derives names of sizes from names of arguments, and the C++ template of
    # torch 2.13 edits its own code by text: it mistakes s14, the length found in an argument pack, for its ks1 and a 4.
    tensors = "query, key, value, position_ids, subtree_end, blocks, captures, sinks"
    constants = f"{float(scale)!r}, {score!r}, {visible!r}, {int(window)!r}"
    source = f"def flex_site({tensors}):\n    return attend({tensors}, {constants})\n"
    namespace: dict[str, Any] = {"attend": _attend}
    exec(compile(source, f"<flex site {score} {visible}>", "exec"), namespace)
    return torch.compile(namespace["flex_site"], dynamic=True, fullgraph=True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    subtree_end: Tensor,
    blocks: tuple[Tensor, ...],
    captures: tuple[Tensor, ...],
    sinks: Tensor | None,
    scale: float,
    score: str,
    visible: str,
    window: int,
) -> Tensor:
    position = position_ids[0]
    result: Any = flex_attention(
        query,
        key,
        value,
        score_mod=None if score == PLAIN else _score_mod(score, position, captures),
        block_mask=_block_mask(
            query.shape[2],
            blocks if visible == ALWAYS else _mask_everywhere(blocks),
            _mask_mod(visible, window, position, subtree_end, captures),
        ),
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=_KERNEL,
        return_aux=None if sinks is None else AuxRequest(lse=True),
    )
    if sinks is None:
        return result
    out, aux = result
    # A sink takes part in the denominator only: exp(lse - logaddexp(lse, sink)) is a sigmoid.
    share = torch.sigmoid(aux.lse - sinks.to(aux.lse.dtype)[None, :, None])
    return (out * share[..., None]).to(query.dtype)


def _mask_everywhere(blocks: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """Block lists without full blocks: forest and window promise those, a visibility program keeps no such promise."""
    kv_num, kv_indices, full_kv_num, full_kv_indices, q_num, q_indices, full_q_num, full_q_indices = blocks
    by_query = _joined(kv_num, kv_indices, full_kv_num, full_kv_indices)
    by_key = _joined(q_num, q_indices, full_q_num, full_q_indices)
    return (*by_query, None, None, *by_key, None, None)


def _joined(num: Tensor, indices: Tensor, more_num: Tensor, more_indices: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's first ``num`` entries, then the first ``more_num`` of the other list: counts and indices."""
    column = torch.arange(indices.shape[-1], device=indices.device)
    behind = (column - num[..., None]).clamp(min=0)
    return num + more_num, torch.where(column < num[..., None], indices, more_indices.gather(-1, behind))


def _block_mask(length: int, blocks: Sequence[Any], mask_mod: Callable[..., Tensor]) -> BlockMask:
    kv_num, kv_indices, full_kv_num, full_kv_indices, q_num, q_indices, full_q_num, full_q_indices = blocks
    return BlockMask(
        seq_lengths=(length, length),
        kv_num_blocks=kv_num,
        kv_indices=kv_indices,
        full_kv_num_blocks=full_kv_num,
        full_kv_indices=full_kv_indices,
        q_num_blocks=q_num,
        q_indices=q_indices,
        full_q_num_blocks=full_q_num,
        full_q_indices=full_q_indices,
        BLOCK_SIZE=(BLOCK_SIZE, BLOCK_SIZE),
        mask_mod=mask_mod,
    )


class _Published:
    """Compiled programs as attributes of one object: a place that dynamo can read functions from, and guard."""


_PUBLISHED = _Published()


@torch.compiler.assume_constant_result
def _publish(text: str, arguments: tuple[str, ...]) -> str:
    """Compile a program, and return the name under which it is published.

    Dynamo calls this while it traces instead of tracing Python's own compiler. It may return a string here but
    not a function: a constant has no source to guard.
    """
    name = "program_" + hashlib.sha256(f"{text} {arguments}".encode()).hexdigest()[:16]
    setattr(_PUBLISHED, name, compile_program(text, arguments))
    return name


def _program(text: str, arguments: tuple[str, ...]) -> Program:
    return getattr(_PUBLISHED, _publish(text, arguments))


def _score_mod(score: str, position: Tensor, captures: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    program = _program(score, ("s", "h", "q", "k", "i", "j"))

    def score_mod(s: Tensor, _batch: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return program(s, h, position[i], position[j], i, j, captures)

    return score_mod


def _mask_mod(
    visible: str, window: int, position: Tensor, subtree_end: Tensor, captures: tuple[Tensor, ...]
) -> Callable[..., Tensor]:
    program = _program(visible, ("h", "q", "k", "i", "j"))

    def mask_mod(_batch: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        seen = (j <= i) & (i < subtree_end[j])
        if window:
            seen = seen & (position[i] - position[j] < window)
        if visible != ALWAYS:
            seen = seen & program(h, position[i], position[j], i, j, captures)
        return seen

    return mask_mod


_NOT_AN_OP = (
    "backend 'flex' was asked of the op ppcompile::prefix_attention, which is opaque to torch.compile, while "
    "FlexAttention must be traced. The pass `lower` replaces the op by runtime.attention.flex.flex_prefix_attention; "
    "run it, or use backend 'cascade' (CPU) or 'reference'"
)


def forward(query: Tensor, key: Tensor, value: Tensor, layout: Layout, how: Score) -> tuple[Tensor, Tensor]:
    """Not to be reached: see the top of this file.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(_NOT_AN_OP)


def backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, layout: Layout, how: Score
) -> list[Tensor]:
    """Not to be reached: see the top of this file.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(_NOT_AN_OP)
