"""prefix_attention: its reference against torch's SDPA on unpacked sequences, the cascade against its reference."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppcompile.runtime import ops
from ppcompile.runtime.attention import cascade, reference
from ppcompile.runtime.ops import Layout, Score
from ppcompile.runtime.tiles import Grain

HEADS = 4
SCALE = 0.35  # with the inputs below, scores spread over tens: attention is far from uniform

FINE = Grain(rows=8, query_limit=6, key_limit=10, fuse=6, whole=False)
"""Cuts small forests the way the real limits cut long ones."""


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def scores(length: int, dtype: torch.dtype = torch.float64) -> dict[str, Score]:
    """The kinds of score programs that models have, on a pack of ``length`` slots."""
    per_head, per_slot = normal(HEADS, seed=5, dtype=dtype), normal(length, seed=6, dtype=dtype)
    table = 2 * normal(HEADS, 12, seed=7, dtype=dtype)
    return {
        "plain": Score(SCALE),
        "window shorter than segments": Score(SCALE, window=3),
        "window longer than segments": Score(SCALE, window=17),
        "softcap": Score(SCALE, "mul(tanh(div(s, 4.0)), 4.0)"),
        "softcap in a window": Score(SCALE, "mul(tanh(div(s, 4.0)), 4.0)", window=6),
        "alibi, learned slopes": Score(SCALE, "add(s, mul(mul(at(c0, h), 0.1), k))", captures=(per_head,)),
        "learned table of distances": Score(SCALE, "add(s, at(c0, h, clamp(sub(q, k), 0, 11)))", captures=(table,)),
        "a value per key slot": Score(SCALE, "add(s, at(c0, j))", captures=(per_slot,)),
        "window written as a program": Score(SCALE, "where(lt(sub(q, k), 5), s, -inf)"),
        "chunks": Score(SCALE, visible="eq(floordiv(q, 8), floordiv(k, 8))"),
        "chunks that differ by head": Score(
            SCALE, visible="eq(floordiv(q, at(c0, h)), floordiv(k, at(c0, h)))", captures=(torch.tensor([3, 5, 8, 50]),)
        ),
        "chunks, softcap and sinks": Score(
            SCALE, "mul(tanh(div(s, 4.0)), 4.0)", "eq(floordiv(q, 8), floordiv(k, 8))", sinks=2 * per_head
        ),
        "sinks": Score(SCALE, sinks=2 * per_head),
        "sinks in a window": Score(SCALE, window=5, sinks=2 * per_head),
    }


def operands(layout: Layout, groups: int = 2, size: int = 8, value_size: int = 8, dtype: torch.dtype = torch.float64):
    """``query, key, value, grad_out`` in the memory order that models make: slots before heads."""
    length = layout.subtree_end.numel()
    shapes = [(HEADS, size), (groups, size), (groups, value_size), (HEADS, value_size)]
    return [2 * normal(1, length, *shape, seed=n, dtype=dtype).transpose(1, 2) for n, shape in enumerate(shapes)]


def run(backend, tensors: list[Tensor], layout: Layout, how: Score) -> list[Tensor]:
    """``out, lse, dquery, dkey, dvalue, dsinks, *dcaptures``."""
    query, key, value, grad_out = tensors
    out, lse = backend.forward(query, key, value, layout, how)
    return [out, lse, *backend.backward(grad_out, query, key, value, out, lse, layout, how)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["as shipped", "fine tiles"])
def grain(request, monkeypatch):
    if request.param == "fine tiles":
        monkeypatch.setattr(cascade, "BOUNDED", FINE)
        monkeypatch.setattr(cascade, "WHOLE", FINE._replace(whole=True))


# --------------------------------------------------------------------------- the reference


def paths(layout: Layout) -> list[list[int]]:
    """Slots of each root-to-leaf sequence, in order."""
    rows = layout.segments.tolist()
    parents = {parent for *_, parent in rows}
    sequences = []
    for leaf in (n for n in range(len(rows)) if n not in parents):
        slots: list[int] = []
        segment = leaf
        while segment >= 0:
            start, stop, _, parent = rows[segment]
            slots = [*range(start, stop), *slots]
            segment = parent
        sequences.append(slots)
    return sequences


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_reference_is_sdpa_on_unpacked_sequences(layout, groups):
    """Values of every sequence, and gradients summed over the sequences that share a slot."""
    leaves = [t.requires_grad_() for t in operands(layout, groups)[:3]]
    weight = operands(layout, groups)[3]
    how = Score(SCALE)
    packed, _ = reference.forward(*(t.detach() for t in leaves), layout, how)
    shared = torch.zeros(layout.subtree_end.numel())
    total = torch.zeros((), dtype=torch.float64)
    for slots in paths(layout):
        alone = F.scaled_dot_product_attention(
            *(t[:, :, slots] for t in leaves), is_causal=True, scale=SCALE, enable_gqa=True
        )
        torch.testing.assert_close(packed[:, :, slots], alone)
        total = total + (alone * weight[:, :, slots]).sum()
        shared[slots] += 1
    expected = torch.autograd.grad(total, leaves)
    found = run(reference, [*(t.detach() for t in leaves), weight * shared[:, None]], layout, how)[2:5]
    assert_same(found, list(expected), 1e-9)


# --------------------------------------------------------------------------- the cascade


@pytest.mark.parametrize("name", scores(1).keys())
def test_cascade_is_the_reference(layout, name, grain):
    how = scores(layout.subtree_end.numel())[name]
    tensors = operands(layout)
    assert_same(run(cascade, tensors, layout, how), run(reference, tensors, layout, how), 1e-9)


@pytest.mark.parametrize("name", ["plain", "softcap", "window longer than segments", "chunks"])
def test_cascade_on_segments_longer_than_a_tile(long_layout, name):
    how = replace(scores(1, torch.float32)[name], window=150 if "window" in name else 0)
    how = replace(how, visible=how.visible.replace("8", "100"))
    tensors = operands(long_layout, dtype=torch.float32)
    assert_same(run(cascade, tensors, long_layout, how), run(reference, tensors, long_layout, how), 2e-4)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("value_size", [8, 5])
@pytest.mark.parametrize("name", ["plain", "softcap in a window", "sinks"])
def test_grouped_heads_and_value_size(make_layout, groups, value_size, name):
    layout = make_layout([(20, [(7, []), (12, [(5, [])])])])
    how, tensors = scores(44)[name], operands(layout, groups, value_size=value_size)
    assert_same(run(cascade, tensors, layout, how), run(reference, tensors, layout, how), 1e-9)


@pytest.mark.parametrize("name", ["plain", "softcap", "sinks in a window", "learned table of distances"])
def test_bfloat16_is_as_good_as_torch_in_bfloat16(long_layout, name):
    """Against the reference in float32, with SDPA's own bfloat16 error on this pack as the yardstick."""
    exact, narrow = (operands(long_layout, dtype=torch.bfloat16) for _ in range(2))
    exact = [t.float() for t in exact]
    how = scores(1, torch.bfloat16)[name]
    wide = replace(
        how, captures=tuple(c.float() for c in how.captures), sinks=None if how.sinks is None else how.sinks.float()
    )
    found, expected = run(cascade, narrow, long_layout, how), run(reference, exact, long_layout, wide)
    yardstick = sdpa_errors(exact, narrow, long_layout)
    assert found[0].dtype == found[2].dtype == torch.bfloat16
    for got, want, usual in zip(found[2:5], expected[2:5], yardstick[1:], strict=True):
        assert relative_error(got, want) <= 2 * usual
    assert relative_error(found[0], expected[0]) <= 2 * yardstick[0]
    for got, want in zip(found[5:], expected[5:], strict=True):
        assert got.dtype == torch.bfloat16
        assert not want.numel() or relative_error(got, want) <= 2 * max(yardstick)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


