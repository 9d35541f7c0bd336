"""``fully_shard`` (FSDP2) and packed graphs.

FSDP2 gathers a module's weights in hooks around its forward, and frees them again. A packed graph computes what the
module's forward would have computed without calling it, so the hooks are called around the part of the graph that
stands for the module (:func:`run_sharded`): those of a layer around the layer, all others around the whole graph.

Sharded weights are in pieces, one on each rank. A graph is captured from weights of the shapes and dtypes that the
forward will see, without any data (:meth:`Sharding.weightless`); what a pass wants to compute with is gathered when it
asks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MARKS", "Sharding", "is_sharded", "run_sharded", "user_hooks"]

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from torch.distributed.utils import _apply_to_tensors

    _SHARDED_MODULE: tuple[type, ...] = (FSDPModule,)
    _SHARDED_TENSOR: tuple[type, ...] = (DTensor,)
else:  # a build of torch without it shards nothing
    _SHARDED_MODULE = _SHARDED_TENSOR = ()

Tensors = tuple[Any, ...]
MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""Attributes that ``fully_shard`` leaves on modules, and that say nothing about what they compute."""


def is_sharded(tensor: Tensor) -> bool:
    """True for one rank's piece of a tensor."""
    return isinstance(tensor, _SHARDED_TENSOR)


def user_hooks(module: nn.Module) -> tuple[int, int]:
    """How many forward pre-hooks and forward hooks the module has besides those of ``fully_shard``."""
    before, after = module._forward_pre_hooks.values(), module._forward_hooks.values()
    return sum(not _shards(hook) for hook in before), sum(not _shards(hook) for hook in after)


def _shards(hook: Callable[..., Any]) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp")


