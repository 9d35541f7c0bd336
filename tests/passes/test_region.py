"""Expert layers are proved token-wise as a whole; a dispatch that lets tokens feel each other is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.passes.base import NotPackable
from ppcompile.verification import unpacked_logps

WIDTH, EXPERTS = 16, 4


class Experts(nn.Module):
    """Sorts tokens by expert, multiplies, puts them back; ``drop`` and ``weigh`` spoil it on purpose."""

    def __init__(self, dispatch: Callable[[Experts, Tensor], Tensor]) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))
        self.dispatch = dispatch

    def forward(self, x: Tensor) -> Tensor:
        return self.dispatch(self, x[0])[None]


def apply_experts(m: Experts, x: Tensor, expert: Tensor) -> Tensor:
    """``[T, C]`` and the expert of each token -> ``[T, C]``, tokens sorted by expert on the way."""
    order = expert.argsort(stable=True)
    sorted_x, sorted_expert = x[order], expert[order]
    out = torch.bmm(sorted_x[:, None], m.up[sorted_expert])[:, 0]
    return torch.zeros_like(x).index_put((order,), out)


def sorted_dispatch(m: Experts, x: Tensor) -> Tensor:
    weight, expert = m.router(x).softmax(-1).max(-1)
    return apply_experts(m, x, expert) * weight[:, None]


def added_in_place(m: Experts, x: Tensor) -> Tensor:
    expert = m.router(x).argmax(-1)
    order = expert.argsort()
    out = torch.zeros_like(x)
    out.index_add_(0, order, torch.bmm(x[order][:, None], m.up[expert[order]])[:, 0])
    return out


def split_by_counts(m: Experts, x: Tensor) -> Tensor:
    """The counts are sizes of the experts' groups, and nothing else (as in JetMoE)."""
    expert = m.router(x).argmax(-1)
    counts = torch.nn.functional.one_hot(expert, EXPERTS).sum(0).tolist()
    order = expert.argsort(stable=True)
    groups = zip(x[order].split(counts), m.up, strict=True)
    return torch.zeros_like(x).index_add(0, order, torch.cat([group @ up for group, up in groups]))


def weights_that_come_to_nothing(m: Experts, x: Tensor) -> Tensor:
    """Large tokens have scores of 0 with every expert, and weights of 0/0: of those nothing can be said."""
    weight, expert = m.router(x - x.abs().amax(-1, keepdim=True) * 3).sigmoid().topk(2)
    return apply_experts(m, x, expert[:, 0]) * (weight / weight.sum(-1, keepdim=True))[:, :1]


class Siblings(nn.Module):
    """Router and experts are called one after the other by the model: no module holds both."""

    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(zoo.VOCABULARY, WIDTH), nn.LayerNorm(WIDTH)
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), ChosenExperts(spoil)
        self.head = nn.Linear(WIDTH, zoo.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        weight, expert = self.router(x[0]).softmax(-1).topk(2)
        return self.head(self.norm(x + self.experts(x[0], weight, expert)[None]))


class ChosenExperts(nn.Module):
    def __init__(self, spoil: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.spoil = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH)), spoil

    def forward(self, x: Tensor, weight: Tensor, expert: Tensor) -> Tensor:
        both = [apply_experts(self, x, self.spoil(expert[:, n])) * weight[:, n, None] for n in range(2)]
        return both[0] + both[1]


def capacity(m: Experts, x: Tensor) -> Tensor:
    """Drops the tokens of an expert beyond the twentieth: whether a token is dropped depends on those before it."""
    expert = m.router(x).argmax(-1)
    place = torch.nn.functional.one_hot(expert, EXPERTS).cumsum(0).gather(1, expert[:, None])
    return apply_experts(m, x, expert) * (place <= 20)


def normalized_over_the_row(m: Experts, x: Tensor) -> Tensor:
    score = m.router(x)
    weight = score.exp() / score.exp().sum(0, keepdim=True)
    return apply_experts(m, x, score.argmax(-1)) * weight.amax(-1, keepdim=True)


