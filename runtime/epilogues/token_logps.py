"""Log-probabilities of target tokens from hidden states, without the ``[U, V]`` logits.

    logits = head(hidden)                  in the model's dtype, as the eager model computes them
    lse    = logsumexp(logits)             in float32 (float64 for float64)
    logps  = logits[target] - lse

Rows are taken in chunks of :data:`LOGITS_BUDGET` logits, forward and backward; backward computes each
chunk's logits again and needs only ``lse`` from the forward::

    dlogits = grad * (onehot(target) - exp(logits - lse))

Almost every head is one linear map and something pointwise: ``linear(x, c0)``, gemma2's
``mul(tanh(div(linear(x, c0), 30.0)), 30.0)``. There the weight's gradient is accumulated by
``addmm_``, so that backward holds one ``[V, C]`` buffer and no second one. Other programs are pulled back
whole by ``torch.func.vjp``, at one such temporary per chunk.

Shapes: ``U`` scored slots, ``R`` rows of a chunk, ``C`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..program import compile_program, num_captures

__all__ = ["LOGITS_BUDGET", "backward", "forward"]

LOGITS_BUDGET = {"cpu": 2**24, "cuda": 2**26}
"""Logits per chunk by device: 64 and 256 MiB in float32, of which three or four such buffers live at once.
Each chunk of the backward reads and writes the whole weight gradient, which makes small chunks dear on a GPU."""

Pull = Callable[[Tensor], Tensor]


class _Linear(NamedTuple):
    """A head of the form ``outer(linear(x, weight, bias))``, by capture number; ``outer`` is a program in ``s``."""

    weight: int
    bias: int | None
    outer: str


def forward(hidden: Tensor, targets: Tensor, captures: Sequence[Tensor], head: str) -> tuple[Tensor, Tensor]:
    """See :func:`runtime.ops.token_logps`. Peak extra memory is constant in ``U``."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logps, lse = (torch.empty(targets.shape, dtype=wide, device=hidden.device) for _ in range(2))
    program = compile_program(head, ("x",))
    for rows in _chunks(hidden, captures, head):
        logits_RV = program(hidden[rows], captures).to(wide)
        lse[rows] = torch.logsumexp(logits_RV, dim=-1)
        logps[rows] = logits_RV.gather(1, targets[rows, None])[:, 0] - lse[rows]
    return logps, lse


def backward(
    grad: Tensor, hidden: Tensor, targets: Tensor, lse: Tensor, captures: Sequence[Tensor], head: str
) -> list[Tensor]:
    """See :func:`runtime.ops.token_logps_backward`.

    Gradients accumulate over chunks in the dtype of the capture, as they do over the micro-batches of a
    training loop. All floating captures get one: the op cannot know which are wanted.
    """
    dhidden = torch.empty_like(hidden)
    dcaptures = [torch.zeros_like(c) if c.is_floating_point() else hidden.new_empty(0) for c in captures]
    parts = _split(head)
    for rows in _chunks(hidden, captures, head):
        if parts is None:
            logits_RV, pull = _pull_whole(head, hidden[rows], captures, dcaptures)
        else:
            logits_RV, pull = _pull_linear(parts, hidden[rows], captures, dcaptures)
        dlogits_RV = _logits_gradient(logits_RV, targets[rows], lse[rows], grad[rows])
        dhidden[rows] = pull(dlogits_RV.to(logits_RV.dtype))
    return [dhidden, *dcaptures]


