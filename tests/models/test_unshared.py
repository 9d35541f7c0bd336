"""Modules that mix tokens otherwise than by attention stay as they are, on unpacked rows: exact, and said so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.passes import causality, unshare


@pytest.mark.parametrize("name", zoo.UNSHARED)
def test_exact_in_forward_and_gradients(name: str) -> None:
    build, path = zoo.UNSHARED[name]
    packed = ppcompile.wrap(build())
    calls = packed.compiled().graph.unshared
    assert path in {call.path for call in calls.values()}
    assert all(call.proved for call in calls.values())
    report = ppcompile.verify(packed)
    assert report.forward <= 2e-5
    assert report.gradient is not None
    assert report.gradient <= 1e-4


def test_the_rest_stays_packed() -> None:
    compiled = ppcompile.wrap(zoo.UNSHARED["convolution"][0]()).compiled()
    assert len(compiled.graph.sites) == 2
    assert [call.path for call in compiled.graph.unshared.values()] == ["blocks.0.mixer", "blocks.1.mixer"]


def test_the_module_itself_is_called_with_its_weights_of_now() -> None:
    model = zoo.UNSHARED["convolution"][0]()
    packed = ppcompile.wrap(model)
    batch = ppcompile.pack([ppcompile.Group([1, 2, 3], [[4, 5], [6]])])
    before = packed(batch).logps
    with torch.no_grad():
        model.blocks[0].mixer.conv.weight.mul_(2)
    assert not torch.allclose(packed(batch).logps, before)
    assert ppcompile.verify(packed).ok


class ReadsPositionsAndMask(nn.Module):
    """A mixer that is given what the model computes from positions: a table, and a mask of tokens by tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        weights = torch.where(mask, 1.0, 0.0) @ torch.eye(mask.shape[-1])
        return (weights @ self.linear(x) * table).cumsum(1)


class WithPositions(zoo.PlainGPT):
    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(ReadsPositionsAndMask(32) for _ in range(2))
        self.window = 5

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        row = torch.arange(ids.shape[1])
        distance = row[:, None] - row[None, :]
        mask = (distance >= 0) & (distance < self.window)
        table = torch.sin(row[None, :, None] * torch.arange(1, 33) / 7)
        for block, mixer in zip(self.blocks, self.mixers, strict=True):
            x = block(x + 0.1 * mixer(x, table, mask[None]))
        return self.head(self.norm(x))


def test_positions_and_masks_are_those_of_the_unpacked_row() -> None:
    packed = ppcompile.wrap(zoo.sharpen(WithPositions()).eval())
    assert {call.path for call in packed.compiled().graph.unshared.values()} == {"mixers.0", "mixers.1"}
    assert ppcompile.verify(packed).forward <= 2e-5


def test_positions_may_borrow_the_shape_of_the_token_ids() -> None:
    """``expand_as`` reads nothing of the tensor that lends its shape."""

    class ByShape(WithPositions):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            row = torch.arange(600)[None, : ids.shape[1]].expand_as(ids)[0]
            mask = row[:, None] >= row[None, :]
            table = torch.sin(row.type_as(x)[None, :, None] * torch.arange(1, 33) / 7)
            for block, mixer in zip(self.blocks, self.mixers, strict=True):
                x = block(x + 0.1 * mixer(x, table, mask[None]))
            return self.head(self.norm(x))

    packed = ppcompile.wrap(zoo.sharpen(ByShape()).eval())
    assert packed.compiled().graph.unshared
    assert ppcompile.verify(packed).forward <= 2e-5


def test_of_tokens_that_lend_their_shape_nothing_is_computed_again() -> None:
    class ByShapeOfDeepTokens(WithPositions):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            row = torch.arange(ids.shape[1])
            mask = row[:, None] >= row[None, :]
            for block, mixer in zip(self.blocks, self.mixers, strict=True):
                x = block(x)
                table = torch.sin(row.type_as(x)[None, :, None] * torch.arange(1, 33) / 7)
                x = x + 0.1 * mixer(x, table, mask[None])
            return self.head(self.norm(x))

    packed = ppcompile.wrap(zoo.sharpen(ByShapeOfDeepTokens()).eval())
    counts = packed.compiled().graph.op_counts()
    assert counts["aten.linear.default"] == 2 * 4  # qkv, out and two of the feed-forward network, in each block
    assert ppcompile.verify(packed).forward <= 2e-5


