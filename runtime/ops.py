"""The op contracts: what passes may write into a graph, and what backends must compute.

This file defines the ops of a packed graph. Each has a schema on plain tensors, a fake (shapes
only), an autograd rule, and a readable definition; fast implementations live under
``runtime/attention`` and ``runtime/epilogues`` and are tested against it. It imports only torch and
:mod:`runtime.program`, so that the compiler can name the ops without loading a backend.

Shapes: ``H`` query heads, ``G`` key/value heads (``H % G == 0``), ``T`` packed slots, ``D`` head size,
``E`` value head size, ``S`` segments, ``U`` scored slots, ``C`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .program import ALWAYS, PLAIN

__all__ = [
    "ATTENTION_BACKENDS",
    "Score",
    "attention_backend",
    "block_lists_op",
    "prefix_attention",
    "prefix_sum",
    "row_functions",
    "token_logps",
    "unshared",
]

ATTENTION_BACKENDS = ("reference", "cascade", "flex")
"""Names accepted as ``backend``; each is a module of ``runtime/attention``."""


@dataclass(frozen=True)
class Score:
    """Everything about a site that is not a query, a key or a value.

    Attributes:
        scale: multiplies ``<query, key>`` before the score program sees it as ``s``.
        program: score program (``runtime.program``) in ``s h q k i j`` and captures.
        visible: visibility program in ``h q k i j`` and captures: a key is seen where the forest *and*
            this program allow it. ``"True"`` where the forest is all there is.
        window: a key is seen only where ``q - k < window`` in logical positions; 0 for no window.
        captures: tensors ``c0, c1, ...`` that both programs read.
        sinks: ``[H]`` extra logits that take part in the softmax's denominator only, or ``None``.
    """

    scale: float
    program: str = PLAIN
    visible: str = ALWAYS
    window: int = 0
    captures: tuple[Tensor, ...] = ()
    sinks: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """True where the score is ``scale * <query, key>`` and nothing but forest and window hide keys."""
        return self.program == PLAIN and self.visible == ALWAYS


@dataclass(frozen=True)
class Layout:
    """The layout tensors an attention backend reads (see ``runtime.layout`` for how they are made).

    Attributes:
        position_ids: int64 ``[1, T]``, logical position of each slot.
        subtree_end: int64 ``[T]``; slot ``j`` is visible to ``i`` iff ``j <= i < subtree_end[j]``.
        segments: int64 ``[S, 4]`` *on the host*: first slot, one past the last slot, ``subtree_end``, and
            parent segment (-1 for a root), in depth-first order.
    """

    position_ids: Tensor
    subtree_end: Tensor
    segments: Tensor


def attention_backend(name: str) -> ModuleType:
    """The module that implements ``name``: ``forward(q, k, v, layout, score) -> (out, lse)`` and ``backward``.

    Raises:
        ValueError: not one of :data:`ATTENTION_BACKENDS`.
    """
    if name not in ATTENTION_BACKENDS:
        raise ValueError(f"unknown attention backend {name!r}; accepted: {', '.join(ATTENTION_BACKENDS)}")
    return importlib.import_module(f"{__package__}.attention.{name}")


def block_lists_op() -> torch._ops.OpOverload:
    """``ppcompile::block_lists``, which FlexAttention's sites read; see ``runtime/layout.py``."""
    from . import layout

    return layout.block_lists_op._opoverload


def row_functions() -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """``unpack`` and ``repack``, which stand around a module that runs on unpacked rows; see ``runtime/rows.py``."""
    from . import rows

    return rows.unpack, rows.repack


# --------------------------------------------------------------------------- prefix_attention