def _chunks(hidden: Tensor, captures: Sequence[Tensor], head: str) -> Iterator[slice]:
    """Slices of rows, each of at most the device's budget of logits (or a single row)."""
    count = hidden.shape[0]
    if count == 0:
        return
    parts = _split(head)
    vocabulary = (
        captures[parts.weight].shape[0] if parts else compile_program(head, ("x",))(hidden[:1], captures).shape[-1]
    )
    size = max(1, LOGITS_BUDGET.get(hidden.device.type, LOGITS_BUDGET["cuda"]) // vocabulary)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _logits_gradient(logits_RV: Tensor, targets_R: Tensor, lse_R: Tensor, grad_R: Tensor) -> Tensor:
    """``grad * (onehot(target) - softmax)``, ``[R, V]`` in the dtype of ``lse``; one buffer."""
    gradient_RV = (logits_RV - lse_R[:, None]).exp_().mul_(-grad_R[:, None])
    return gradient_RV.scatter_add_(1, targets_R[:, None], grad_R.to(gradient_RV.dtype)[:, None])


@functools.cache
def _split(head: str) -> _Linear | None:
    """Read a head as ``outer(linear(x, cN))`` or ``outer(linear(x, cN, cM))``; ``None`` where it is neither."""
    found = re.findall(r"linear\(x, c(\d+)(?:, c(\d+))?\)", head)
    if len(found) != 1:
        return None
    outer = re.sub(r"linear\(x, c\d+(?:, c\d+)?\)", "s", head)
    names = re.findall(r"[a-z_]\w*", outer)
    weight, bias = found[0]
    used_again = {"x", "linear", f"c{weight}", f"c{bias}"} & set(names)
    if used_again or names.count("s") != 1:
        return None
    return _Linear(int(weight), int(bias) if bias else None, outer)


def _pull_linear(
    parts: _Linear, rows_RC: Tensor, captures: Sequence[Tensor], dcaptures: list[Tensor]
) -> tuple[Tensor, Pull]:
    """Logits of one chunk, and the function that adds to ``dcaptures`` and returns the rows' gradient."""
    weight_VC = captures[parts.weight]
    raw_RV = F.linear(rows_RC, weight_VC, None if parts.bias is None else captures[parts.bias])
    logits_RV, pull_outer = _pull_outer(parts, raw_RV, captures, dcaptures)

    def pull(dlogits_RV: Tensor) -> Tensor:
        draw_RV = pull_outer(dlogits_RV)
        dcaptures[parts.weight].addmm_(draw_RV.mT, rows_RC)
        if parts.bias is not None:
            dcaptures[parts.bias].add_(draw_RV.sum(0))
        return draw_RV @ weight_VC

    return logits_RV, pull


def _pull_outer(
    parts: _Linear, raw_RV: Tensor, captures: Sequence[Tensor], dcaptures: list[Tensor]
) -> tuple[Tensor, Pull]:
    if parts.outer == "s":
        return raw_RV, lambda dlogits: dlogits
    read = [n for n in range(num_captures(parts.outer)) if re.search(rf"\bc{n}\b", parts.outer)]
    return _vjp(compile_program(parts.outer, ("s",)), raw_RV, captures, dcaptures, read)


def _pull_whole(head: str, rows_RC: Tensor, captures: Sequence[Tensor], dcaptures: list[Tensor]) -> tuple[Tensor, Pull]:
    return _vjp(compile_program(head, ("x",)), rows_RC, captures, dcaptures, range(len(captures)))


def _vjp(
    program: Callable[..., Tensor],
    first: Tensor,
    captures: Sequence[Tensor],
    dcaptures: list[Tensor],
    read: Sequence[int],
) -> tuple[Tensor, Pull]:
    """Value of ``program(first, captures)`` and its pull-back to ``first``, adding to ``dcaptures`` on the way.

    ``torch.func``, not ``torch.autograd``: inside an op the autograd dispatch keys are switched off.
    """
    floating = [n for n in read if captures[n].is_floating_point()]

    def run(first: Tensor, *values: Tensor) -> Tensor:
        varied = list(captures)
        for n, value in zip(floating, values, strict=True):
            varied[n] = value
        return program(first, varied)

    result, vjp, *_ = torch.func.vjp(run, first, *(captures[n] for n in floating))

    def pull(gradient: Tensor) -> Tensor:
        dfirst, *grads = vjp(gradient)
        for n, grad in zip(floating, grads, strict=True):
            dcaptures[n].add_(grad)
        return dfirst

    return result, pull
