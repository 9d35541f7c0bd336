"""FlexAttention on the CPU, forward only: torch 2.13 has no backward there. tests/cuda has the rest."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ppcompile.runtime import ops
from ppcompile.runtime.attention import flex, reference
from ppcompile.runtime.layout import block_lists
from ppcompile.runtime.ops import Layout, Score

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on the CPU needs g++"),
    # Inductor warns about itself while it imports its own passes.
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),
]

HEADS, GROUPS, SIZE, SCALE = 4, 2, 16, 0.3

# A table has one shape for all packs. dynamic=True makes its sizes symbols all the same, and too many symbols
# trip torch 2.13's C++ template (see flex._compiled); in a model's graph parameters are static anyway.
TABLE = torch.randn(HEADS, 12, generator=torch.Generator().manual_seed(1))
torch._dynamo.mark_static(TABLE)

SCORES = {
    "plain": Score(SCALE),
    "softcap in a window": Score(SCALE, "mul(tanh(div(s, 4.0)), 4.0)", window=70),
    "learned table of distances": Score(SCALE, "add(s, at(c0, h, clamp(sub(q, k), 0, 11)))", captures=(TABLE,)),
    "chunks": Score(SCALE, visible="eq(floordiv(q, 8), floordiv(k, 8))"),
}

FORESTS = [
    ([(300, [(40, []), (220, []), (1, [])]), (7, [(5, [(3, []), (9, [])]), (30, [])])], 13),
    ([(100, [(40, []), (20, [])])], 0),
    ([(400, [(100, [])] * 4)], 4),
    ([(1, [(1, [])] * 9), (500, [(30, [(20, []), (70, [])]), (20, [])])], 0),
]
"""All longer than one block; one of them a multiple of the block size."""


def operands(layout: Layout, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = layout.subtree_end.numel()
    shapes = [(HEADS, SIZE), (GROUPS, SIZE), (GROUPS, SIZE)]
    return [2 * torch.randn(1, length, *s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]


def arguments(tensors: list[Tensor], layout: Layout, how: Score) -> tuple:
    """The arguments of ``flex_prefix_attention``, in order."""
    pack = (layout.position_ids, layout.subtree_end)
    program = (how.scale, how.program, how.visible, how.window)
    return (*tensors, *pack, block_lists(*pack, how.window), how.captures, how.sinks, *program)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.mark.parametrize("name", SCORES.keys())
def test_equals_reference_with_one_artifact_for_all_lengths(make_layout, name):
    how = SCORES[name]
    for forest in FORESTS:
        layout = make_layout(*forest)
        tensors = operands(layout)
        found = flex.flex_prefix_attention(*arguments(tensors, layout, how))
        torch.testing.assert_close(found, reference.forward(*tensors, layout, how)[0], rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_inside_a_larger_graph(make_layout):
    """Two sites with different programs in one compiled function: one graph, no break, nothing opaque."""

    def model(tensors, layout, blocks):
        pack = (layout.position_ids, layout.subtree_end, blocks, (), None)
        first = flex.flex_prefix_attention(*tensors, *pack, SCALE, "s", "True", 0)
        return flex.flex_prefix_attention(first, *tensors[1:], *pack, SCALE, "mul(tanh(div(s, 4.0)), 4.0)", "True", 0)

    compiled = torch.compile(model, dynamic=True, fullgraph=True)
    for forest in FORESTS[:2]:
        layout = make_layout(*forest)
        tensors = operands(layout)
        found = compiled(tensors, layout, block_lists(layout.position_ids, layout.subtree_end, 0))
        first = reference.forward(*tensors, layout, Score(SCALE))[0]
        softcap = Score(SCALE, "mul(tanh(div(s, 4.0)), 4.0)")
        expected = reference.forward(first, *tensors[1:], layout, softcap)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["softcap in a window", "learned table of distances", "sinks"])
def test_gradients_through_torchs_dense_fallback(make_layout, monkeypatch, name):
    """What autograd makes of masks, scores, captures and sinks; not the Triton kernels, which need a GPU.

    Without inductor FlexAttention differentiates a dense implementation, on the CPU too once its check is off.
    """
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *_: None)
    compiled = torch.compile(flex._attend, backend="aot_eager", fullgraph=True, dynamic=False)
    layout = make_layout(*FORESTS[1])
    how = {**SCORES, "sinks": Score(SCALE, sinks=torch.tensor([2.0, -1.0, 0.5, 4.0]))}[name]
    captures = tuple(c.clone().requires_grad_() for c in how.captures)
    sinks = None if how.sinks is None else how.sinks.clone().requires_grad_()
    leaves = [t.detach().requires_grad_() for t in operands(layout)]
    out = compiled(*arguments(leaves, layout, replace(how, captures=captures, sinks=sinks)))
    grad_out = torch.linspace(-1, 1, out.numel()).view_as(out)
    wanted = [*leaves, *captures, *([] if sinks is None else [sinks])]
    found = torch.autograd.grad(out, wanted, grad_out)
    exact, lse = reference.forward(*(t.detach() for t in leaves), layout, how)
    grads = reference.backward(grad_out, *(t.detach() for t in leaves), exact, lse, layout, how)
    for got, want in zip(found, [g for g in grads if g.numel()], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("counts", [(2, 1), (0, 3), (3, 0)])
def test_joined_block_lists(counts):
    num, more = (torch.tensor([[[n]]], dtype=torch.int32) for n in counts)
    indices = torch.tensor([[[[4, 3, 2, 1]]]], dtype=torch.int32)
    total, joined = flex._joined(num, indices, more, indices + 10)
    assert total.item() == 3
    wanted = [*indices[0, 0, 0, : counts[0]].tolist(), *(indices + 10)[0, 0, 0, : counts[1]].tolist()]
    assert joined[0, 0, 0, :3].tolist() == wanted
    assert joined.dtype == torch.int32


def test_says_what_it_cannot_do():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "no backward on the CPU" in str(flex.unsupported(cpu, Score(1.0), needs_grad=True))
    assert "log-sum-exp" in str(flex.unsupported(cpu, Score(1.0, sinks=torch.zeros(HEADS)), needs_grad=False))
    assert flex.unsupported(cpu, Score(1.0), needs_grad=False) is None
    assert flex.unsupported(cuda, Score(1.0, sinks=torch.zeros(HEADS)), needs_grad=True) is None
    assert "meta" in str(flex.unsupported(torch.device("meta"), Score(1.0), needs_grad=False))


def test_torch_still_has_no_backward_on_the_cpu(make_layout):
    """When this fails, flex can train on the CPU, and ``unsupported`` should say so."""
    layout = make_layout(*FORESTS[1])
    tensors = [t.requires_grad_() for t in operands(layout)]
    with pytest.raises(Exception, match="does not support backward on CPU"):
        flex.flex_prefix_attention(*arguments(tensors, layout, SCORES["plain"]))


def test_the_opaque_op_refuses_flex(make_layout):
    layout = make_layout([(5, [(3, [])])])
    pack = (layout.position_ids, layout.subtree_end, layout.segments)
    with pytest.raises(NotImplementedError, match="lower"):
        ops.prefix_attention(*operands(layout), *pack, [], None, SCALE, "s", "True", 0, "flex")
