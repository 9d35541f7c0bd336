"""One type: built, wrapped, and the packed model compared with the eager unpacked one.

The reference is the user's model run on one sequence at a time, written here from the token ids alone: neither the
packing nor ``ppcompile.verify`` is trusted with it.
"""

from __future__ import annotations

import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import ppcompile
from ppcompile.capture import call_model

from .double import widened
from .models import lonely_kinds, other_modality

__all__ = ["OUTCOMES", "Result", "check", "example_groups"]

OUTCOMES = ("exact", "wrong", "refused", "crash", "timeout", "not built")

FORWARD = 5e-5
"""Largest accepted difference of a token's log-probability, in nats, float32."""
GRADIENT = 1e-3
"""Largest accepted relative difference of a parameter's gradient, norm over norm, float32."""
DOUBLE = 1e-9
"""Both limits in float64, where rounding cannot be what differs."""
ZERO = 1e-6
"""In float64, gradients are compared with at least this much of the largest: some are zero but for rounding."""
SENSITIVE = 1e-2
"""Nats by which tokens must move when sequences see each other, or an early token changes, for the check to count."""

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class Result:
    """What was found out about one type.

    Attributes:
        kind: the type, as transformers names it.
        outcome: one of :data:`OUTCOMES`.
        forward: largest difference of a token's log-probability, in nats; float64 where ``double``.
        gradient: largest relative difference of a parameter's gradient; float64 where ``double``.
        worst: the parameter where ``gradient`` was found.
        double: float32 rounding was too large, so that float64 decided.
        sites: attention sites of the packed graph.
        masks: what the sites' masks and scores are, with their number.
        unshared: modules that run on unpacked rows.
        seconds: wall time of ``wrap``.
        reason, module, op, source: of a refusal; ``reason`` is also what a crash said, and what float32 found where
            ``double``.
        trace: where it crashed.
        notes: what weakens the finding.
    """

    kind: str
    outcome: str
    forward: float | None = None
    gradient: float | None = None
    worst: str = ""
    double: bool = False
    sites: int = 0
    masks: dict[str, int] = field(default_factory=dict)
    unshared: tuple[str, ...] = ()
    seconds: float | None = None
    reason: str = ""
    module: str = ""
    op: str = ""
    source: str = ""
    trace: str = ""
    notes: tuple[str, ...] = ()


def example_groups(vocabulary: int, seed: int = 0) -> list[ppcompile.Group]:
    """Several groups of random tokens: 1 to 4 unequal responses, prompts of 1 to 41 tokens, a preamble that two prompts
    share, responses that share their beginning, one of which ends where the others go on.
    """
    generator = torch.Generator().manual_seed(seed)

    def ids(count: int) -> list[int]:
        tokens: list[int] = torch.randint(3, vocabulary, (count,), generator=generator).tolist()  # 0, 1, 2 are special
        return tokens

    preamble, start = ids(7), ids(4)
    return [
        ppcompile.Group(ids(41), [ids(13), ids(3)]),
        ppcompile.Group(ids(1), [ids(5)]),
        ppcompile.Group(preamble + ids(9), [ids(count) for count in (1, 2, 7, 13)]),
        ppcompile.Group(preamble + ids(3), [start + ids(5), start + ids(2), start]),
    ]


def check(kind: str, build: Callable[[], nn.Module], vocabulary: int) -> Result:
    """Build a model, wrap it, and compare.

    Args:
        kind: its name in the result.
        build: makes the model, the same one each time.
        vocabulary: token ids to draw from.
    """
    groups = example_groups(vocabulary)
    try:
        model = build()
        notes = tuple(_weaknesses(model, groups))
    except Exception as error:  # noqa: BLE001 - whatever a type raises is its row in the table
        return _failed(Result(kind, "not built"), error)
    result = Result(kind, "exact", notes=notes)
    try:
        return _checked(result, build, model, groups)
    except ppcompile.NotPackable as error:
        refusal = error.refusal
        return replace(
            result,
            outcome="refused",
            reason=refusal.reason,
            module=refusal.module,
            op=refusal.op,
            source=refusal.source,
        )
    except Exception as error:  # noqa: BLE001 - a crash of the compiler is a finding too
        return _failed(replace(result, outcome="crash"), error)