def test_what_depends_on_the_rows_length_is_refused() -> None:
    class CountsTheRow(WithPositions):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.words(ids)
            row = torch.arange(ids.shape[1])
            mask = row[:, None] >= row[None, :]
            table = (row.flip(0) / 100)[None, :, None].expand(1, -1, 32)
            for block, mixer in zip(self.blocks, self.mixers, strict=True):
                x = block(x + 0.1 * mixer(x, table, mask[None]))
            return self.head(self.norm(x))

    with pytest.raises(ppcompile.NotPackable, match="depend on the row's length"):
        ppcompile.wrap(zoo.sharpen(CountsTheRow()).eval())


def test_a_module_that_keeps_state_is_refused() -> None:
    class Remembers(zoo.RunningSum):
        last: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            carried = 0.0 if self.last is None else self.last.mean()
            self.last = x.detach()
            return super().forward(x) + carried

    with pytest.raises(ppcompile.NotPackable):
        ppcompile.wrap(zoo.sharpen(zoo.PlainGPT(mixer=Remembers)).eval())


class Asks(zoo.RunningSum):
    """Reads the token ids from a list that the model fills: they are no argument."""

    ids: list[Tensor]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (self.ids[0] == 5).any()


class Fills(zoo.PlainGPT):
    def __init__(self) -> None:
        super().__init__(mixer=Asks)
        for block in self.blocks:
            block.mixer.ids = []

    def forward(self, ids: Tensor) -> Tensor:
        for block in self.blocks:
            block.mixer.ids[:] = [ids]
        logits = super().forward(ids)
        for block in self.blocks:
            block.mixer.ids.clear()
        return logits


class Tells(zoo.RunningSum):
    """Leaves its result in a list that the model reads later."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.told: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.told[:] = [x[:, :1].clone()]
        return super().forward(x)


class Listens(zoo.PlainGPT):
    def __init__(self) -> None:
        super().__init__(mixer=Tells)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.blocks:
            x = block(x) + block.mixer.told[0]
        return self.head(self.norm(x))


class Overwrites(zoo.RunningSum):
    def forward(self, x: Tensor) -> Tensor:
        x.add_(x.cumsum(1))
        return self.linear(x)


def test_a_module_that_overwrites_its_input_is_kept_together_with_what_gave_it() -> None:
    packed = ppcompile.wrap(zoo.sharpen(zoo.PlainGPT(mixer=Overwrites)).eval(), verify=True)
    assert {call.path for call in packed.compiled().graph.unshared.values()} == {"blocks.0", "blocks.1"}


@pytest.mark.parametrize("build", [Fills, Listens])
def test_what_goes_in_or_out_unseen_is_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ppcompile.NotPackable):
        ppcompile.wrap(zoo.sharpen(build()).eval())


def test_a_branch_that_only_long_rows_take_is_refused() -> None:
    class LongRows(zoo.RunningSum):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.shape[1] > 1000 else 1)

    with pytest.raises(ppcompile.NotPackable, match="in a row of"):
        ppcompile.wrap(zoo.sharpen(zoo.PlainGPT(mixer=LongRows)).eval())


class HasATable(zoo.RunningSum):
    """Knows 400 positions, fewer than the model around it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("table", torch.linspace(0, 1, 400))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.table[: x.shape[1], None]


def test_a_module_with_a_table_shorter_than_the_models_is_proved_up_to_its_end() -> None:
    packed = ppcompile.wrap(zoo.sharpen(zoo.PlainGPT(mixer=HasATable)).eval())
    assert len(packed.compiled().graph.unshared) == 2
    assert ppcompile.verify(packed).forward <= 2e-5

    class ChangesItsWays(HasATable):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (2 if x.shape[1] > 390 else 1)

    with pytest.raises(ppcompile.NotPackable, match="in a row of 400"):
        ppcompile.wrap(zoo.sharpen(zoo.PlainGPT(mixer=ChangesItsWays)).eval())


class PicksKeys(nn.Module):
    """Attention to the few keys whose scores are largest, and which ones those were."""

    def __init__(self, width: int, picks: int) -> None:
        super().__init__()
        self.qkv, self.picks = nn.Linear(width, 3 * width), picks

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        q, k, _ = self.qkv(x).chunk(3, -1)
        scores = (q @ k.transpose(1, 2)).masked_fill(hidden_from(x), -torch.inf)
        picked = scores.topk(min(self.picks, x.shape[1])).indices
        return attend(self.qkv(x), hidden_from(x), picked), picked


class UsesPicks(nn.Module):
    """Attention to the keys that another layer has picked; ``mask`` keeps those that follow out."""

    def __init__(self, width: int, mask: bool = True) -> None:
        super().__init__()
        self.qkv, self.mask = nn.Linear(width, 3 * width), mask

    def forward(self, x: Tensor, picked: Tensor) -> Tensor:
        return attend(self.qkv(x), hidden_from(x) & self.mask, picked)