@torch.library.custom_op("ppcompile::prefix_attention", mutates_args=())
def prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    subtree_end: Tensor,
    segments: Tensor,
    captures: list[Tensor],
    sinks: Tensor | None,
    scale: float,
    score: str,
    visible: str,
    window: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attention in which each slot sees its ancestors in the forest and its own past.

    ``softmax_j(program(scale * <query_i, key_j>)) @ value_j`` over the ``j`` with
    ``j <= i < subtree_end[j]``, ``visible`` and inside ``window``. The definition is
    ``runtime/attention/reference.py``.

    Args:
        query: ``[1, H, T, D]``.
        key: ``[1, G, T, D]``, query head ``h`` reads key head ``h // (H // G)``.
        value: ``[1, G, T, E]``.
        position_ids, subtree_end, segments: see :class:`Layout`.
        captures, sinks, scale, score, visible, window: see :class:`Score`.
        backend: one of :data:`ATTENTION_BACKENDS`.

    Returns:
        Output ``[1, H, T, E]`` in the dtype of ``query``, and the log-sum-exp of each row's scores, float32
        (float64 for float64 input) ``[1, H, T]``, sinks included. The second is not differentiable.
    """
    layout = Layout(position_ids, subtree_end, segments)
    how = Score(scale, score, visible, window, tuple(captures), sinks)
    return attention_backend(backend).forward(query, key, value, layout, how)


@prefix_attention.register_fake
def _(query, key, value, *_args):  # type: ignore[no-untyped-def]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_empty((*query.shape[:-1], value.shape[-1]))
    return out, query.new_empty(query.shape[:-1], dtype=lse_dtype)


@torch.library.custom_op("ppcompile::prefix_attention_backward", mutates_args=())
def prefix_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    position_ids: Tensor,
    subtree_end: Tensor,
    segments: Tensor,
    captures: list[Tensor],
    sinks: Tensor | None,
    scale: float,
    score: str,
    visible: str,
    window: int,
    backend: str,
) -> list[Tensor]:
    """Gradients of :func:`prefix_attention`: ``[dquery, dkey, dvalue, dsinks, *dcaptures]``.

    ``dsinks`` and the entry of a capture that is not floating point are empty (``[0]``).
    """
    layout = Layout(position_ids, subtree_end, segments)
    how = Score(scale, score, visible, window, tuple(captures), sinks)
    return attention_backend(backend).backward(grad_out, query, key, value, out, lse, layout, how)


def _grad_like(tensor: Tensor | None, reference: Tensor) -> Tensor:
    if tensor is None or not tensor.is_floating_point():
        return reference.new_empty(0)
    return torch.empty_like(tensor)


@prefix_attention_backward.register_fake
def _(grad_out, query, key, value, out, lse, pos, end, segments, captures, sinks, *_args):  # type: ignore[no-untyped-def]
    direct = [torch.empty_like(t) for t in (query, key, value)]
    return [*direct, _grad_like(sinks, query), *(_grad_like(c, query) for c in captures)]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, position_ids, subtree_end, segments, captures, sinks, *how = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.how, ctx.has_sinks = how, sinks is not None
    optional = (sinks,) if ctx.has_sinks else ()
    ctx.save_for_backward(query, key, value, out, lse, position_ids, subtree_end, segments, *optional, *captures)


def _attention_backward(ctx, grad_out, _grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, out, lse, position_ids, subtree_end, segments, *rest = ctx.saved_tensors
    sinks = rest.pop(0) if ctx.has_sinks else None
    dquery, dkey, dvalue, dsinks, *dcaptures = prefix_attention_backward(
        grad_out, query, key, value, out, lse, position_ids, subtree_end, segments, rest, sinks, *ctx.how
    )
    captures = [grad if c.is_floating_point() else None for c, grad in zip(rest, dcaptures, strict=True)]
    return dquery, dkey, dvalue, None, None, None, captures, dsinks if ctx.has_sinks else None, *([None] * 5)


prefix_attention.register_autograd(_attention_backward, setup_context=_setup_context)


# --------------------------------------------------------------------------- prefix_sum


@torch.library.custom_op("ppcompile::prefix_sum", mutates_args=())
def prefix_sum(values: Tensor, subtree_end: Tensor, dim: int) -> Tensor:
    """Running sums along each sequence: slot ``i`` holds the sum over its ancestors and itself.

    That is the sum over all slots up to ``i``, less what belongs to subtrees that have ended by then. Whole numbers
    only: of others the difference would not be exact.

    Args:
        values: int64, slots on axis ``dim``.
        subtree_end: int64 ``[T]``, see :class:`Layout`.

    Returns:
        int64, the shape of ``values``.
    """
    count = subtree_end.numel()
    shape = (*values.shape[:dim], count + 1, *values.shape[dim + 1 :])
    ended = values.new_zeros(shape).index_add(dim, subtree_end, values).narrow(dim, 0, count)
    return (values - ended).cumsum(dim)


@prefix_sum.register_fake
def _(values, subtree_end, dim):  # type: ignore[no-untyped-def]
    return torch.empty_like(values)


# --------------------------------------------------------------------------- token_logps


@torch.library.custom_op("ppcompile::token_logps", mutates_args=())
def token_logps(hidden: Tensor, targets: Tensor, captures: list[Tensor], head: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of ``targets`` under ``log_softmax(head(hidden))``, without the ``[U, V]`` logits.

    Args:
        hidden: ``[U, C]`` rows of hidden states, one per scored slot.
        targets: int64 ``[U]``, the token each row predicts.
        captures: tensors ``c0, c1, ...`` of the head program (weights, biases, ...).
        head: head program in ``x`` (``runtime.program``), mapping ``[rows, C]`` to ``[rows, V]``.

    Returns:
        ``log p(target)`` and the log-sum-exp of each row's logits, both float32 ``[U]`` (float64 for float64
        input). The second is not differentiable.
    """
    from .epilogues import token_logps as epilogue

    return epilogue.forward(hidden, targets, captures, head)