def _failed(result: Result, error: Exception, before: str = "") -> Result:
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages/torch" not in frame.filename]
    trace = "\n".join(f"{Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in own[-6:])
    return replace(result, reason=f"{before}{type(error).__name__}: {error}", trace=trace)


def _checked(
    result: Result, build: Callable[[], nn.Module], model: nn.Module, groups: Sequence[ppcompile.Group]
) -> Result:
    start = time.perf_counter()
    packed = ppcompile.wrap(model)
    seconds = time.perf_counter() - start
    graph = packed.compiled().graph
    result = replace(
        result,
        seconds=seconds,
        sites=len(graph.sites),
        masks=dict(Counter(_meaning(site) for site in graph.sites)),
        unshared=tuple(map(str, getattr(graph, "unshared", ()))),
    )
    single = _differences(model, packed, groups, floor=0.0)
    result = replace(
        result,
        forward=single.forward,
        gradient=single.gradient,
        worst=single.worst,
        notes=(*result.notes, *_unreached(single.unreached)),
    )
    if single.within(FORWARD, GRADIENT):
        return result
    found = f"float32: {single.forward:.1e} nats, gradient of {single.worst} {single.gradient:.1e}"
    try:
        wide = build().double()
        with widened():
            double = _differences(wide, ppcompile.wrap(wide), groups, floor=ZERO)
    except Exception as error:  # noqa: BLE001 - not known to be exact, whatever the reason
        return _failed(replace(result, outcome="wrong"), error, f"{found}, and float64 cannot decide: ")
    return replace(
        result,
        outcome="exact" if double.within(DOUBLE, DOUBLE) else "wrong",
        forward=double.forward,
        gradient=double.gradient,
        worst=double.worst,
        double=True,
        reason=found,
    )


def _unreached(names: Sequence[str]) -> list[str]:
    text = [name for name in names if not other_modality(name)]
    return [f"no gradient reaches {len(text)} parameters, such as {text[0]}"] if text else []


def _meaning(site: object) -> str:
    mask, score, sinks = site.meaning.mask_class, site.meaning.score_class, site.sinks  # type: ignore[attr-defined]
    return mask + ("" if score == "plain" else f", {score}") + ("" if sinks is None else ", sinks")


# --------------------------------------------------------------------------- comparing


def unpacked(model: nn.Module, groups: Sequence[ppcompile.Group]) -> Tensor:
    """Log-probabilities of all response tokens by the eager model, one sequence at a time: ``[M]``."""
    found = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response]])
            first = len(group.prompt)
            logps = call_model(model, ids)[0, first - 1 : -1].log_softmax(-1)
            found.append(logps.gather(1, ids[0, first:, None])[:, 0])
    return torch.cat(found)


@dataclass(frozen=True)
class _Differences:
    """Largest difference of values and of gradients, the parameter of the latter, and those without any gradient."""

    forward: float
    gradient: float
    worst: str
    unreached: list[str]

    def within(self, forward: float, gradient: float) -> bool:
        return self.forward <= forward and self.gradient <= gradient


def _differences(model: nn.Module, packed: nn.Module, groups: Sequence[ppcompile.Group], floor: float) -> _Differences:
    """Packed against unpacked, over both kinds of sharing."""
    expected = unpacked(model, groups)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    reference = _gradients(model, expected, weights)
    values, gradients = [], []
    for share in ("tree", "prompt"):
        logps = packed(ppcompile.pack(groups, share=share, pad_to_multiple_of=16)).token_logps
        values.append(_finite((logps - expected).abs().max().item()))
        gradients.append(_largest_difference(_gradients(model, logps, weights), reference, floor))
    return _Differences(max(values), *max(gradients), [name for name, g in reference.items() if not g.any()])


def _gradients(model: nn.Module, logps: Tensor, weights: Tensor) -> Gradients:
    """Gradient of each parameter; zeros where it has none, which packed and unpacked may tell differently."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad((logps * weights.to(logps.dtype)).sum(), [p for _, p in named], allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named, found, strict=True)}


def _largest_difference(ours: Gradients, theirs: Gradients, floor: float) -> tuple[float, str]:
    least = max(floor * max(g.norm().item() for g in theirs.values()), 1e-30)
    return max(
        (_finite((ours[name] - g).norm().item() / max(g.norm().item(), least)), name) for name, g in theirs.items()
    )


def _finite(value: float) -> float:
    """NaN is the worst."""
    return value if value == value else float("inf")


# --------------------------------------------------------------------------- does the check mean anything?


@torch.no_grad()
def _weaknesses(model: nn.Module, groups: Sequence[ppcompile.Group]) -> list[str]:
    """What makes an agreement say less than it seems to."""
    expected = unpacked(model, groups)
    if not expected.isfinite().all():
        return ["log-probabilities are not finite"]
    notes = []
    changed = unpacked(model, _early_token_changed(groups))
    if (moved := (changed - expected).abs().max().item()) < SENSITIVE:
        notes.append(f"the first token of a prompt of 16 moves its responses by {moved:.0e} nats only")
    if (moved := (_side_by_side(model, groups) - expected).abs().max().item()) < SENSITIVE:
        notes.append(f"sequences that see each other differ by {moved:.0e} nats only")
    if lonely := lonely_kinds(model):
        notes.append(f"only one layer of its kind: {lonely}")
    return notes


def _early_token_changed(groups: Sequence[ppcompile.Group]) -> list[ppcompile.Group]:
    """The groups with another first token in the third prompt: longer than a window, shorter than four of them."""
    prompt = [groups[2].prompt[0] ^ 1, *groups[2].prompt[1:]]
    return [*groups[:2], ppcompile.Group(prompt, groups[2].responses), *groups[3:]]


def _side_by_side(model: nn.Module, groups: Sequence[ppcompile.Group]) -> Tensor:
    """All sequences in one row, as if nothing kept them apart."""
    row, found, start = [], [], 0
    for group in groups:
        for response in group.responses:
            row += [*group.prompt, *response]
            found += range(start + len(group.prompt), len(row))
            start = len(row)
    ids, scored = torch.tensor([row]), torch.tensor(found)
    return call_model(model, ids)[0, scored - 1].log_softmax(-1).gather(1, ids[0, scored, None])[:, 0]
