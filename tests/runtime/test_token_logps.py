"""token_logps against full logits: values, gradients, and what is never allocated."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ppcompile.runtime import ops
from ppcompile.runtime.epilogues import token_logps as epilogue
from ppcompile.runtime.program import evaluate_program

ROWS, HIDDEN, VOCABULARY = 37, 24, 101

HEADS = {
    "linear": "linear(x, c0)",
    "bias": "linear(x, c0, c1)",
    "softcap": "mul(tanh(div(linear(x, c0), 3.0)), 3.0)",
    "learned scale on the logits": "mul(linear(x, c0), c2)",
    "pointwise before the linear map": "linear(mul(x, 0.5), c0, c1)",
    "two linear maps": "linear(tanh(linear(x, c3)), c0)",
    "the bias twice": "add(linear(x, c0, c1), c1)",
}


def operands(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    targets = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    captures = [normal(VOCABULARY, HIDDEN), normal(VOCABULARY), normal(VOCABULARY), normal(HIDDEN, HIDDEN)]
    return normal(ROWS, HIDDEN), targets, captures


def full_logits(hidden: Tensor, targets: Tensor, captures: list[Tensor], head: str) -> Tensor:
    logits = evaluate_program(head, captures, x=hidden)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return logits.to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]


def gradients(function, hidden: Tensor, targets: Tensor, captures: list[Tensor], head: str) -> list[Tensor]:
    """``[logps, dhidden, *dcaptures]``, zero for a capture that the head does not read."""
    weight = torch.linspace(-2, 3, len(targets), dtype=torch.promote_types(hidden.dtype, torch.float32))
    logps = function(hidden, targets, captures, head)
    grads = torch.autograd.grad((logps * weight).sum(), [hidden, *captures], allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for t, g in zip([hidden, *captures], grads, strict=True)]
    return [logps.detach(), *filled]


def packed(hidden: Tensor, targets: Tensor, captures: list[Tensor], head: str) -> Tensor:
    return ops.token_logps(hidden, targets, captures, head)[0]


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows at a time: the last chunk is shorter than the others."""
    monkeypatch.setitem(epilogue.LOGITS_BUDGET, "cpu", 5 * VOCABULARY)


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_equals_full_logits(head, small_chunks):
    hidden, targets, captures = operands(torch.float64)
    found = gradients(packed, hidden, targets, captures, head)
    expected = gradients(full_logits, hidden, targets, captures, head)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_float32_and_one_chunk():
    hidden, targets, captures = operands()
    found = gradients(packed, hidden, targets, captures, HEADS["softcap"])
    for got, want in zip(found, gradients(full_logits, hidden, targets, captures, HEADS["softcap"]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "bias", "softcap"])
def test_which_heads_take_the_in_place_path(head):
    assert epilogue._split(HEADS[head]) is not None


@pytest.mark.parametrize("head", ["pointwise before the linear map", "two linear maps", "the bias twice"])
def test_which_heads_do_not(head):
    assert epilogue._split(HEADS[head]) is None


def test_bfloat16_is_as_close_to_float32_as_full_logits_in_bfloat16(small_chunks):
    narrow = operands(torch.bfloat16)
    hidden, targets, captures = narrow[0].detach().float(), narrow[1], [c.detach().float() for c in narrow[2]]
    exact = gradients(
        full_logits, hidden.requires_grad_(), targets, [c.requires_grad_() for c in captures], HEADS["bias"]
    )
    found = gradients(packed, *narrow, HEADS["bias"])
    ordinary = gradients(full_logits, *narrow, HEADS["bias"])
    assert found[0].dtype == torch.float32
    for got, usual, want in zip(found, ordinary, exact, strict=True):
        # Eight chunks add up in bfloat16, as eight micro-batches would.
        assert (got - want).abs().max() <= 3 * (usual - want).abs().max() + 1e-6


def test_no_scored_slots():
    hidden, targets, captures = operands()
    hidden = hidden[:0].detach().requires_grad_()
    logps, lse = ops.token_logps(hidden, targets[:0], captures, HEADS["bias"])
    assert logps.shape == lse.shape == (0,)
    grads = torch.autograd.grad(logps.sum(), [hidden, captures[0], captures[1]])
    assert all(not grad.any() for grad in grads)


def test_integer_captures_have_no_gradient():
    hidden, targets, captures = operands()
    head = "add(linear(x, c0), mul(c1, 0.01))"
    captures = [captures[0], torch.arange(VOCABULARY)]
    dhidden, dweight, dtable = epilogue.backward(
        torch.ones(ROWS), hidden.detach(), targets, torch.zeros(ROWS), [c.detach() for c in captures], head
    )
    assert dhidden.shape == hidden.shape
    assert dweight.shape == captures[0].shape
    assert dtable.numel() == 0


class LargestResult(TorchDispatchMode):
    """Records the largest tensors that ops allocate, and counts those of one shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.largest, self.shape, self.count = 0, torch.Size(shape), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        fresh = not func.is_view and not func._schema.is_mutable
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and fresh and tensor.dim():
                self.count += tensor.shape == self.shape
                self.largest = max(self.largest, 0 if tensor.shape == self.shape else tensor.numel())
        return result


@pytest.mark.parametrize("head", ["linear", "bias", "softcap"])
def test_never_allocates_all_logits_and_one_weight_gradient_only(head, small_chunks):
    hidden, targets, captures = operands()
    hidden, captures = hidden.detach(), [c.detach() for c in captures[:2]]
    with LargestResult((VOCABULARY, HIDDEN)) as seen:
        logps, lse = epilogue.forward(hidden, targets, captures, HEADS[head])
        epilogue.backward(torch.ones_like(logps), hidden, targets, lse, captures, HEADS[head])
    assert seen.largest <= max(5 * VOCABULARY, ROWS * HIDDEN) < ROWS * VOCABULARY
    assert seen.count == 1


@pytest.mark.parametrize("head", ["bias", "softcap"])
def test_opcheck(head):
    hidden, targets, captures = operands()
    torch.library.opcheck(ops.token_logps, (hidden, targets, captures[:2], HEADS[head]))
