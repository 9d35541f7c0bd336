"""The proof that a module which stays as it is may run on rows of whole sequences.

Rows are filled up to the longest, and stand in one batch. The module then computes what it computes on one sequence
alone if the first t tokens of each row come out as they do for a row that ends after t tokens, in a batch of its own.
That is causality, independence of the rows, and no use of the row's length, in one equation, tried in values and in
gradients:

    module(rows)[b, :t]  ==  module(rows[b:b+1, :t])

With the module's own weights and with random ones: a gate that starts at zero would hide what training lets through.

What a module reads on rows from another such module is made by that module, from the same rows: it may hold anything,
as long as what is read in the end satisfies the equation.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .unshare import Axes, UnsharedCall

__all__ = ["NOT_CAUSAL", "Chain", "prove_causal"]

NOT_CAUSAL = "it is not causal"

InputsAt = Callable[[int], "list[Tensor | None]"]
"""Length -> the inputs that are functions of position, at that length; None for those that hold tokens."""

_TOLERANCE = 2e-4  # float32, relative to the largest value
_LOOSE = 10  # gradients sum over tokens
_ROUNDINGS = 1e4  # a gradient below so many roundings of the largest may be rounding alone


@dataclass(frozen=True)
class _Effort:
    """How much is tried: the rows' length, where they are cut, where gradients are compared too, and input scales."""

    length: int
    cuts: tuple[int, ...]
    graded: tuple[int, ...]
    scales: tuple[float, ...]

    def within(self, longest: int) -> _Effort:
        """The same for rows of at most ``longest`` tokens."""
        length = min(self.length, longest)
        cuts, graded = (tuple(cut for cut in some if cut < length) for some in (self.cuts, self.graded))
        return _Effort(length, cuts, graded, self.scales)


# Cuts on both sides of the sizes that chunked algorithms use.
_FULL = _Effort(270, (1, 2, 7, 64, 65, 129, 257), (7, 129), (1.0, 4.0))
_LONG, _LARGEST = 2113, 50_000_000
"""A row long enough for code that changes its ways for long rows, tried on modules of at most so many weights."""
_BRIEF = _Effort(70, (1, 5, 64), (5,), (1.0,))
_ROWS = 2


@dataclass(frozen=True)
class Chain:
    """A call of an unshared module, and those that it depends on without the pack in between.

    Attributes:
        call: the module, its axes, and inputs that it was seen to get.
        positional: its inputs that are functions of position.
        made: place of an input that stays on rows -> the chain that makes it, and which of its outputs it is.
        identity: tells it from the other chains of the same model, whatever else of the model is captured.
    """

    call: UnsharedCall
    positional: InputsAt
    made: Mapping[int, tuple[Chain, int]] = field(default_factory=dict)
    identity: Hashable = None


def prove_causal(chain: Chain, outputs: Sequence[int], *, longest: int | None, brief: bool = False) -> str | None:
    """None if ``module(rows)[b, :t] == module(rows[b:b+1, :t])``, otherwise what was found.

    Args:
        chain: the module and what it depends on.
        outputs: which of its outputs are compared.
        longest: the positions that the model has tables for, None if unlimited.
        brief: for a module of which one like it has been proved in full.
    """
    effort = (_BRIEF if brief else _FULL).within(longest or _LONG)
    try:
        # In double, so that rounding seldom decides which keys or experts are picked.
        return _prove(chain, outputs, effort, longest or _LONG, brief, torch.float64)
    except _Failed:
        pass  # some kernels know no doubles
    try:
        return _prove(chain, outputs, effort, longest or _LONG, brief, torch.float32)
    except _Failed as failed:
        return str(failed)


def _prove(
    chain: Chain, outputs: Sequence[int], effort: _Effort, longest: int, brief: bool, dtype: torch.dtype
) -> str | None:
    for seed, weights in enumerate((_own, _random)):
        run = _Run(chain, outputs, weights, dtype)
        before = [state.detach().clone() for state in run.state]
        for scale in effort.scales:
            finding = _compare(run, effort, scale, seed)
            if finding is None and not brief and scale == effort.scales[0]:
                finding = _compare_long(run, effort.length, min(_LONG, longest))
            if finding is not None:
                return finding
        if not all(map(torch.equal, run.state, before)):
            return "it changes its weights or buffers as it runs"
    return None


# --------------------------------------------------------------------------- the module, copied


