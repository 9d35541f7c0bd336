"""Modules that stay as they are: seen at work, kept out of the capture, called on unpacked rows.

A module that mixes tokens otherwise than by attention is not captured. It is watched on three small batches, which tell
what stands where in the tensors that it takes and returns; a marker (``runtime.ops.unshared``) stands for it in the
graph; and when the packed graph runs, the user's own module is called.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .foreign_tensors import ForeignTensors, own_tensors
from .module_state import Attributes
from .passes.base import NotPackable, Refusal
from .passes.unshare import Axes, UnsharedCall, is_row_per_token
from .runtime import ops

__all__ = ["CannotWatch", "Unsharing", "Watched", "observe", "standing_in"]

Unsharing = dict[str, str]
"""Paths of the modules that stay as they are, and why."""

_LENGTHS = (11, 13)  # primes
_ROWS = 2
_PLAIN = (bool, int, float, str, torch.dtype, torch.device)


class CannotWatch(Exception):
    """The model cannot be run on small batches, so nothing can be said of its modules."""


class UnsharedModule(nn.Module):
    """One call of a user's module, as a function of tensors.

    Args:
        wrapped: the user's module.
        spec: how ``(args, kwargs)`` of the call nest.
        leaves: what was given, ``None`` in the places of tensors.
        places: the places of the tensors.
    """

    def __init__(self, wrapped: nn.Module, spec: TreeSpec, leaves: Sequence[Any], places: Sequence[int]) -> None:
        super().__init__()
        # Not registered: the parameters are the model's.
        self.__dict__["wrapped"] = wrapped
        self._spec, self._leaves, self._places = spec, list(leaves), list(places)

    def bound_to(self, other: nn.Module) -> UnsharedModule:
        """The same call of another module."""
        return UnsharedModule(other, self._spec, self._leaves, self._places)

    @torch.compiler.disable
    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors that the module returns, in order. Its hooks were captured around the call; none runs here."""
        leaves = list(self._leaves)
        for place, tensor in zip(self._places, tensors, strict=True):
            leaves[place] = tensor
        args, kwargs = tree_unflatten(leaves, self._spec)
        returned, _ = tree_flatten(self.__dict__["wrapped"].forward(*args, **kwargs))
        return tuple(value for value in returned if isinstance(value, Tensor))

    def extra_repr(self) -> str:
        """Whose call it is."""
        return type(self.__dict__["wrapped"]).__name__


# --------------------------------------------------------------------------- watching


@dataclass
class _Nest:
    """What a module was given or returned: a nest of tensors and plain values."""

    leaves: list[Any]
    spec: TreeSpec

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def same_but_for_sizes(self, other: _Nest) -> bool:
        plain = zip(self.leaves, other.leaves, strict=False)
        return self.spec == other.spec and all(
            isinstance(b, Tensor) and a.dim() == b.dim() if isinstance(a, Tensor) else type(a) is type(b) and a == b
            for a, b in plain
        )


@dataclass
class _Seen:
    """One call of one module: copies of what went in and out, and the random state before and after."""

    given: _Nest
    random: _RandomState
    versions: list[int]
    returned: _Nest | None = None
    random_after: _RandomState | None = None
    overwrites: bool = False


class _RandomState:
    """Of the CPU and all GPUs, to draw the same numbers again."""

    def __init__(self) -> None:
        self._cpu = torch.random.get_rng_state()
        self._gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restore(self) -> None:
        torch.random.set_rng_state(self._cpu)
        if self._gpus:
            torch.cuda.set_rng_state_all(self._gpus)


@dataclass(eq=False)
class Watched:
    """A module and its calls, in order, as :func:`observe` saw them; ``unfit`` says why it cannot stay as it is."""

    path: str
    calls: list[tuple[UnsharedCall, _Nest, _Nest]] = field(default_factory=list)
    unfit: str = ""