def hidden_from(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)


def attend(qkv: Tensor, hidden: Tensor, picked: Tensor) -> Tensor:
    q, k, v = qkv.chunk(3, -1)
    others = torch.ones(qkv.shape[0], *hidden.shape, dtype=torch.bool).scatter(-1, picked, False)
    return (q @ k.transpose(1, 2)).masked_fill(hidden | others, -1e9).softmax(-1) @ v


class SharedPicks(zoo.PlainGPT):
    """The second mixer uses what the first one picked."""

    def __init__(self, picks: int = 4, mask: bool = True, elsewhere: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.elsewhere = PicksKeys(32, picks), UsesPicks(32, mask), elsewhere

    def forward(self, ids: Tensor) -> Tensor:
        # Words alone would tie where one stands twice, and which of the two is picked nothing says.
        x = self.words(ids) + torch.sin(torch.arange(ids.shape[1])[:, None] * torch.arange(1, 33) / 9)
        mixed, picked = self.first(x)
        x = self.blocks[0](x + mixed)
        x = self.blocks[1](x + self.second(x, picked))
        if self.elsewhere:
            x = x + picked.float().mean(-1, keepdim=True)
        return self.head(self.norm(x))


@pytest.mark.parametrize("picks", [4, 20])  # fewer and more than the rows that the model is watched on have tokens
def test_what_one_hands_to_another_stays_on_the_rows(picks: int) -> None:
    packed = ppcompile.wrap(zoo.sharpen(SharedPicks(picks)).eval())
    calls = packed.compiled().graph.unshared.values()
    assert {call.path for call in calls} == {"first", "second"}
    assert all(call.proved for call in calls)
    assert len(packed.compiled().graph.sites) == 2
    report = ppcompile.verify(packed)
    assert report.forward <= 2e-5
    assert report.gradient is not None
    assert report.gradient <= 1e-4


def test_picks_that_show_what_follows_are_refused() -> None:
    with pytest.raises(ppcompile.NotPackable, match=r"second cannot run on rows .* not causal"):
        ppcompile.wrap(zoo.sharpen(SharedPicks(mask=False)).eval())


@pytest.mark.parametrize("picks", [4, 20])
def test_picks_that_the_rest_of_the_model_reads_are_refused(picks: int) -> None:
    with pytest.raises(ppcompile.NotPackable, match=r"indices that depend on what follows|not one row per token"):
        ppcompile.wrap(zoo.sharpen(SharedPicks(picks, elsewhere=True)).eval())


class SumAndState(zoo.RunningSum):
    """Returns its last state as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = super().forward(x)
        return y, y[:, -1]


class WithState(zoo.PlainGPT):
    def __init__(self, read: bool) -> None:
        super().__init__()
        self.mixer, self.read = SumAndState(32), read

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        y, state = self.mixer(x)
        x = x + 0.1 * y
        if self.read:
            x = x + state[:, None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_a_state_that_nobody_reads_is_left_out() -> None:
    packed = ppcompile.wrap(zoo.sharpen(WithState(read=False)).eval())
    assert [call.path for call in packed.compiled().graph.unshared.values()] == ["mixer"]
    assert ppcompile.verify(packed).forward <= 2e-5


def test_a_state_that_the_rest_of_the_model_reads_is_refused() -> None:
    with pytest.raises(ppcompile.NotPackable, match="mixer returns something that is not one row per token"):
        ppcompile.wrap(zoo.sharpen(WithState(read=True)).eval())


class TwoMixers(nn.Module):
    """What keeps the second from being packed comes to light when the first one is out of the graph."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = zoo.Convolution(width), zoo.RunningSum(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def test_a_module_is_proved_once_however_often_the_model_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    proved: list[str] = []
    prove = unshare.prove_causal

    def note(chain: causality.Chain, *arguments: Any, **options: Any) -> str | None:
        proved.append(chain.call.path)
        return prove(chain, *arguments, **options)

    monkeypatch.setattr(unshare, "prove_causal", note)
    packed = ppcompile.wrap(zoo.sharpen(zoo.PlainGPT(mixer=TwoMixers)).eval())
    assert sorted(proved) == [f"blocks.{n}.mixer.{which}" for n in (0, 1) for which in ("first", "second")]
    assert all(call.proved for call in packed.compiled().graph.unshared.values())
    assert ppcompile.verify(packed).forward <= 2e-5
