"""What would be silently wrong is refused, by module and op."""

from __future__ import annotations

import pytest
import torch
import zoo

import ppcompile


@pytest.mark.parametrize("name", zoo.REFUSED)
def test_refused_by_name(name: str) -> None:
    build, module, op = zoo.REFUSED[name]
    with pytest.raises(ppcompile.NotPackable) as caught:
        ppcompile.wrap(build())
    refusal = caught.value.refusal
    assert refusal.module == module
    assert op in refusal.op
    assert refusal.source
    assert refusal.reason in str(caught.value)


def test_attention_dropout_while_training() -> None:
    model = zoo._transformers("gpt2", attn_pdrop=0.1)()
    assert ppcompile.wrap(model).eval() is not None
    with pytest.raises(ppcompile.NotPackable, match="dropout in attention while training") as caught:
        ppcompile.wrap(model.train())
    assert caught.value.refusal.module == "transformer.h.0.attn"


def test_state_that_carries_over_is_refused() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.PlainGPT()
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            self.steps.add_(1)
            return self.inner(ids) * self.steps

    with pytest.raises(ppcompile.NotPackable, match="steps"):
        ppcompile.wrap(Counter())


def test_control_flow_that_depends_on_data_is_refused_with_its_cause() -> None:
    class Branches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.PlainGPT()

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.inner(ids) if ids.sum() > 3 else -self.inner(ids)

    with pytest.raises(ppcompile.NotPackable, match="could not capture") as caught:
        ppcompile.wrap(Branches())
    assert caught.value.__cause__ is not None


def test_a_backward_hook_is_refused() -> None:
    model = zoo.EXACT["plain_fused"]()
    model.norm.register_full_backward_hook(lambda _module, grads, _out: (grads[0] * 0.1,))
    with pytest.raises(ppcompile.NotPackable, match="a backward hook") as caught:
        ppcompile.wrap(model)
    assert caught.value.refusal.module == "norm"


def test_a_capture_leaves_no_tensor_behind() -> None:
    class Remembers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.PlainGPT()
            self.cache: torch.Tensor | None = None

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            if self.cache is None or self.cache.shape[0] < ids.shape[1]:
                self.cache = torch.arange(ids.shape[1])
            return self.inner(ids) + self.cache[: ids.shape[1], None]

    model = Remembers()
    with pytest.raises(ppcompile.NotPackable):
        ppcompile.wrap(model)
    assert model.cache is None