def observe(model: nn.Module, why: Mapping[str, str], run: Callable[[nn.Module, Tensor], Any]) -> dict[str, Watched]:
    """Run the model on three small batches and find the axes of what the modules take and return.

    Then make sure that what was seen is all there is: a module alone, on what it was given in the first batch, must
    return what it returned then (else it reads something else, too), and the model must make the same logits when the
    modules' results are handed out without running them (else they leave something else behind, too). Other batches ran
    in between, so that nothing is left over from the first one.

    Args:
        model: the user's model; its buffers and attributes are left as found.
        why: paths of modules, and what kept them from being packed.
        run: calls the model on token ids ``[rows, length]``.

    Raises:
        CannotWatch: the model fails on such batches.
    """
    own = {path: own_tensors(model.get_submodule(path)) for path in why}
    small = ((1, _LENGTHS[0]), (1, _LENGTHS[1]), (_ROWS, _LENGTHS[0]))
    ids = [_ids(model, *size, seed) for seed, size in enumerate(small)]
    try:
        seen, logits = zip(*(_watch(model, why, run, batch) for batch in ids), strict=True)
    # A model that cannot run on such rows may raise anything.
    except Exception as error:
        raise CannotWatch(f"the model fails on {_ROWS} rows of {_LENGTHS[0]} tokens: {error}") from error
    found = {path: _understood(model, path, why[path], [calls[path] for calls in seen]) for path in why}
    if logits[0].device.type != "meta":
        # First of all, while what the modules left behind is that of another batch.
        replayed = {path: seen[0][path] for path, watched in found.items() if not watched.unfit}
        if replayed and not _gives(logits[0], lambda: _replay(model, replayed, run, ids[0])):
            for path in replayed:
                found[path].unfit = "it leaves something behind that other modules read"
        for path, watched in found.items():
            watched.unfit = watched.unfit or _reads_more(model, seen[0][path], watched, own[path])
    return found


def _ids(model: nn.Module, rows: int, length: int, seed: int) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, _vocabulary(model), (rows, length), generator=generator).to(device)