def sdpa_errors(exact: list[Tensor], narrow: list[Tensor], layout: Layout) -> list[float]:
    """Relative error of torch's bfloat16 attention: ``out, dquery, dkey, dvalue``."""
    results = []
    for tensors in (exact, narrow):
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        out = F.scaled_dot_product_attention(
            *leaves, attn_mask=reference.visibility(layout), scale=SCALE, enable_gqa=True
        )
        results.append([out.detach(), *torch.autograd.grad(out, leaves, tensors[3])])
    return [relative_error(got, want) for want, got in zip(*results, strict=True)]


@pytest.mark.parametrize("program", ["s", "mul(s, 1.5)"])
@pytest.mark.parametrize("distance", [1, 11])
def test_rows_that_see_nothing_are_zero(layout, grain, program, distance):
    """Only a visibility program makes such rows; the reference says NaN there, and NaN would spread."""
    how = Score(SCALE, program, visible=f"gt(sub(q, k), {distance})")
    out, lse, *grads = run(cascade, operands(layout), layout, how)
    blind = layout.position_ids[0] <= distance
    assert not out[:, :, blind].any()
    assert torch.isneginf(lse[:, :, blind]).all()
    assert all(torch.isfinite(t).all() for t in (out, lse[:, :, ~blind], *grads))


