"""``verify(model)``: the packed model against the user's own eager unpacked model.

The second net under the token-mixing proof. Four questions, each answered by running both:

    forward       are the log-probabilities of every response token the same, or the rewards of every sequence?
    gradients     is the gradient of every parameter the same, for random weights on those values?
    independence  does changing one segment leave everything outside its descendants as it was?
    spread        how far apart are two *unpacked* batchings of the same model? In low precision that is the yardstick,
                  and the model in float32 counts as one of them.

The reference runs one sequence at a time, without padding or cache.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .capture import call_model
from .packed_model import PackedModel, PackedRewards, wrap
from .runtime.batch import Group, PackedBatch, pack

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Mismatch", "Report", "example_batch", "unpacked_logps", "unpacked_rewards", "verify"]

FORWARD_TOLERANCE = 5e-5
"""Largest accepted difference of a token's log-probability, in nats, float32; or four times what two unpacked batchings
differ by, where the model itself amplifies rounding beyond that."""
_ROUNDING_AT_MOST = 1e-3
"""In float32, unpacked batchings that differ by more nats than this differ by more than rounding: the model keeps
something from one forward to the next, or picks among equals. Nothing larger is ever accepted."""
GRADIENT_TOLERANCE = 1e-3
"""Largest accepted relative difference of a parameter's gradient (norm over norm), float32."""
_SPREADS = 4.0
"""Low precision: the packed model may be this many times as far off as two unpacked batchings are from each other."""


class Mismatch(AssertionError):
    """The packed model does not compute what the eager unpacked model computes. ``report`` has the numbers."""

    def __init__(self, report: Report) -> None:
        super().__init__(str(report))
        self.report = report


@dataclass(frozen=True)
class Report:
    """What :func:`verify` measured.

    Attributes:
        forward: largest difference of a token's log-probability, in nats.
        forward_limit: what was accepted.
        gradient: largest relative difference of a parameter's gradient; ``None`` if not asked for.
        gradient_limit: what was accepted.
        worst_parameter: where ``gradient`` was found.
        independence: largest change of a log-probability when a segment that is none of its ancestors changed.
        spread: largest difference between two unpacked batchings, in nats.
        tokens: response tokens compared.
        sites: attention sites of the packed graph.
    """

    forward: float
    forward_limit: float
    gradient: float | None
    gradient_limit: float
    worst_parameter: str
    independence: float
    spread: float
    tokens: int
    sites: int

    @property
    def ok(self) -> bool:
        """True if all that was measured is within its limit; NaN is not."""
        gradients = self.gradient is None or self.gradient <= self.gradient_limit
        return self.forward <= self.forward_limit and gradients and self.independence <= self.forward_limit

    def __str__(self) -> str:
        verdict = "packed equals eager unpacked" if self.ok else "packed does NOT equal eager unpacked"
        gradient = "not compared"
        if self.gradient is not None:
            gradient = f"{self.gradient:.1e} relative (limit {self.gradient_limit:.0e}, worst {self.worst_parameter})"
        return (
            f"{verdict}: {self.tokens} tokens, {self.sites} sites\n"
            f"  forward       {self.forward:.1e} nats (limit {self.forward_limit:.1e})\n"
            f"  gradients     {gradient}\n"
            f"  independence  {self.independence:.1e} nats when a segment elsewhere changes\n"
            f"  spread        {self.spread:.1e} nats between two unpacked batchings"
        )

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table("check", "measured", "limit", title=str(self).splitlines()[0])
        table.add_row("forward (nats)", f"{self.forward:.1e}", f"{self.forward_limit:.1e}")
        if self.gradient is not None:
            table.add_row(
                f"gradients (relative; {self.worst_parameter})", f"{self.gradient:.1e}", f"{self.gradient_limit:.0e}"
            )
        table.add_row("independence (nats)", f"{self.independence:.1e}", f"{self.forward_limit:.1e}")
        table.add_row("spread of unpacked batchings (nats)", f"{self.spread:.1e}", "")
        return table


