"""These tests run on a GPU or, slowly, under Triton's interpreter: ``TRITON_INTERPRET=1 pytest tests/cuda``."""

from __future__ import annotations

import pytest
import torch
import triton_interpreter

from ppcompile.runtime.attention import flex

if triton_interpreter.wanted():
    triton_interpreter.install()


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where FlexAttention's Triton kernels run; skips where nothing runs them."""
    if triton_interpreter.wanted():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("FlexAttention's backward needs a CUDA device, or TRITON_INTERPRET=1 and Triton")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def compiled_afresh() -> None:
    """Otherwise the artifacts of one test count against the recompile limit of the next."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(autouse=True)
def flex_takes_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted, the CPU has everything that a GPU has."""
    if triton_interpreter.wanted():
        monkeypatch.setattr(flex, "unsupported", lambda *_: None)