class Sharding:
    """Which modules of a model ``fully_shard`` was applied to.

    Args:
        model: the user's model.
        face: the wrapped model, which stands for the user's model if ``fully_shard`` was applied to it instead.
    """

    def __init__(self, model: nn.Module, face: nn.Module) -> None:
        self._model = model
        self._modules = {path: module for path, module in model.named_modules() if isinstance(module, _SHARDED_MODULE)}
        self._face_is_sharded = isinstance(face, _SHARDED_MODULE)
        if self._face_is_sharded:
            if "" in self._modules:
                raise ValueError(
                    "fully_shard was applied to the model and to its wrapped face; accepted: one of the two"
                )
            self._modules = {"": face, **self._modules}
        self._check_output_dtype(face)

    def __bool__(self) -> bool:
        return bool(self._modules)

    def inside(self, path: str) -> list[nn.Module]:
        """The sharded modules at or below ``path``, outermost first."""
        return [m for name, m in self._modules.items() if name == path or name.startswith(f"{path}.")]

    def outside(self, paths: Sequence[str]) -> list[nn.Module]:
        """The sharded modules in none of ``paths``, outermost first; not the face, whose call runs its hooks."""
        covered = {id(module) for path in paths for module in self.inside(path)}
        found = [m for m in self._modules.values() if id(m) not in covered]
        return found[self._face_is_sharded :]

    @property
    def casts(self) -> Hashable:
        """What sharding changes in the numbers that the model computes: nothing, or casts to other dtypes."""
        policies = ((path, _policy(module)) for path, module in self._modules.items())
        return tuple((path, policy) for path, policy in policies if policy.param_dtype or policy.output_dtype)

    def dtype(self, name: str, parameter: nn.Parameter) -> torch.dtype:
        """The dtype in which the forward sees a parameter."""
        sharder = self._sharder(name)
        if sharder is None or not is_sharded(parameter) or not parameter.is_floating_point():
            return parameter.dtype
        return _policy(sharder).param_dtype or parameter.dtype

    def _sharder(self, name: str) -> nn.Module | None:
        """The module whose ``fully_shard`` took the parameter: the innermost around it."""
        path = name
        while path:
            path = path.rpartition(".")[0]
            if path in self._modules:
                return self._modules[path]
        return None

    def _check_output_dtype(self, face: nn.Module) -> None:
        """Casting what the wrapped model returns is up to ``fully_shard``; log-probabilities must survive it."""
        dtype = _policy(face).output_dtype if self._face_is_sharded else None
        if dtype is not None and dtype.itemsize < torch.float32.itemsize:
            raise ValueError(
                f"fully_shard(..., mp_policy=...) with output_dtype={dtype} would round the log-probabilities; "
                "accepted: torch.float32 or None. Try: fully_shard(model) before ppcompile.wrap(model)"
            )

    # ------------------------------------------------------------------ capture

    @contextlib.contextmanager
    def weightless(self) -> Iterator[Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]]:
        """While the model is captured, let empty tensors of full size stand for its sharded parameters.

        Hooks of ``fully_shard`` are replaced by the casts that they make. Yields a function that takes tensors by name,
        stand-ins among them, and returns a mapping that gathers those when they are read, on all ranks at once.

        Raises:
            ValueError: a sharded parameter that ``fully_shard`` does not manage.
        """
        with contextlib.ExitStack() as stack:
            for path, module in self._modules.items():
                stack.enter_context(_only_casts(self._model if not path else module, module))
            pieces = stack.enter_context(self._empty_parameters())
            yield lambda values: _Gathered(values, pieces) if pieces else values

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Let all ranks hold all weights for a while, so that the model's modules can be called."""
        with contextlib.ExitStack() as stack:
            for path, module in self._modules.items():
                stack.enter_context(_only_casts(self._model if not path else module, module))
                stack.enter_context(_unsharded(module))
            yield

    @contextlib.contextmanager
    def _empty_parameters(self) -> Iterator[dict[Tensor, Tensor]]:
        """Yields the sharded parameter by the tensor that stands for it."""
        stand_ins: dict[Tensor, nn.Parameter] = {}
        for name, parameter in self._model.named_parameters():
            if is_sharded(parameter):
                if self._sharder(name) is None:
                    raise ValueError(_not_managed(name))
                stand_ins[parameter] = _empty(parameter, self.dtype(name, parameter))
        owners = [module for module in self._model.modules() if any(p in stand_ins for p in _own(module).values())]
        before = {module: _own(module) for module in owners}
        try:
            for module, parameters in before.items():
                module._parameters.update({n: stand_ins.get(p, p) for n, p in parameters.items()})
            yield {stand_in: parameter for parameter, stand_in in stand_ins.items()}
        finally:
            for module, parameters in before.items():
                module._parameters.update(parameters)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def _empty(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """A parameter of the full shape, on the device that computes, that holds no memory."""
    piece: Any = parameter
    kind = piece.device_mesh.device_type  # weights may wait in host memory for a device that computes
    value = torch.empty(piece.shape, dtype=dtype, device=piece.device if piece.device.type in ("meta", kind) else kind)
    value.untyped_storage().resize_(0)
    return nn.Parameter(value, requires_grad=parameter.requires_grad)


def _not_managed(name: str) -> str:
    return (
        f"the parameter {name!r} is a DTensor that fully_shard does not manage; accepted: plain parameters, and those "
        "of fully_shard(layer) and fully_shard(model). Tensor parallelism cannot be captured"
    )


class _Gathered(Mapping[str, Tensor]):
    """Tensors by name; of a stand-in, the values that all ranks hold together."""

    def __init__(self, values: Mapping[str, Tensor], pieces: Mapping[Tensor, Tensor]) -> None:
        self._values, self._pieces = values, pieces

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        piece: Any = self._pieces.get(value)
        whole: Tensor = value if piece is None else piece.detach().full_tensor().to(value.device, value.dtype)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@contextlib.contextmanager
def _only_casts(called: nn.Module, sharded: nn.Module) -> Iterator[None]:
    """Let ``called`` cast what it takes and returns as the policy of ``sharded`` says, and gather nothing."""
    policy = _policy(sharded)
    before, after = dict(called._forward_pre_hooks), dict(called._forward_hooks)
    for hooks in (called._forward_pre_hooks, called._forward_hooks):
        for key in [key for key, hook in hooks.items() if _shards(hook)]:
            del hooks[key]
    handles = []
    if policy.param_dtype and policy.cast_forward_inputs:
        cast = partial(_cast, policy.param_dtype)
        handles.append(
            called.register_forward_pre_hook(
                lambda _module, args, kwargs: (_apply_to_tensors(cast, args), _apply_to_tensors(cast, kwargs)),
                prepend=True,
                with_kwargs=True,
            )
        )
    if policy.output_dtype:
        cast_back = partial(_cast, policy.output_dtype)
        handles.append(called.register_forward_hook(lambda _module, _args, out: _apply_to_tensors(cast_back, out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for hooks, found in ((called._forward_pre_hooks, before), (called._forward_hooks, after)):
            hooks.clear()
            hooks.update(found)


@contextlib.contextmanager
def _unsharded(module: nn.Module) -> Iterator[None]:
    sharded: Any = module
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _policy(module: nn.Module) -> Any:
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
            seen, _ = hook(module, given, {})
            given = _as_captured(given, seen)
    replaced = dict(zip(places, given, strict=True))
    return tuple(replaced.get(n, value) for n, value in enumerate(inputs))


def _after(module: nn.Module, inputs: Tensors, outputs: Tensors) -> Tensors:
    """Call the hooks that free. They see the outputs, whose gradients tell when to gather again."""
    for hook in module._forward_hooks.values():
        if _shards(hook):
            outputs = _as_captured(outputs, hook(module, inputs, outputs))
    return outputs


def _as_captured(before: Tensors, after: Tensors) -> Tensors:
    """What a hook made of tensors, but for its casts: the graph has those already, where the model's modules meet."""
    return tuple(a if b.dtype == a.dtype else b for b, a in zip(before, after, strict=True))
