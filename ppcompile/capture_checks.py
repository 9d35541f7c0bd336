"""What a capture would lose without a word, and must therefore refuse.

An exported graph holds tensors and operators. A branch on the row's length is taken once; a Python attribute that
changes from call to call keeps its first value; a backward that is not the derivative of the forward (a custom
``autograd.Function``, a tensor hook) is gone. Each of these is noticed here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any
from unittest import mock

import sympy
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils.checkpoint import CheckpointFunction

from .module_state import Attributes
from .passes.base import NotPackable, Refusal

__all__ = ["branches_on_length", "longest_rows", "model_line", "nothing_escapes", "python_state"]

_LENGTHS = (*range(2, 130), *(2**n + d for n in range(8, 18) for d in (-1, 0, 1)))
"""Row lengths at which a condition is tried; it must hold at all of them to be no condition."""


# --------------------------------------------------------------------------- branches on the row's length


def branches_on_length(exported: ExportedProgram, length: sympy.Symbol, modules: Sequence[str]) -> list[Refusal]:
    """Conditions on the number of tokens that the model's code met, other than "at most N tokens".

    The graph holds the branch that was taken for the example's length; sequences of another length take another one.
    ``modules`` are the paths of the modules that met the first conditions, in order.
    """
    ids = next(node for node in exported.graph.nodes if node.name == "input_ids")
    guards = ids.meta["val"].fake_mode.shape_env.guards
    where = itertools.chain(modules, itertools.repeat(""))
    conditions = [
        (guard, path) for guard, path in zip(guards, where, strict=False) if length in guard.expr.free_symbols
    ]
    longest = [bound for bound, _ in longest_rows(exported, length)]
    found, seen = [], set()
    for guard, path in conditions:
        if guard.expr in seen:
            continue
        seen.add(guard.expr)
        # At exactly N tokens a slice of a table of N rows is the table itself, which export tells apart: T != N, or
        # the size of the slice is not N.
        whole_table = isinstance(guard.expr, sympy.Ne) and any(
            _always_holds(guard.expr, length, [bound - 1]) for bound in longest
        )
        if (
            _upper_bound(guard.expr, length) is None
            and not whole_table
            and not _always_holds(guard.expr, length, longest)
        ):
            found.append(_branch(guard.expr, length, str(guard.sloc), path))
    return found


def longest_rows(exported: ExportedProgram, length: sympy.Symbol) -> list[tuple[int, str]]:
    """The conditions that hold for rows of up to N tokens and not beyond: N, and the condition in words."""
    ids = next(node for node in exported.graph.nodes if node.name == "input_ids")
    conditions = {guard.expr: guard for guard in ids.meta["val"].fake_mode.shape_env.guards}
    found = []
    for condition, guard in conditions.items():
        if length in condition.free_symbols and (bound := _upper_bound(condition, length)) is not None:
            found.append((bound, f"{str(condition).replace(str(length), 'T')}, {guard.sloc}"))
    return found


def _upper_bound(condition: Any, length: sympy.Symbol) -> int | None:
    """``N`` if the condition says ``T <= N``, such as ``T + 2 <= N + 2`` or ``T == min(T, N)``."""
    if isinstance(condition, (sympy.Le, sympy.Lt)):
        bound = sympy.expand(condition.rhs - condition.lhs) + length  # the condition says `T <= bound` or `T < bound`
        if bound.is_Integer:
            return int(bound) - (1 if isinstance(condition, sympy.Lt) else 0)
    if isinstance(condition, sympy.Ne):  # "a table of N rows is not cut": true of shorter and of longer rows
        return None
    holds = [_holds(condition, length, n) for n in _LENGTHS]
    ends = holds.index(False) if False in holds else None
    if not ends or any(holds[ends:]):
        return None
    low, high = _LENGTHS[ends - 1], _LENGTHS[ends]
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _holds(condition, length, middle) else (low, middle)
    return low


def _holds(condition: Any, length: sympy.Symbol, n: int) -> bool:
    try:
        return bool(condition.xreplace({length: sympy.Integer(n)}) == sympy.true)
    except ZeroDivisionError:  # T % (T // 8) means nothing for rows of fewer than 8 tokens
        return False


def _always_holds(condition: Any, length: sympy.Symbol, longest: list[int]) -> bool:
    limit = min(longest, default=_LENGTHS[-1])
    return all(_holds(condition, length, n) for n in _LENGTHS if n <= limit)


def _branch(condition: Any, length: sympy.Symbol, where: str, module: str) -> Refusal:
    text = str(condition).replace(str(length), "T")
    reason = f"the model's code asks whether {text} of its row of T tokens, and a pack holds sequences of many lengths"
    op, hint = "a branch on the row's length", "make the code the same for all lengths"
    return Refusal(reason, module, op, where, hint)


# --------------------------------------------------------------------------- what leaves no operator behind


_BACKWARD_IS_THE_DERIVATIVE = ("transformers.models.bloom.modeling_bloom.GeLUFunction",)
"""Custom functions whose backward was written out for speed and equals the derivative of their forward, so that
nothing is lost; the gradients of these models are compared in the tests."""


@contextlib.contextmanager
def nothing_escapes(model: nn.Module) -> Iterator[None]:
    """Refuse, while ``model`` is captured, what would be missing in the graph; leave the modules as found.

    Raises:
        NotPackable: a custom ``autograd.Function``, a hook on gradients, or an inference-mode region.
    """
    _refuse_backward_hooks(model)
    custom = "a custom autograd.Function, whose backward is not in the captured graph"
    hook = "a hook on a tensor, which would not run in the captured graph"
    inference = "an inference-mode region inside the model, which the captured graph cannot tell from any other"
    attributes = Attributes(model)
    with (
        mock.patch.object(torch.autograd.Function, "apply", classmethod(_refuse_function(custom))),
        mock.patch.object(torch.Tensor, "register_hook", _refuser(hook)),
        mock.patch.object(torch.inference_mode, "__enter__", _refuse_inference(inference)),
    ):
        try:
            yield
        finally:
            attributes.restore()


def _refuse_backward_hooks(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise NotPackable(Refusal("a backward hook, which would not run in the captured graph", path, "hook"))


def _refuse_function(reason: str) -> Callable[..., Any]:
    original = torch.autograd.Function.__dict__["apply"].__func__
    refuse = _refuser(reason)

    def apply(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls is CheckpointFunction:
            # It computes without gradients, to compute again later; the graph is to hold what it computes.
            function, _, *inputs = args
            return function(*inputs)
        own = cls.__module__.startswith("torch.")  # torch's own, such as checkpointing, are known to export
        known = f"{cls.__module__}.{cls.__qualname__}" in _BACKWARD_IS_THE_DERIVATIVE
        return original(cls, *args, **kwargs) if own or known else refuse()

    return apply


def _refuse_inference(reason: str) -> Callable[..., Any]:
    original, refuse = torch.inference_mode.__enter__, _refuser(reason)
    # Switching it off, as torch does itself, loses nothing.
    return lambda region: refuse() if region.mode else original(region)


def _refuser(reason: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotPackable(Refusal(reason, op="torch.autograd", source=model_line()))

    return refuse


def model_line() -> str:
    """``file:line`` of the innermost frame that is neither torch's nor ours: the model's own code."""
    own = os.path.dirname(__file__)
    foreign = (frame for frame in itertools.islice(_callers(), 24) if not frame.startswith(own))
    return next((frame for frame in foreign if "/torch/" not in frame and "unittest" not in frame), "")


def _callers() -> Iterator[str]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back


def python_state(model: nn.Module) -> dict[str, Any]:
    """Plain numbers, texts and flags on the modules, by dotted name."""
    found = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str)) and name != "training":
                found[f"{path}.{name}"] = value
    return found
