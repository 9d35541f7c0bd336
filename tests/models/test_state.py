"""A model that remembers: what one forward stores and the next one reads is in no captured graph."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.verification import Mismatch


class Remembers(nn.Module):
    """Adds what ``recall`` finds in ``self.kept``, which ``store`` has put there the time before."""

    def __init__(
        self, width: int, start: Any, recall: Callable[[Any], Any], store: Callable[[Any, Tensor], Any]
    ) -> None:
        super().__init__()
        self.linear, self.kept, self.recall, self.store = nn.Linear(width, width), start, recall, store

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        before = self.recall(self.kept)
        self.store(self, y.detach()[0, 0])
        return y if before is None else y + before


def _store(module: Remembers, value: Tensor) -> None:
    module.kept = value


KEPT: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any, Tensor], Any]]] = {
    # name: what is kept at first, how it is read, how it is stored
    "attribute": (lambda: None, lambda kept: kept, _store),
    "list": (list, lambda kept: kept[-1] if kept else None, lambda m, value: m.kept.append(value)),
    "dict": (dict, lambda kept: kept.get("last"), lambda m, value: m.kept.update(last=value)),
    "queue": (lambda: deque(maxlen=1), lambda kept: kept[-1] if kept else None, lambda m, value: m.kept.append(value)),
    "set": (
        set,
        lambda kept: sum(kept) if kept else None,
        lambda m, value: m.kept.add(len(m.kept) + 1.0),
    ),
    "object": (
        lambda: SimpleNamespace(last=None),
        lambda kept: kept.last,
        lambda m, value: setattr(m.kept, "last", value),
    ),
    "object in a list": (
        lambda: [SimpleNamespace(last=None)],
        lambda kept: kept[0].last,
        lambda m, value: setattr(m.kept[0], "last", value),
    ),
    "number": (lambda: 0.0, lambda kept: kept, lambda m, value: setattr(m, "kept", m.kept + 1.0)),
}


def remembering(how: str) -> nn.Module:
    start, recall, store = KEPT[how]
    return zoo.sharpen(zoo.PlainGPT(mixer=lambda width: Remembers(width, start(), recall, store))).eval()


@pytest.mark.parametrize("warm", [False, True], ids=["at first", "after a forward"])
@pytest.mark.parametrize("how", KEPT)
def test_what_a_forward_keeps_is_refused(how: str, warm: bool) -> None:
    model = remembering(how)
    if warm:
        model(torch.tensor([[1, 2, 3]]))
    kept = model.blocks[0].mixer.kept
    held = list(kept) if isinstance(kept, (list, deque)) else None
    with pytest.raises(ppcompile.NotPackable, match="stores 'kept'") as caught:
        ppcompile.wrap(model)
    assert caught.value.refusal.module == "blocks.0.mixer"
    assert model.blocks[0].mixer.kept is kept
    assert held is None or all(a is b for a, b in zip(kept, held, strict=True))


def test_what_only_others_read_may_be_stored_by_a_module_that_stays_as_it_is() -> None:
    """The module is proved to give the same whatever ran before, and it still stores."""

    class Reports(nn.Module):
        largest: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.largest = x.detach().abs().max()
            return x * 2

    model = zoo.sharpen(zoo.PlainGPT(mixer=lambda width: Reports())).eval()
    packed = ppcompile.wrap(model)
    assert {call.path for call in packed.compiled().graph.unshared.values()} == {"blocks.0.mixer", "blocks.1.mixer"}
    assert ppcompile.verify(packed).ok
    packed(ppcompile.pack([ppcompile.Group([1, 2], [[3], [4]])]))
    assert model.blocks[0].mixer.largest is not None


def test_what_is_kept_out_of_sight_is_caught_by_verify() -> None:
    """In a closure, for example: rounding is never taken for the reason why unpacked batchings differ that much."""
    calls = itertools.count()

    class Hides(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + next(calls) / 10

    model = zoo.sharpen(zoo.PlainGPT(mixer=lambda width: Hides(width, width))).eval()
    with pytest.raises(Mismatch) as caught:
        ppcompile.verify(model)
    assert caught.value.report.spread > 1e-2
    assert caught.value.report.forward_limit <= 1e-3
