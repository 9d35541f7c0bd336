"""The hooks of ``fully_shard`` (FSDP2), called around a part of a packed graph.

FSDP2 gathers a module's weights in hooks around its forward, and frees them again. A packed graph computes what the
forward would have computed without calling it; :func:`run_sharded` calls the hooks around the part of the graph that
stands for the module. Which module a hook belongs to is read off the module, where ``fully_shard`` registered it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["foreign_hook", "only_casts", "policy_of", "run_sharded", "user_hooks"]

Tensors = tuple[Any, ...]


def user_hooks(module: nn.Module) -> tuple[int, int]:
    """How many forward pre-hooks and forward hooks the module has besides those of ``fully_shard``."""
    before, after = module._forward_pre_hooks.values(), module._forward_hooks.values()
    return sum(not _shards(hook) for hook in before), sum(not _shards(hook) for hook in after)


def foreign_hook(module: nn.Module) -> str | None:
    """Where a forward hook comes from that moves data between ranks otherwise than ``fully_shard`` does."""
    for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
        if _home(hook).startswith("torch.distributed.") and not _shards(hook):
            return _home(hook)
    return None


def _shards(hook: Callable[..., Any]) -> bool:
    return _home(hook).startswith("torch.distributed.fsdp")


def _home(hook: Callable[..., Any]) -> str:
    return getattr(hook, "__module__", None) or ""


def policy_of(module: nn.Module) -> Any:
    """The ``MixedPrecisionPolicy`` that ``fully_shard`` was given; torch has no public name for it."""
    sharded: Any = module
    return sharded._get_fsdp_state()._mp_policy


# --------------------------------------------------------------------------- running


def run_sharded(modules: Sequence[nn.Module], run: Callable[..., Tensors], inputs: Tensors) -> Tensors:
    """``run(*inputs)`` as if it were the forward of ``modules``, outermost first.

    Their weights are gathered before and freed after, and in the backward gathered again and their gradients reduced.
    """
    for module in modules:
        inputs = _before(module, inputs)
    outputs = run(*inputs)
    for module in reversed(modules):
        outputs = _after(module, inputs, outputs)
    return outputs


def _before(module: nn.Module, inputs: Tensors) -> Tensors:
    """Call the hooks that gather. They see the inputs that have a gradient, which tell when the backward is done."""
    places = [n for n, value in enumerate(inputs) if isinstance(value, Tensor) and value.requires_grad]
    given = tuple(inputs[n] for n in places)
    for key, hook in module._forward_pre_hooks.items():
        if _shards(hook):
            assert key in module._forward_pre_hooks_with_kwargs, "hooks of fully_shard take keywords"
            seen, _ = hook(module, given, {}) or (given, {})  # a hook that returns nothing leaves things as they are
            given = _as_captured(given, seen)
    replaced = dict(zip(places, given, strict=True))
    return tuple(replaced.get(n, value) for n, value in enumerate(inputs))


def _after(module: nn.Module, inputs: Tensors, outputs: Tensors) -> Tensors:
    """Call the hooks that free. They see the outputs, whose gradients tell when to gather again."""
    for hook in module._forward_hooks.values():
        if _shards(hook):
            outputs = _as_captured(outputs, hook(module, inputs, outputs) or outputs)
    return outputs


def _as_captured(before: Tensors, after: Tensors) -> Tensors:
    """What a hook made of tensors, but for its casts: the graph has those already, where the model's modules meet."""
    return tuple(a if b.dtype == a.dtype else b for b, a in zip(before, after, strict=True))


# --------------------------------------------------------------------------- capture


@contextlib.contextmanager
def only_casts(called: nn.Module, sharded: nn.Module) -> Iterator[None]:
    """Let ``called`` cast what it takes and returns as the policy of ``sharded`` says, and gather nothing."""
    from torch.distributed.utils import _apply_to_tensors  # what fully_shard casts with: the same containers

    apply_to_tensors: Callable[..., Any] = _apply_to_tensors
    policy = policy_of(sharded)
    before, after = dict(called._forward_pre_hooks), dict(called._forward_hooks)
    for hooks in (called._forward_pre_hooks, called._forward_hooks):
        for key in [key for key, hook in hooks.items() if _shards(hook)]:
            del hooks[key]
    handles = []
    if policy.param_dtype and policy.cast_forward_inputs:
        cast = partial(_cast, policy.param_dtype)
        handles.append(
            called.register_forward_pre_hook(
                lambda _module, args, kwargs: (apply_to_tensors(cast, args), apply_to_tensors(cast, kwargs)),
                prepend=True,
                with_kwargs=True,
            )
        )
    if policy.output_dtype:
        cast_back = partial(_cast, policy.output_dtype)
        handles.append(called.register_forward_hook(lambda _module, _args, out: apply_to_tensors(cast_back, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for hooks, found in ((called._forward_pre_hooks, before), (called._forward_hooks, after)):
            hooks.clear()
            hooks.update(found)


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