def _vocabulary(model: nn.Module) -> int:
    """Token ids that the model surely knows: those of its configuration, else of its smallest table."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        return int(config.get_text_config().vocab_size)
    return min((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=2)


def _watch(
    model: nn.Module, paths: Collection[str], run: Callable[[nn.Module, Tensor], Any], ids: Tensor
) -> tuple[dict[str, list[_Seen]], Tensor]:
    """The calls of each module while the model runs, and the logits."""
    calls: dict[str, list[_Seen]] = {path: [] for path in paths}
    with contextlib.ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(_note_given(calls[path]), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_note_returned(calls[path]), with_kwargs=True).remove)
        stack.enter_context(_trying(model))
        stack.enter_context(_as_captured())
        return calls, run(model, ids)


@contextlib.contextmanager
def _trying(model: nn.Module) -> Iterator[None]:
    with _left_as_found(model), torch.random.fork_rng(), torch.no_grad():
        yield


def _as_captured() -> contextlib.AbstractContextManager[Any]:
    """What a model leaves out where it can ask what is in its tensors (a mask that hides nothing), it makes as well."""
    return mock.patch.object(torch.compiler, "is_exporting", return_value=True)


def _note_given(calls: list[_Seen]) -> Callable[..., None]:
    def note(_module: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append(_Seen(_copied((args, kwargs)), _RandomState(), _versions((args, kwargs))))

    return note


def _note_returned(calls: list[_Seen]) -> Callable[..., None]:
    def note(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = next(call for call in reversed(calls) if call.returned is None)
        call.returned, call.random_after = _copied(output), _RandomState()
        call.overwrites = _versions((args, kwargs)) != call.versions

    return note


def _versions(value: Any) -> list[int]:
    return [leaf._version for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _nest(value: Any) -> _Nest:
    return _Nest(*tree_flatten(value))


def _copied(value: Any) -> _Nest:
    nest = _nest(value)
    nest.leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in nest.leaves]
    return nest


# --------------------------------------------------------------------------- nothing else goes in or out


def _reads_more(model: nn.Module, calls: Sequence[_Seen], watched: Watched, own: Sequence[Tensor]) -> str:
    """What is wrong if the module alone reads a tensor of others, or does not return what it did inside the model."""
    for call, (unshared, _, _) in zip(calls, watched.calls, strict=True):
        with _trying(model):
            call.random.restore()
            given = [tensor.clone() for tensor in call.given.tensors]
            try:
                with ForeignTensors([*own, *given]) as foreign:
                    alone = unshared.module(*given)
            # Without what the model gives it besides its arguments, a module may raise anything.
            except Exception as error:  # noqa: BLE001
                return f"called alone, it fails: {type(error).__name__}: {error}"
        if foreign.found is not None:
            return f"{foreign.found} in it reads a tensor that it is not called with"
        if call.returned is None or not all(map(_alike, alone, call.returned.tensors)):
            return "it reads something that it is not called with"
    return ""


def _gives(expected: Tensor, run: Callable[[], Tensor]) -> bool:
    try:
        return _alike(run(), expected)
    # Without what the modules leave behind, the model may raise anything.
    except Exception:  # noqa: BLE001
        return False


def _replay(
    model: nn.Module, calls: Mapping[str, Sequence[_Seen]], run: Callable[[nn.Module, Tensor], Any], ids: Tensor
) -> Tensor:
    """The logits of the model whose modules hand out what they returned before, and do nothing else."""
    handing = {path: _handing_out(seen) for path, seen in calls.items()}
    with _trying(model), _as_captured(), _forwards_replaced(model, handing):
        logits: Tensor = run(model, ids)
        return logits


def _handing_out(calls: Sequence[_Seen]) -> Callable[..., Any]:
    waiting = iter(calls)

    def forward(*_args: Any, **_kwargs: Any) -> Any:
        call = next(waiting)
        assert call.returned is not None
        assert call.random_after is not None
        call.random_after.restore()
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in call.returned.leaves]
        return tree_unflatten(leaves, call.returned.spec)

    return forward


def _alike(a: Tensor, b: Tensor) -> bool:
    """The same computation on the same numbers: equal but for kernels that add up in no fixed order."""
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()), equal_nan=True)


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Put buffers and attributes back, unless the forward changed weights: then they belong to the weights of now.

    (RWKV divides its weights at its first call in eval mode, and remembers that it did.)
    """
    buffers = [(buffer, buffer.clone(), buffer._version) for buffer in model.buffers()]
    weights = [(parameter, parameter._version) for parameter in model.parameters()]
    attributes = Attributes(model)
    try:
        yield
    finally:
        if all(parameter._version == version for parameter, version in weights):
            attributes.restore()
            with torch.no_grad():
                for buffer, value, version in buffers:
                    if buffer._version != version:
                        buffer.copy_(value)


# --------------------------------------------------------------------------- understanding


def _understood(model: nn.Module, path: str, why: str, runs: list[list[_Seen]]) -> Watched:
    """The calls of one module, the same ones in three runs, as calls on tensors with known axes."""
    watched = Watched(path)
    if len({len(calls) for calls in runs}) != 1 or not runs[0]:
        watched.unfit = "it is not called the same number of times for every row"
        return watched
    module = model.get_submodule(path)
    for number, calls in enumerate(zip(*runs, strict=True)):
        given = [call.given for call in calls]
        returned = [call.returned for call in calls if call.returned is not None]
        finding = _unfit(given) or (_unfit(returned) if len(returned) == len(calls) else "a call did not return")
        finding = finding or ("it overwrites what it is given" if any(call.overwrites for call in calls) else "")
        if finding:
            watched.unfit = finding
            return watched
        inputs, outputs = (tuple(_axes(shapes) for shapes in _shapes(nests)) for nests in (given, returned))
        if not any(map(is_row_per_token, inputs)):
            watched.unfit = "it takes nothing that is one row per token"
            return watched
        if not any(map(is_row_per_token, outputs)):
            watched.unfit = "it returns nothing that is one row per token"
            return watched
        places = [n for n, leaf in enumerate(given[0].leaves) if isinstance(leaf, Tensor)]
        plain = [None if n in places else leaf for n, leaf in enumerate(given[0].leaves)]
        call = UnsharedCall(
            name=path if number == 0 else f"{path}#{number}",
            path=path,
            kind=f"{type(module).__qualname__} {re.sub('[0-9]+', '*', path)} {module!r} {plain} {inputs} {outputs}",
            why=why,
            module=UnsharedModule(module, given[0].spec, plain, places),
            inputs=inputs,
            outputs=outputs,
            samples=tuple(given[0].tensors),
        )
        watched.calls.append((call, given[0], returned[0]))
    return watched