def verify(
    model: nn.Module, batch: PackedBatch | None = None, *, gradients: bool = True, seed: int = 0, backend: str = "auto"
) -> Report:
    """Compare the packed with the eager unpacked model, both in eval mode (dropout draws differ otherwise).

    Args:
        model: a model, or a wrapped one.
        batch: what to compare on; random token ids in a small pack if not given.
        gradients: compare the gradient of every parameter too.
        seed: of the random tokens and of the weights that the gradients are taken with.
        backend: attention backend to verify, where ``model`` is not wrapped yet.

    Returns:
        The measurements; gradients and modes of ``model`` are left as found.

    Raises:
        Mismatch: a difference beyond its limit; carries the report.
        NotPackable: the model cannot be packed at all.
    """
    packed = model if isinstance(model, PackedModel) else None
    eager = packed.unwrapped if packed is not None else model
    with _eval_mode(eager):
        packed = packed if packed is not None else wrap(eager, backend=backend)
        if batch is None:
            batch = example_batch(packed, seed=seed).to(next(eager.parameters()).device)
        report = _measure(packed, eager, batch, gradients, seed)
    if not report.ok:
        raise Mismatch(report)
    return report


def example_batch(packed: PackedModel, seed: int = 0) -> PackedBatch:
    """A small pack of random token ids: unequal responses, several groups, shared beginnings, padding."""
    graph = packed.compiled().graph
    vocabulary = graph.vocab_size or 32
    longest = min(48, graph.max_positions or 48)
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        tokens: list[int] = torch.randint(0, vocabulary, (max(1, count),), generator=generator).tolist()
        return tokens

    start = ids(longest // 8)
    prompt = longest // 2
    groups = [
        Group(ids(prompt), [start + ids(longest // 4), start + ids(3), ids(1)]),
        Group(ids(longest - longest // 8 - 8), [ids(5), ids(8)]),
        Group(ids(1), [ids(longest // 3)]),
    ]
    return pack(groups, share="tree", pad_to_multiple_of=16)


def unpacked_logps(model: nn.Module, batch: PackedBatch, *, extend: int = 0) -> Tensor:
    """Log-probabilities of every response token by the eager model, one sequence at a time: float32 ``[M]``.

    Args:
        model: the user's model.
        batch: its sequences are read back from the layout.
        extend: append this many copies of the last token to each row. A causal model cannot tell, but its
            matrix products have another shape: a second unpacked batching.
    """
    found = []
    scored_positions = batch.scored_positions.split(batch.lengths.tolist())
    for sequence, positions in zip(batch.sequences(), scored_positions, strict=True):
        ids = torch.as_tensor(sequence, device=batch.device)[None]
        row = torch.cat([ids, ids[:, -1:].expand(1, extend)], dim=1) if extend else ids
        logits = call_model(model, row)[0, positions - 1]
        wide = torch.promote_types(logits.dtype, torch.float32)
        logps = logits.to(wide).log_softmax(-1)
        found.append(logps.gather(1, ids[0, positions, None])[:, 0])
    return torch.cat(found)


def unpacked_rewards(model: nn.Module, batch: PackedBatch) -> Tensor:
    """The value of every sequence by the eager model, one sequence at a time: float32 ``[R]``, or ``[R, K]``."""
    rows = [torch.as_tensor(sequence, device=batch.device)[None] for sequence in batch.sequences()]
    values = torch.cat([call_model(model, row) for row in rows])
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide[:, 0] if wide.shape[1] == 1 else wide


def _packed_values(packed: PackedModel, batch: PackedBatch) -> Tensor:
    output = packed(batch)
    values: Tensor = output.rewards if isinstance(output, PackedRewards) else output.token_logps
    return values


def _unpacked_values(packed: PackedModel, model: nn.Module, batch: PackedBatch, *, extend: int = 0) -> Tensor:
    """What ``packed`` is compared with. A value per sequence stands at its end: no longer row has the same."""
    if packed.compiled().graph.pooling is not None:
        return unpacked_rewards(model, batch)
    return unpacked_logps(model, batch, extend=extend)


def _measure(packed: PackedModel, eager: nn.Module, batch: PackedBatch, gradients: bool, seed: int) -> Report:
    ours, theirs, again = (
        _packed_values(packed, batch),
        _unpacked_values(packed, eager, batch),
        _unpacked_values(packed, eager, batch, extend=9),
    )
    wide: nn.Module | None = None
    if low_precision := any(p.dtype in (torch.bfloat16, torch.float16) for p in eager.parameters()):
        wide = copy.deepcopy(eager).float()
    spread = (again - theirs).abs().max().item()
    forward_limit = max(FORWARD_TOLERANCE, min(_SPREADS * spread, _ROUNDING_AT_MOST))
    if wide is not None:  # how far low precision itself moves the unpacked model
        with torch.no_grad():
            spread = max(spread, (_unpacked_values(packed, wide, batch) - theirs).abs().max().item())
        forward_limit = _SPREADS * spread
    gradient, where, gradient_limit = None, "", GRADIENT_TOLERANCE
    if gradients:
        weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(seed)).to(ours.device)
        mine, reference, other = (_gradients(eager, values, weights) for values in (ours, theirs, again))
        if wide is not None:
            float32 = _gradients(wide, _unpacked_values(packed, wide, batch), weights)
            gradient_limit = _SPREADS * max(_largest_difference(g, reference, {})[0] for g in (other, float32))
        zero = {} if low_precision else _rounding(reference, other)
        gradient, where = _largest_difference(mine, reference, zero)
    return Report(
        forward=(ours - theirs).abs().max().item(),
        forward_limit=forward_limit,
        gradient=gradient,
        gradient_limit=gradient_limit,
        worst_parameter=where,
        independence=_independence(packed, batch, ours.detach()),
        spread=spread,
        tokens=ours.numel(),
        sites=len(packed.compiled().graph.sites),
    )


def _gradients(model: nn.Module, logps: Tensor, weights: Tensor) -> dict[str, Tensor]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    grads: Sequence[Tensor | None] = torch.autograd.grad(
        (logps * weights).sum(), [p for _, p in named], allow_unused=True
    )
    return {name: grad for (name, _), grad in zip(named, grads, strict=True) if grad is not None}


def _rounding(theirs: dict[str, Tensor], again: dict[str, Tensor]) -> dict[str, float]:
    """The norm below which each gradient is taken for zero but for rounding.

    (A bias that shifts all of a query's scores alike has such a gradient.) It is what two unpacked batchings differ by,
    at least a few roundings of the model's largest gradient, and at most a hundredth of it.
    """
    largest = max((_norm(reference) for reference in theirs.values()), default=0.0)
    found = {}
    for name, reference in theirs.items():
        least = torch.finfo(reference.dtype).eps * largest
        apart = _distance(again[name], reference) if name in again else 0.0
        found[name] = min(max(apart, least) * _SPREADS / GRADIENT_TOLERANCE, largest / 100)
    return found


def _largest_difference(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], zero: dict[str, float]
) -> tuple[float, str]:
    """Largest relative difference over parameters, and where; infinite if one side lacks a gradient.

    Args:
        ours, theirs: gradients by the parameter's name.
        zero: the least norm that each is compared with: below, a relative difference says nothing.
    """
    if ours.keys() != theirs.keys():
        return float("inf"), ", ".join(sorted(ours.keys() ^ theirs.keys()))
    found = []
    for name, reference in theirs.items():
        value = _distance(ours[name], reference) / max(_norm(reference), zero.get(name, 0.0), 1e-30)
        found.append((value if value == value else float("inf"), name))  # NaN is the worst
    return max(found)


def _norm(value: Tensor) -> float:
    return value.double().norm().item()


def _distance(a: Tensor, b: Tensor) -> float:
    return _norm(a.double() - b.double())


def _independence(packed: PackedModel, batch: PackedBatch, before: Tensor) -> float:
    """The perturbation probe: change the tokens of each segment in turn; nothing outside its descendants may move."""
    vocabulary = packed.compiled().graph.vocab_size or 32
    slots = _slots_of_values(packed, batch)
    worst = 0.0
    for start, end, subtree, _ in batch.segments.tolist():
        elsewhere = (slots < start) | (slots >= subtree)
        if start >= batch.num_tokens or not elsewhere.any():
            continue
        changed = batch.input_ids.clone()
        changed[0, start:end] = (changed[0, start:end] + 1) % vocabulary
        with torch.no_grad():
            after = _packed_values(packed, dataclasses.replace(batch, input_ids=changed))
        worst = max(worst, (after - before)[elsewhere].abs().max().item())
    return worst


def _slots_of_values(packed: PackedModel, batch: PackedBatch) -> Tensor:
    """The slot of each value that is compared: of each scored token, ``[M]``, or of each sequence's last, ``[R]``."""
    if packed.compiled().graph.pooling is not None:
        return batch.last_slots
    positions = batch.scored_positions.cpu().split(batch.lengths.tolist())
    of_sequence = [torch.as_tensor(slots)[at] for slots, at in zip(batch.sequence_slots(), positions, strict=True)]
    return torch.cat(of_sequence).to(batch.device)


@contextlib.contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