def _copy(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in ``dtype``, without dropout: its draws would differ from run to run."""
    twin = copy.deepcopy(module)
    twin = twin.double() if dtype == torch.float64 else twin.float()  # leaves complex buffers alone, unlike .to
    for part in twin.modules():
        for name, value in vars(part).items():
            if ("drop" in name and isinstance(value, float)) or (isinstance(part, nn.Dropout) and name == "p"):
                setattr(part, name, 0.0)
    return twin


def _own(module: nn.Module) -> nn.Module:
    return module


def _random(module: nn.Module) -> nn.Module:
    """Normal weights that keep activations near one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            drawn = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.copy_(drawn)
    return module


# --------------------------------------------------------------------------- running it


class _Failed(Exception):
    """The module raised."""


@dataclass
class _Drawn:
    """Rows of tokens: the inputs of a module that hold some, by place, and those of the modules that it depends on."""

    tokens: dict[int, Tensor]
    made: dict[int, _Drawn]

    def leaves(self) -> list[Tensor]:
        """The inputs that have gradients, which start here."""
        own = [t.requires_grad_() for t in self.tokens.values() if t.is_floating_point()]
        return own + [leaf for drawn in self.made.values() for leaf in drawn.leaves()]


class _Run:
    """Runs a copy of a chain's module on rows of drawn tokens.

    Attributes:
        state: parameters and buffers of the copies, those that it depends on included.
    """

    def __init__(
        self, chain: Chain, outputs: Sequence[int], weights: Callable[[nn.Module], nn.Module], dtype: torch.dtype
    ) -> None:
        self.call, self.positional, self.outputs, self.dtype = chain.call, chain.positional, outputs, dtype
        module = weights(_copy(chain.call.module.wrapped, dtype))
        self.module = chain.call.module.bound_to(module)
        self.made = {place: _Run(maker, [output], weights, dtype) for place, (maker, output) in chain.made.items()}
        self.state: list[Tensor] = [*module.parameters(), *module.buffers()]
        self.state += [tensor for run in self.made.values() for tensor in run.state]
        self.parameters = [tensor for tensor in self.state if tensor.requires_grad]
        self.compared = [axes for axes in (chain.call.outputs[place] for place in outputs) if axes is not None]

    def draw(self, length: int, scale: float, seed: int) -> _Drawn:
        """Inputs that hold tokens, for rows of ``length``."""
        generator = torch.Generator().manual_seed(seed)
        places = zip(self.call.inputs, self.call.samples, self.positional(length), strict=True)
        tokens = {
            place: _tokens_like(sample, axes, length, scale, generator)
            for place, (axes, sample, known) in enumerate(places)
            if axes is not None and axes.tokens and known is None and place not in self.made
        }
        tokens = {place: t.to(self.dtype) if t.is_floating_point() else t for place, t in tokens.items()}
        return _Drawn(tokens, {place: run.draw(length, scale, seed) for place, run in self.made.items()})

    def __call__(self, drawn: _Drawn, row: int | None, length: int) -> list[Tensor]:
        """The outputs that are read, for all rows or for one of them, cut to ``length`` tokens."""
        try:
            returned = self.module(*self._inputs(drawn, row, length))
        # A module that cannot run on these rows may raise anything; the error stays attached to the refusal.
        except Exception as error:
            raise _Failed(f"it fails on rows of tokens: {type(error).__name__}: {error}") from error
        return [returned[place] for place in self.outputs]

    def _inputs(self, drawn: _Drawn, row: int | None, length: int) -> list[Tensor]:
        known = self.positional(length)
        return [self._input(place, drawn, known[place], row, length) for place in range(len(self.call.inputs))]

    def _input(self, place: int, drawn: _Drawn, known: Tensor | None, row: int | None, length: int) -> Tensor:
        axes, sample = self.call.inputs[place], self.call.samples[place]
        if place in self.made:
            (made,) = self.made[place](drawn.made[place], row, length)
            return made
        if place in drawn.tokens:
            assert axes is not None
            assert axes.batch is not None
            part = drawn.tokens[place].narrow(axes.tokens[0], 0, length)
            return part if row is None else part.narrow(axes.batch, row, 1)
        value = sample if known is None else known.to(sample.device)
        value = value.to(self.dtype) if value.is_floating_point() else value
        count = _ROWS if row is None else 1
        return value if axes is None or axes.batch is None else _expand(value, axes.batch, count)


def _expand(value: Tensor, axis: int, count: int) -> Tensor:
    return value.expand([count if n == axis else size for n, size in enumerate(value.shape)])


def _tokens_like(sample: Tensor, axes: Axes, length: int, scale: float, generator: torch.Generator) -> Tensor:
    """Normal tokens of the sample's spread; of what is no number to add to, tokens of the sample itself."""
    (token_axis,), batch = axes.tokens, axes.batch
    assert batch is not None
    sizes = {token_axis: length, batch: _ROWS}
    shape = [sizes.get(n, size) for n, size in enumerate(sample.shape)]
    if not sample.is_floating_point():
        picked = torch.randint(sample.numel(), shape, generator=generator)
        return sample.flatten()[picked.to(sample.device)]
    drawn = torch.randn(shape, generator=generator).to(sample.device)
    return scale * drawn


# --------------------------------------------------------------------------- the comparison


@torch.enable_grad()
def _compare(run: _Run, effort: _Effort, scale: float, seed: int) -> str | None:
    drawn = run.draw(effort.length, scale, seed)
    leaves = drawn.leaves() + run.parameters
    whole = run(drawn, None, effort.length)
    if not all(t.isfinite().all() for t in whole if t.is_floating_point()):
        return "its results are not finite on random tokens"
    for cut, row in zip(effort.cuts, itertools.cycle(range(_ROWS)), strict=False):
        part = run(drawn, row, cut)
        here = [_cut(t, axes, row, cut) for t, axes in zip(whole, run.compared, strict=True)]
        if not all(_same(a, b, 1) for a, b in zip(part, here, strict=True)):
            return (
                f"{NOT_CAUSAL}: the first {cut} tokens come out otherwise where more follow, or with a row beside them"
            )
        if leaves and cut in effort.graded:
            weights = _cotangents(part, seed)
            of_part, of_here = (_gradients(outputs, weights, leaves) for outputs in (part, here))
            largest = max((_largest(g) for g in of_part), default=0.0)
            zero = largest * _ROUNDINGS * torch.finfo(run.dtype).eps  # a key's bias has a gradient of rounding alone
            if not all(_same(a, b, _LOOSE, zero) for a, b in zip(of_part, of_here, strict=True)):
                return f"{NOT_CAUSAL}: the gradients of the first {cut} tokens are others where more follow"
    again = run(drawn, None, effort.length)
    if not all(_same(a, b, 1) for a, b in zip(whole, again, strict=True)):
        return "it gives other results when it runs again"
    return None


def _compare_long(run: _Run, cut: int, length: int) -> str | None:
    """Values alone, on one long row: a branch on the row's length beyond the lengths of :func:`_compare`."""
    if sum(p.numel() for p in run.parameters) > _LARGEST:
        return None
    drawn = run.draw(length, 1.0, seed=2)
    with torch.no_grad():
        length, whole = _longest(run, drawn, cut, length)
        part = run(drawn, 0, cut)
    here = [_cut(t, axes, 0, cut) for t, axes in zip(whole, run.compared, strict=True)]
    if all(_same(a, b, 1) for a, b in zip(part, here, strict=True)):
        return None
    return f"the first {cut} tokens come out otherwise in a row of {length}"


def _longest(run: _Run, drawn: _Drawn, runs: int, length: int) -> tuple[int, list[Tensor]]:
    """The longest row, of ``runs`` to ``length`` tokens, that the module takes, and its outputs.

    A module with a table of its own for so many positions fails beyond them, on a pack's rows as on any other.
    """
    try:
        return length, run(drawn, 0, length)
    except _Failed:
        fails = length
    found = run(drawn, 0, runs)
    while fails - runs > 1:
        middle = (runs + fails) // 2
        try:
            runs, found = middle, run(drawn, 0, middle)
        except _Failed:
            fails = middle
    return runs, found


def _cut(value: Tensor, axes: Axes, row: int, length: int) -> Tensor:
    assert axes.batch is not None
    return value.narrow(axes.tokens[0], 0, length).narrow(axes.batch, row, 1)


def _cotangents(outputs: Sequence[Tensor], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(t.shape, generator=generator).to(t.device) for t in outputs]


def _gradients(outputs: Sequence[Tensor], weights: Sequence[Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    pairs = [(t, w) for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
    if not pairs:
        return []
    of, over = [t for t, _ in pairs], [w.to(t.dtype) for t, w in pairs]
    found: Sequence[Tensor | None] = torch.autograd.grad(of, leaves, over, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def _largest(value: Tensor) -> float:
    return value.detach().abs().max().item() if value.numel() else 0.0


def _same(a: Tensor, b: Tensor, factor: float, least: float = 1e-6) -> bool:
    """Equal up to rounding, of what is at least ``least`` large; NaN is equal to nothing."""
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    scale = max(_largest(a), _largest(b), least, 1e-6)
    return bool((a - b).detach().abs().max() <= factor * _TOLERANCE * scale)
