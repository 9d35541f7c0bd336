"""FlexAttention's GPU kernels, forward and backward, against the reference on the same device."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import triton_interpreter
from torch import Tensor

from ppcompile.runtime.attention import flex, reference
from ppcompile.runtime.forest import Forest, forest_from_groups, forest_from_sequences
from ppcompile.runtime.layout import block_lists
from ppcompile.runtime.ops import Layout, Score

# Inductor's advice (TensorFloat32, too few SMs, ...) depends on the device.
pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings("ignore")]

HEADS, SIZE, SCALE = 4, 64, 0.2


def from_forest(forest: Forest) -> Layout:
    arrays = (forest.positions[None], forest.subtree_end, forest.segments)
    return Layout(*(torch.tensor(a, dtype=torch.int64) for a in arrays))


def groups(*lengths: tuple[int, Sequence[int]]) -> Layout:
    return from_forest(forest_from_groups([([1] * prompt, [[2] * n for n in rest]) for prompt, rest in lengths]))


def three_levels() -> Layout:
    """A system prompt, two prompts on it, two responses on each."""
    system, first, second = [1] * 90, [2] * 150, [3] * 70
    turns = [(first, 4, 60), (first, 5, 130), (second, 6, 200), (second, 7, 9)]
    sequences = [np.array(system + turn + [token] * n) for turn, token, n in turns]
    return from_forest(forest_from_sequences(np.concatenate(sequences), np.array([len(s) for s in sequences])))


LAYOUTS = {
    "two responses": groups((300, [70, 150])),
    "nine unequal responses": groups((130, [3, 90, 1, 140, 2, 33, 70, 200, 50])),
    "groups in a row": groups((150, [60, 90]), (40, [110, 30]), (300, [20, 80, 51])),
    "three levels": three_levels(),
    "a multiple of the block size": groups((256, [128, 128])),
    "a full block": groups((140, [70, 30])),
    "less than a block": groups((40, [20, 9]), (7, [12])),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def value_per_slot(layout: Layout) -> Score:
    return Score(SCALE, "add(s, at(c0, j))", captures=(normal(layout.subtree_end.numel(), seed=6),))


PER_HEAD, TABLE, SOFTCAP = normal(HEADS, seed=5), 2 * normal(HEADS, 12, seed=7), "mul(tanh(div(s, 4.0)), 4.0)"
SCORES = {
    "plain": Score(SCALE),
    "window": Score(SCALE, window=100),
    "softcap in a window": Score(SCALE, SOFTCAP, window=33),
    "alibi, learned slopes": Score(SCALE, "add(s, mul(mul(at(c0, h), 0.01), k))", captures=(PER_HEAD,)),
    "learned table of distances": Score(SCALE, "add(s, at(c0, h, clamp(sub(q, k), 0, 11)))", captures=(TABLE,)),
    "a value per key slot": value_per_slot,
    "window written as a program": Score(SCALE, "where(lt(sub(q, k), 50), s, -inf)"),
    "chunks": Score(SCALE, visible="eq(floordiv(q, 64), floordiv(k, 64))"),
    "sinks": Score(SCALE, sinks=2 * PER_HEAD),
    "softcap, window and sinks": Score(SCALE, SOFTCAP, window=70, sinks=2 * PER_HEAD),
}


def site(pack: str, score: str, device: torch.device, dtype: torch.dtype) -> tuple[Layout, Score]:
    """A pack's layout and a way to score, on a device."""
    layout, how = LAYOUTS[pack], SCORES[score]
    how = in_dtype(how(layout) if callable(how) else how, dtype)
    sinks = None if how.sinks is None else how.sinks.to(device)
    how = replace(how, captures=tuple(c.to(device) for c in how.captures), sinks=sinks)
    return Layout(layout.position_ids.to(device), layout.subtree_end.to(device), layout.segments), how


def operands(layout: Layout, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """``query, key, value, grad_out``."""
    shapes = [(HEADS, SIZE), (groups, SIZE), (groups, SIZE), (HEADS, SIZE)]
    length, device = layout.subtree_end.numel(), layout.subtree_end.device
    return [(2 * normal(1, length, *s, seed=n)).to(device, dtype).transpose(1, 2) for n, s in enumerate(shapes)]


def run_flex(tensors: list[Tensor], layout: Layout, how: Score) -> list[Tensor]:
    """``out, dquery, dkey, dvalue``, then the gradients of sinks and of floating captures."""
    leaves = [t.detach().requires_grad_() for t in tensors[:3]]
    captures = [c.clone().requires_grad_(c.is_floating_point()) for c in how.captures]
    sinks = None if how.sinks is None else how.sinks.clone().requires_grad_()
    pack = (layout.position_ids, layout.subtree_end)
    blocks = block_lists(*pack, how.window)
    program = (how.scale, how.program, how.visible, how.window)
    out = flex.flex_prefix_attention(*leaves, *pack, blocks, captures, sinks, *program)
    wanted = [*leaves, *([] if sinks is None else [sinks]), *(c for c in captures if c.requires_grad)]
    return [out.detach(), *torch.autograd.grad(out, wanted, tensors[3])]


def run_reference(tensors: list[Tensor], layout: Layout, how: Score) -> list[Tensor]:
    out, lse = reference.forward(*tensors[:3], layout, how)
    grads = reference.backward(tensors[3], *tensors[:3], out, lse, layout, how)
    return [out, *(g for g in grads if g.numel())]


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("pack", LAYOUTS)
def test_float32(device: torch.device, pack: str, score: str, groups: int) -> None:
    """Triton multiplies float32 in full precision only when told so; the reference does it by default."""
    layout, how = site(pack, score, device, torch.float32)
    tensors = operands(layout, groups, torch.float32)
    exact = run_reference([t.double() for t in tensors], layout, in_dtype(how, torch.float64))
    assert max(relative_errors(run_flex(tensors, layout, how), exact)) < 1e-4


@pytest.mark.parametrize("score", SCORES)
def test_bfloat16(device: torch.device, score: str) -> None:
    """Against float64, with the reference's own error on bfloat16 tensors as the yardstick.

    The reference multiplies in float32, tensor cores in bfloat16: hence the constant.
    """
    layout, how = site("groups in a row", score, device, torch.bfloat16)
    if triton_interpreter.wanted() and any(c.is_floating_point() for c in how.captures):
        pytest.skip("Triton's interpreter adds gradients in bfloat16 as if they were integers")
    tensors = operands(layout, 2, torch.bfloat16)
    exact = run_reference([t.double() for t in tensors], layout, in_dtype(how, torch.float64))
    usual = relative_errors(run_reference(tensors, layout, how), exact)
    found = relative_errors(run_flex(tensors, layout, how), exact)
    assert all(error <= 4 * yardstick + 1e-2 for error, yardstick in zip(found, usual, strict=True)), (found, usual)


def in_dtype(how: Score, dtype: torch.dtype) -> Score:
    captures = tuple(c.to(dtype) if c.is_floating_point() else c for c in how.captures)
    return replace(how, captures=captures, sinks=None if how.sinks is None else how.sinks.to(dtype))