def neighbours(m: Experts, x: Tensor) -> Tensor:
    expert = m.router(x).argmax(-1)
    return apply_experts(m, x, expert) + x[(expert.argsort() - 1).clamp(min=0)]


def jittered(m: Experts, x: Tensor) -> Tensor:
    return apply_experts(m, x, (m.router(x) + torch.rand(x.shape[0], EXPERTS)).argmax(-1))


def rare_crowd(m: Experts, x: Tensor) -> Tensor:
    """Counts what random tokens never are: no number could show it."""
    return apply_experts(m, x, m.router(x).argmax(-1)) * (1 + (x[:, 0] > 1e9).long().sum())


def not_a_number(m: Experts, x: Tensor) -> Tensor:
    """NaN for every token: equal to nothing, so nothing is proved."""
    return apply_experts(m, x, m.router(x).argmax(-1)) + (x.sort(0).values * 0 - 1).sqrt()


def overwrites_its_input(m: Experts, x: Tensor) -> Tensor:
    expert = m.router(x).argmax(-1)
    y = apply_experts(m, x, expert)
    x.index_copy_(0, expert.argsort(), x * 2)
    return y


class Model(nn.Module):
    def __init__(self, dispatch: Callable[[Experts, Tensor], Tensor]) -> None:
        super().__init__()
        self.words, self.experts = nn.Embedding(zoo.VOCABULARY, WIDTH), Experts(dispatch)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, zoo.VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        y = self.experts(x)
        return self.head(self.norm(x + y))


def assert_exact(model: nn.Module) -> None:
    packed = ppcompile.wrap(model)
    generator = torch.Generator().manual_seed(0)
    ids = lambda n: torch.randint(3, zoo.VOCABULARY, (n,), generator=generator).tolist()  # noqa: E731
    batch = ppcompile.pack([ppcompile.Group(ids(30), [ids(9), ids(5)]), ppcompile.Group(ids(3), [ids(4)])])
    torch.testing.assert_close(packed(batch).token_logps, unpacked_logps(model, batch), rtol=0, atol=2e-5)
    (stage,) = (stage for stage in packed.compiled().stages if stage.name == "check_token_mixing")
    assert stage.result.matched


@pytest.mark.parametrize("dispatch", [sorted_dispatch, added_in_place, split_by_counts, weights_that_come_to_nothing])
def test_dispatch_is_proved(dispatch: Callable[[Experts, Tensor], Tensor]) -> None:
    assert_exact(zoo.sharpen(Model(dispatch)).eval())


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_mixtral(implementation: str) -> None:
    model = zoo._transformers("mixtral", num_local_experts=4, num_hidden_layers=1)()
    model.set_experts_implementation(implementation)
    assert_exact(model)


def test_what_chooses_the_experts_may_stand_outside_of_their_module() -> None:
    assert_exact(zoo.sharpen(Siblings(lambda expert: expert)).eval())


@pytest.mark.usefixtures("without_unsharing")
def test_a_choice_that_depends_on_other_tokens_is_refused() -> None:
    with pytest.raises(NotPackable, match="not token-wise either") as caught:
        ppcompile.wrap(zoo.sharpen(Siblings(lambda expert: expert.sort()[0])).eval())
    assert caught.value.refusal.module == "experts"


@pytest.mark.usefixtures("without_unsharing")
def test_a_loop_over_the_experts_that_were_hit_is_refused() -> None:
    """How often it runs depends on the tokens: no graph can hold it."""
    model = zoo._transformers("mixtral", num_local_experts=4, num_hidden_layers=1)()
    model.set_experts_implementation("eager")
    with pytest.raises(NotPackable, match="could not capture"):
        ppcompile.wrap(model)


@pytest.mark.parametrize(
    "dispatch",
    [capacity, normalized_over_the_row, neighbours, jittered, rare_crowd, not_a_number, overwrites_its_input],
)
def test_tokens_that_feel_each_other_are_refused(dispatch: Callable[[Experts, Tensor], Tensor]) -> None:
    with pytest.raises(NotPackable) as caught:
        ppcompile.wrap(zoo.sharpen(Model(dispatch)).eval())
    assert caught.value.refusal.module.startswith("experts")