def test_rows_that_see_only_the_sink(layout, grain):
    how = Score(SCALE, "mul(s, 1.5)", visible="gt(sub(q, k), 1)", sinks=normal(HEADS, seed=9))
    tensors = operands(layout)
    assert_same(run(cascade, tensors, layout, how), run(reference, tensors, layout, how), 1e-9)


def test_any_strides(make_layout):
    """The fused kernel reads heads as dense rows without a check; the backend must not let it."""
    layout = make_layout([(20, [(7, []), (12, [])])])
    tensors = operands(layout)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in tensors]
    strided[3] = strided[3][..., :1].expand_as(strided[3])
    tensors[3] = strided[3].contiguous()
    found = run(cascade, strided, layout, Score(SCALE))
    assert_same(found, run(reference, tensors, layout, Score(SCALE)), 1e-9)
    assert [t.stride() for t in found[2:5]] == [torch.empty_like(t).stride() for t in strided[:3]]


def test_a_segment_reaches_its_descendants_only(make_layout):
    layout = make_layout([(9, [(6, [(4, []), (3, [])]), (7, [])]), (5, [(8, [])])])
    tensors = operands(layout)
    before = cascade.forward(*tensors[:3], layout, Score(SCALE))[0]
    for start, stop, end, _ in layout.segments.tolist():
        changed = [t.clone() for t in tensors[:3]]
        for tensor in changed:
            tensor[:, :, start:stop] += 1
        moved = (cascade.forward(*changed, layout, Score(SCALE))[0] != before).any(-1).any(1)[0]
        outside = torch.ones_like(moved)
        outside[start:end] = False
        assert moved[start:end].all()
        assert not moved[outside].any()


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor any op makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        fresh = not func.is_view and not func._schema.is_mutable
        tensors = result if isinstance(result, (tuple, list)) else [result]
        made = [t.numel() for t in tensors if isinstance(t, Tensor) and fresh]
        self.elements = max([self.elements, *made])
        return result


@pytest.mark.parametrize("name", ["plain", "window longer than segments", "softcap", "chunks"])
def test_no_tensor_of_slots_by_slots(make_layout, name):
    layout = make_layout([(700, [(300, []), (250, [(100, []), (90, [])])]), (300, [(200, [])])])
    length = layout.subtree_end.numel()
    with Largest() as seen:
        run(cascade, operands(layout, dtype=torch.float32), layout, scores(1, torch.float32)[name])
    assert seen.elements <= HEADS * cascade.QUERY_LIMIT * cascade.KEY_LIMIT
    assert seen.elements < length * length / 4


# --------------------------------------------------------------------------- the op


@pytest.mark.parametrize("backend", ["reference", "cascade"])
@pytest.mark.parametrize("name", ["plain", "learned table of distances", "chunks, softcap and sinks"])
def test_opcheck(make_layout, backend, name):
    layout = make_layout([(12, [(7, []), (9, [])])], 2)
    how = scores(30)[name]
    leaves = [t.detach().requires_grad_() for t in operands(layout)[:3]]
    captures = [c.clone().requires_grad_(c.is_floating_point()) for c in how.captures]
    sinks = None if how.sinks is None else how.sinks.clone().requires_grad_()
    pack = (layout.position_ids, layout.subtree_end, layout.segments)
    program = (how.scale, how.program, how.visible, how.window, backend)
    torch.library.opcheck(ops.prefix_attention, (*leaves, *pack, captures, sinks, *program))


def test_op_gives_gradients_to_parameters(make_layout):
    """Through autograd, not by calling the backend: a learned table and sinks get the reference's gradients."""
    layout = make_layout([(12, [(7, []), (9, [])])])
    how = replace(scores(28)["learned table of distances"], sinks=normal(HEADS, seed=9))
    query, key, value, grad_out = operands(layout)
    table, sinks = how.captures[0].clone().requires_grad_(), how.sinks.clone().requires_grad_()
    pack = (layout.position_ids, layout.subtree_end, layout.segments)
    out, _ = ops.prefix_attention(
        query, key, value, *pack, [table], sinks, how.scale, how.program, how.visible, how.window, "cascade"
    )
    found = torch.autograd.grad(out, [sinks, table], grad_out)
    assert_same(list(found), run(reference, [query, key, value, grad_out], layout, how)[5:], 1e-9)


def test_backends_say_what_they_cannot_do():
    assert cascade.unsupported(torch.device("cpu"), Score(1.0), needs_grad=True) is None
    assert "meta" in str(cascade.unsupported(torch.device("meta"), Score(1.0), needs_grad=False))
    assert reference.unsupported(torch.device("cuda"), Score(1.0), needs_grad=True) is None


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="reference, cascade, flex"):
        ops.attention_backend("flash")