def _unfit(nests: list[_Nest]) -> str:
    first, *others = nests
    strange = [leaf for leaf in first.leaves if not isinstance(leaf, (Tensor, *_PLAIN)) and leaf is not None]
    if strange:
        return f"it takes or returns a {type(strange[0]).__name__}"
    if not all(first.same_but_for_sizes(other) for other in others):
        return "it takes or returns other things for rows of another length"
    return ""


def _shapes(nests: list[_Nest]) -> Iterator[list[torch.Size]]:
    for tensors in zip(*(nest.tensors for nest in nests), strict=True):
        yield [tensor.shape for tensor in tensors]


def _axes(shapes: list[torch.Size]) -> Axes | None:
    """From the shapes of one tensor for one row, one longer row and two rows; None if they cannot be told apart."""
    row, longer, rows = shapes
    tokens = tuple(n for n, (a, b) in enumerate(zip(row, longer, strict=True)) if a != b)
    batch = [n for n, (a, b) in enumerate(zip(row, rows, strict=True)) if a != b]
    whole = all((row[n], longer[n]) == _LENGTHS for n in tokens)
    if not whole or len(batch) > 1 or any((row[n], rows[n]) != (1, _ROWS) for n in batch):
        return None
    return Axes(tokens, batch[0] if batch else None)


# --------------------------------------------------------------------------- standing in


@contextlib.contextmanager
def standing_in(model: nn.Module, watched: Mapping[str, Watched]) -> Iterator[None]:
    """While the model is captured, let a marker stand for each watched module."""
    with _forwards_replaced(model, {path: _marker(module) for path, module in watched.items()}):
        yield


@contextlib.contextmanager
def _forwards_replaced(model: nn.Module, forwards: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    modules = {path: model.get_submodule(path) for path in forwards}
    before = {path: module.__dict__.get("forward") for path, module in modules.items()}
    try:
        for path, module in modules.items():
            module.__dict__["forward"] = forwards[path]
        yield
    finally:
        for path, module in modules.items():
            if before[path] is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before[path]


def _marker(watched: Watched) -> Callable[..., Any]:
    """A forward that returns what the module would return, made by the marker op."""
    calls = iter(watched.calls)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call, given, returned = next(calls, (None, None, None))
        nest = _nest((args, kwargs))
        if call is None or given is None or returned is None or not given.same_but_for_sizes(nest):
            reason = f"{watched.path} is called otherwise while it is captured than when it runs"
            raise NotPackable(Refusal(reason, watched.path))
        leaves, _ = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        length = next(t.shape[a.tokens[0]] for t, a in zip(tensors, call.inputs, strict=True) if a and a.tokens)
        made = iter(
            ops.unshared(tensors, call.name, place, _sized(sample, axes, length), sample.dtype)
            for place, (sample, axes) in enumerate(zip(returned.tensors, call.outputs, strict=True))
        )
        return tree_unflatten([next(made) if isinstance(x, Tensor) else x for x in returned.leaves], returned.spec)

    return forward


def _sized(sample: Tensor, axes: Axes | None, length: Any) -> list[Any]:
    tokens = axes.tokens if axes is not None else ()
    return [length if n in tokens else size for n, size in enumerate(sample.shape)]