@token_logps.register_fake
def _(hidden, targets, captures, head):  # type: ignore[no-untyped-def]
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(targets.shape, dtype=dtype), hidden.new_empty(targets.shape, dtype=dtype)


@torch.library.custom_op("ppcompile::token_logps_backward", mutates_args=())
def token_logps_backward(
    grad: Tensor, hidden: Tensor, targets: Tensor, lse: Tensor, captures: list[Tensor], head: str
) -> list[Tensor]:
    """Gradients of :func:`token_logps`: ``[dhidden, *dcaptures]`` (empty where not floating point)."""
    from .epilogues import token_logps as epilogue

    return epilogue.backward(grad, hidden, targets, lse, captures, head)


@token_logps_backward.register_fake
def _(grad, hidden, targets, lse, captures, head):  # type: ignore[no-untyped-def]
    return [torch.empty_like(hidden), *(_grad_like(c, hidden) for c in captures)]


def _setup_token_logps(ctx, inputs, output):  # type: ignore[no-untyped-def]
    hidden, targets, captures, head = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.head = head
    ctx.save_for_backward(hidden, targets, lse, *captures)


def _token_logps_backward(ctx, grad, _grad_lse):  # type: ignore[no-untyped-def]
    hidden, targets, lse, *captures = ctx.saved_tensors
    dhidden, *dcaptures = token_logps_backward(grad, hidden, targets, lse, captures, ctx.head)
    grads = [g if c.is_floating_point() else None for c, g in zip(captures, dcaptures, strict=True)]
    return dhidden, None, grads, None


token_logps.register_autograd(_token_logps_backward, setup_context=_setup_token_logps)


# --------------------------------------------------------------------------- unshared


@torch.library.custom_op("ppcompile::unshared", mutates_args=())
def unshared(inputs: list[Tensor], call: str, output: int, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Output ``output`` of a call of a module that is not captured, and will run on unpacked rows.

    A marker: it stands for the module while the graph is captured and rewritten, and ``lower`` replaces it by the call.

    Args:
        inputs: the tensors that the module was called with.
        call: which call of which module, a key of ``PackGraph.unshared``.
        output: which of the tensors that the module returns.
        shape, dtype: of that tensor.
    """
    raise NotImplementedError(f"ppcompile::unshared({call!r}) is a marker; lower replaces it")


@unshared.register_fake
def _(inputs, call, output, shape, dtype):  # type: ignore[no-untyped-def]
    return inputs[0].new_empty(shape, dtype=dtype)
