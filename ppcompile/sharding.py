"""Which modules of a model ``fully_shard`` (FSDP2) was applied to, and how a graph is captured nevertheless.

Sharded weights are in pieces, one on each rank. A graph is captured from weights of the shapes and dtypes that the
forward will see, without any data (:meth:`Sharding.weightless`); what a pass wants to compute with is gathered when it
asks. When the graph runs, a layer's shards are gathered for the layer, and all others for the whole graph
(``ppcompile.shard_hooks``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .shard_hooks import foreign_hook, only_casts, policy_of

__all__ = ["MARKS", "Sharding", "is_sharded"]

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    _SHARDED_MODULE: tuple[type, ...] = (FSDPModule,)
    _SHARDED_TENSOR: tuple[type, ...] = (DTensor,)
else:  # a build of torch without it shards nothing
    _SHARDED_MODULE = _SHARDED_TENSOR = ()

MARKS = ("_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""Attributes that ``fully_shard`` leaves on modules, and that say nothing about what they compute."""


def is_sharded(tensor: Tensor) -> bool:
    """True for one rank's piece of a tensor."""
    return isinstance(tensor, _SHARDED_TENSOR)


def _is_sharded_module(module: nn.Module) -> bool:
    return isinstance(module, _SHARDED_MODULE)


class Sharding:
    """Which modules of a model ``fully_shard`` was applied to.

    Args:
        model: the user's model.
        face: the wrapped model, which stands for the user's model if ``fully_shard`` was applied to it instead.
    """

    def __init__(self, model: nn.Module, face: nn.Module) -> None:
        self._model = model
        self._modules: dict[str, nn.Module] = {}
        for path, module in model.named_modules():
            if _is_sharded_module(module):
                self._modules[path] = module
            elif (hook := foreign_hook(module)) is not None:
                raise ValueError(_not_run(path, hook))
        self._face_is_sharded = _is_sharded_module(face)
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
        policies = ((path, policy_of(module)) for path, module in self._modules.items())
        return tuple((path, policy) for path, policy in policies if policy.param_dtype or policy.output_dtype)

    def dtype(self, name: str, parameter: nn.Parameter) -> torch.dtype:
        """The dtype in which the forward sees a parameter."""
        sharder = self._sharder(name)
        if sharder is None or not is_sharded(parameter) or not parameter.is_floating_point():
            return parameter.dtype
        return policy_of(sharder).param_dtype or parameter.dtype

    def device(self, parameter: nn.Parameter) -> torch.device:
        """Where the forward sees a parameter: pieces may wait in host memory for a device that computes."""
        if not is_sharded(parameter):
            return parameter.device
        piece: Any = parameter
        kind = piece.device_mesh.device_type
        if piece.device.type in ("meta", kind):
            return parameter.device
        return torch.device(kind, torch.get_device_module(kind).current_device())

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
        dtype = policy_of(face).output_dtype if self._face_is_sharded else None
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
                stack.enter_context(only_casts(self._model if not path else module, module))
            pieces = stack.enter_context(self._empty_parameters())
            yield lambda values: _Gathered(values, pieces) if pieces else values

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Let all ranks hold all weights for a while, so that the model's modules can be called."""
        with contextlib.ExitStack() as stack:
            for path, module in self._modules.items():
                stack.enter_context(only_casts(self._model if not path else module, module))
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
                value = torch.empty(parameter.shape, dtype=self.dtype(name, parameter), device=self.device(parameter))
                value.untyped_storage().resize_(0)  # no memory behind it
                stand_ins[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
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


def _not_run(path: str, hook: str) -> str:
    return (
        f"{path or 'the model'} has a hook of {hook}, which the packed graph would not run; accepted: those of "
        "fully_shard. Other parallelism goes around the wrapped model: DistributedDataParallel(ppcompile.wrap(model))"
    )


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
        if piece is None or value.device.type == "meta":
            return value
        whole: Tensor = piece.detach().full_tensor().to(value.device, value.dtype)
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@contextlib.contextmanager
def _unsharded(module: nn.Module) -> Iterator[None]:
    sharded: Any = module
    sharded.unshard()
    try:
        yield
    finally:
        sharded.reshard()
