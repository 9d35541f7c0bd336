"""FlexAttention's GPU kernels without a GPU: inductor's Triton path on CPU tensors, under Triton's interpreter.

``TRITON_INTERPRET=1 pytest tests/cuda`` runs the tests of this folder on a machine without a GPU, slowly. What runs
are torch's own templates, generated as for a GPU with all of a pack's score and mask programs, block lists and
captured tensors, forward and backward; Triton executes them with numpy. What that cannot show: that a kernel compiles
for a chip, fits its memory, and rounds as its tensor cores do.

Torch has no switch for this. It ties the C++ kernels, and the absence of a backward, to the device "cpu" in four
places, which :func:`install` takes out. It does so for the whole process: use it in a process of its own.
"""

from __future__ import annotations

import importlib
import inspect
import os
from types import ModuleType
from typing import Any

import numpy as np
import torch

__all__ = ["install", "wanted"]

CAPABILITY = (9, 0)
"""Of the GPU whose templates are used: an H100 or H200."""

TILE = 64
"""Slots per tile, forward and backward, in every dtype: float32's own 16 x 16 means 16 times as many steps."""


def wanted() -> bool:
    """Whether Triton was told to interpret."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def install() -> None:
    """Make ``torch.compile`` of a FlexAttention on CPU tensors generate, and interpret, the kernels of a GPU.

    Raises:
        ModuleNotFoundError: Triton is not installed.
        LookupError: torch's source is not as expected; this file was written for torch 2.11 to 2.13.
    """
    import triton

    triton.runtime.driver.set_active(_Driver())
    torch._inductor.config.cpu_backend = "triton"
    torch._inductor.config.compile_threads = 1
    torch._inductor.config.force_disable_caches = True
    for name in ("torch.utils._triton", "torch._inductor.codegen.triton"):
        module = importlib.import_module(name)
        if hasattr(module, "triton_hash_with_backend"):
            module.triton_hash_with_backend = lambda: "interpreter"  # type: ignore[attr-defined]

    lowering = importlib.import_module("torch._inductor.kernel.flex.flex_attention")
    _rewrite(lowering, "flex_attention", 'query.get_device().type == "cpu"', "False")
    front = importlib.import_module("torch.nn.attention.flex_attention")
    _rewrite(front, "_validate_device", 'query.device.type == "cpu" and', "False and")
    _rewrite(front, "_apply_kernel_options", 'device.type == "cpu"', 'device.type == "none"')
    _use_configs_of_a_gpu()
    _interpret_libdevice()
    _interpret_atomics()
    _interpret_bfloat16_products()


class _Driver:
    """As much of a Triton driver as code generation asks for."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def _rewrite(module: ModuleType, function: str, old: str, new: str) -> None:
    """Define a function of a module again, with one condition replaced."""
    source = inspect.getsource(getattr(module, function))
    if old not in source:
        raise LookupError(f"{module.__name__}.{function} of torch {torch.__version__} does not contain {old!r}")
    exec(compile(source.replace(old, new), f"<{function}, interpreted>", "exec"), module.__dict__)


def _use_configs_of_a_gpu() -> None:
    from torch._inductor.choices import InductorChoices
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic, FlexBwDConfig, FlexConfig

    torch.cuda.get_device_capability = lambda *_: CAPABILITY  # type: ignore[assignment]

    def forward(*_: Any) -> list[Any]:
        return [FlexConfig(TILE, TILE, 1, 4)]

    def backward(*_: Any) -> list[Any]:
        return [FlexBwDConfig(TILE, TILE, TILE, TILE, 1, 4)]

    def decode(_: Any, head_dim: int, dtype: torch.dtype, *__: Any) -> list[Any]:
        configs: list[Any] = CUDAConfigHeuristic().get_flex_decode_configs(head_dim, dtype)
        return configs

    InductorChoices.get_flex_attention_fwd_configs = forward  # type: ignore[method-assign]
    InductorChoices.get_flex_attention_bwd_configs = backward  # type: ignore[method-assign]
    InductorChoices.get_flex_decode_configs = decode  # type: ignore[method-assign]


def _interpret_libdevice() -> None:
    """CUDA's mathematical functions, which the interpreter leaves out."""
    from torch._inductor.runtime.triton_compat import libdevice
    from triton.language.core import tensor
    from triton.runtime.interpreter import TensorHandle

    def interpreted(function: Any) -> Any:
        def call(x: Any) -> Any:
            return tensor(TensorHandle(function(torch.from_numpy(x.handle.data)).numpy(), x.handle.dtype), x.type)

        return call

    for name in ("cos", "erf", "exp", "expm1", "log", "log1p", "rsqrt", "sin", "tanh"):
        setattr(libdevice, name, interpreted(getattr(torch, name)))


def _interpret_atomics() -> None:
    """Triton 3.7 reads a broadcast mask as if it lay in memory element by element, and leaves most additions out."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_atomic_rmw

    def create_atomic_rmw(self: Any, op: Any, *operands: Any) -> Any:
        dense = [TensorHandle(np.ascontiguousarray(x.data), x.dtype) for x in operands[:3]]
        return original(self, op, *dense, *operands[3:])

    InterpreterBuilder.create_atomic_rmw = create_atomic_rmw


def _interpret_bfloat16_products() -> None:
    """Triton 3.7 keeps bfloat16 as the integers of its bits, and multiplies matrices of those."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    original = InterpreterBuilder.create_dot

    def wide(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return original(self, wide(a), wide(b), *others)

    InterpreterBuilder.create_dot = create_dot
