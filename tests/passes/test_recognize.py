"""Every spelling of attention is found and understood; what looks like it is left alone or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.passes.base import NotPackable
from ppcompile.passes.recognize import recognize_attention
from ppcompile.passes.site import Site
from ppcompile.verification import unpacked_logps

HEADS, SIZE = 4, 8
WIDTH = HEADS * SIZE
Attend = Callable[[Tensor, Tensor, Tensor, nn.Module], Tensor]


class Attention(nn.Module):
    """Projections around a function of ``q, k, v [1, H, L, D]``."""

    attend: Attend

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.sinks = nn.Parameter(torch.zeros(HEADS))
        self.slopes = nn.Parameter(torch.linspace(0.1, 1, HEADS))
        self.memory = nn.Parameter(torch.randn(HEADS, 5, SIZE))
        self.register_buffer("tril", torch.ones(zoo.POSITIONS, zoo.POSITIONS).tril().bool(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = [p(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        return self.out(type(self).attend(*heads, self).transpose(1, 2).flatten(2))


class OneLayer(nn.Module):
    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.words = nn.Embedding(zoo.VOCABULARY, WIDTH)
        self.attention = type("Attention", (Attention,), {"attend": staticmethod(attend)})()
        self.head = nn.Linear(WIDTH, zoo.VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.head(x + self.attention(x))


def one_layer(attend: Attend) -> nn.Module:
    return zoo.sharpen(OneLayer(attend)).eval()


def causal(x: Tensor) -> Tensor:
    p = torch.arange(x.shape[-2], device=x.device)
    return p[None, :] <= p[:, None]


def scores(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(SIZE)).masked_fill(~causal(q), float("-inf"))


def sandwich(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def with_batched_products(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    q, k, v = q[0], k[0], v[0]
    alibi = (m.slopes[:, None, None] * -(torch.arange(q.shape[1]) - torch.arange(q.shape[1])[:, None]).abs()).float()
    s = torch.baddbmm(alibi.expand(HEADS, -1, -1), q, k.transpose(1, 2), beta=0.5, alpha=0.25)
    return torch.bmm(s.masked_fill(~causal(q), -1e9).softmax(-1), v)[None]


def shifted(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    s = scores(q, k)
    return (s - s.max(-1, keepdim=True).values).softmax(-1) @ v


def with_sinks(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    s = torch.cat([scores(q, k), m.sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)], -1)
    return s.softmax(-1)[..., :-1] @ v


def subtracted_mask(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    b = causal(q).float()
    s = q @ k.mT / math.sqrt(SIZE)
    return (s * b - 1e9 * (1 - b)).softmax(-1) @ v


def scaled_after_the_mask(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return ((q @ k.mT + torch.where(causal(q), 0.0, -1e9)) / math.sqrt(SIZE)).softmax(-1) @ v


def shared_keys(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return scores(q, k[:, :1]).softmax(-1) @ v[:, :1]


def shared_keys_own_values(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return scores(q, k[:, :1]).softmax(-1) @ v


def groups_last(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    """Query head ``(g, r)`` reads key head ``g``: the usual order."""
    q, k, v = q.unflatten(1, (2, 2)), k[:, :2].unsqueeze(2), v[:, :2].unsqueeze(2)
    return (scores(q, k).softmax(-1) @ v).flatten(1, 2)


def groups_first(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    """Query head ``(r, g)`` reads key head ``g``: read as the usual order it would be the wrong head."""
    q, k, v = q.unflatten(1, (2, 2)), k[:, :2].unsqueeze(1), v[:, :2].unsqueeze(1)
    return (scores(q, k).softmax(-1) @ v).flatten(1, 2)


def fused_groups_first(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    q, k, v = q.unflatten(1, (2, 2)), k[:, :2].unsqueeze(1), v[:, :2].unsqueeze(1)
    return F.scaled_dot_product_attention(q, k.expand_as(q), v.expand_as(q), is_causal=True).flatten(1, 2)


def repeated(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    """``repeat``, not ``repeat_interleave``: the other order of heads."""
    k, v = k[:, :2].repeat(1, 2, 1, 1), v[:, :2].repeat(1, 2, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def interleaved(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    k, v = k[:, :2].repeat_interleave(2, dim=1), v[:, :2].repeat_interleave(2, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def grouped(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True, scale=0.3)


def per_head_mask(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    p = torch.arange(q.shape[2])
    bias = m.slopes.view(-1, 1, 1) * (p[None] - p[:, None])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(~causal(q), float("-inf"))[None])


def flattened_heads(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    mask = m.tril[: q.shape[2], : q.shape[2]]
    return F.scaled_dot_product_attention(q[0], k[0], v[0], attn_mask=mask)[None]


def gate_of_tokens(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    """A score that reads a value of the key token and one of the query token (forgetting attention)."""
    gate = q[..., 0].sigmoid()[..., :, None] - k[..., 1].abs()[..., None, :]
    return (q @ k.mT * 0.3 + gate).masked_fill(~causal(q), -1e30).softmax(-1) @ v


def equations(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    """Grouped heads, axes in another order than a product would have them."""
    q, k, v = q.unflatten(1, (2, 2)).permute(0, 3, 1, 2, 4), k[:, :2].transpose(1, 2), v[:, :2].transpose(1, 2)
    s = torch.einsum("bqgrd,bkgd->bgrqk", q, k) * 0.3
    weights = s.masked_fill(~causal(q.transpose(1, 2)[..., 0, :]), -1e9).softmax(-1)
    return torch.einsum("bgrqk,bkgd->bgrqd", weights, v).flatten(1, 2)


def floored(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    lowest = torch.full((), torch.finfo(q.dtype).min)
    return torch.max(scores(q, k), lowest).softmax(-1) @ v


def sinks_as_a_factor(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    s = scores(q, k)
    factor = (s.logsumexp(-1) - m.sinks.view(1, -1, 1)).float().sigmoid()
    return (s.softmax(-1) @ v) * factor.unsqueeze(-1).to(v.dtype)


def relative_to_the_query(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    """Each query has a logit for each of the distances up to 7."""
    p = torch.arange(q.shape[2])
    distance = (p[:, None] - p[None, :]).clamp(0, 7)
    return (scores(q, k) + q.gather(-1, distance.expand(1, q.shape[1], -1, -1))).softmax(-1) @ v


EXAMPLES: dict[str, Attend] = {
    f.__name__: f
    for f in (
        sandwich, with_batched_products, shifted, with_sinks, subtracted_mask, scaled_after_the_mask, shared_keys,
        shared_keys_own_values, groups_last, groups_first, fused_groups_first, repeated, interleaved, grouped,
        per_head_mask, flattened_heads, gate_of_tokens, equations, floored, sinks_as_a_factor, relative_to_the_query,
    )
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_fires_and_is_exact(name: str) -> None:
    torch.manual_seed(0)
    model = one_layer(EXAMPLES[name])
    ids = lambda n: torch.randint(0, zoo.VOCABULARY, (n,)).tolist()  # noqa: E731
    batch = ppcompile.pack([ppcompile.Group(ids(9), [ids(5), ids(3)]), ppcompile.Group(ids(4), [ids(6)])])
    packed = ppcompile.wrap(model, backend="reference")
    assert len(packed.compiled().graph.sites) == 1
    expected = unpacked_logps(model, batch)
    found = packed(batch).token_logps
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    weights = torch.linspace(-1, 1, len(found))
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours = torch.autograd.grad((found * weights).sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------- look-alikes


def over_heads(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2)


def fused_over_heads(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def over_experts(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return (q @ m.memory[0].T).softmax(-1) @ m.memory[0] + v


def to_a_memory(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return (q @ m.memory.transpose(-1, -2)).softmax(dim=-1) @ m.memory


def fused_to_a_memory(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(q, m.memory[None], m.memory[None])


LEFT_ALONE: dict[str, Attend] = {
    f.__name__: f for f in (over_heads, fused_over_heads, over_experts, to_a_memory, fused_to_a_memory)
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_lookalikes_are_left_alone(name: str) -> None:
    model = one_layer(LEFT_ALONE[name])
    batch = ppcompile.pack([ppcompile.Group([3, 4, 5], [[6, 7], [8]])])
    packed = ppcompile.wrap(model)
    assert not packed.compiled().graph.sites
    torch.testing.assert_close(packed(batch).token_logps, unpacked_logps(model, batch), rtol=0, atol=2e-5)


def weights_returned(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    weights = scores(q, k).softmax(-1)
    return weights @ v + weights.amax(-1, keepdim=True)


def log_sum_exp_returned(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    s = scores(q, k)
    return s.softmax(-1) @ v + s.logsumexp(-1, keepdim=True)


def sinks_of_other_scores(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    factor = ((scores(q, k) * 2).logsumexp(-1, keepdim=True) - m.sinks.view(1, -1, 1, 1)).sigmoid()
    return (scores(q, k).softmax(-1) @ v) * factor


def factor_over_queries(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    s = scores(q, k)
    return (s.softmax(-1) @ v) * (s.logsumexp(-2) - m.sinks.view(1, -1, 1)).sigmoid().unsqueeze(-1)


def sinks_cut_from_the_wrong_side(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    s = torch.cat([scores(q, k), m.sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1)], -1)
    return s.softmax(-1)[..., 1:] @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return scores(q, k).transpose(-1, -2).softmax(-2).transpose(-1, -2) @ v + scores(q, k).softmax(-2) @ v


def shifted_by_the_key(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    s = scores(q, k)
    return (s - s.amax(-2, keepdim=True)).softmax(-1) @ v


def weights_transposed(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return scores(q, k).softmax(-1).transpose(-1, -2) @ v


def heads_of_weights_swapped(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    weights = scores(q, k).softmax(-1)
    return weights.view(1, 2, 2, *weights.shape[2:]).transpose(1, 2).reshape(weights.shape) @ v


def two_products(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return (scores(q, k) + q @ v.transpose(-1, -2)).softmax(-1) @ v


def stopped_gradient(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    s = scores(q, k)
    return (s + s.detach()).softmax(-1) @ v


def off_by_one(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return F.pad(scores(q, k), (0, 1)).softmax(-1)[..., :-1] @ v


def pooled_keys(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return F.scaled_dot_product_attention(q, k[:, :, ::2], v[:, :, ::2])


def not_own(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    p = torch.arange(q.shape[2])
    return (q @ k.mT).masked_fill(p[None] >= p[:, None], -1e9).softmax(-1) @ v


def capped_after_the_mask(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return (5 * (scores(q, k) / 5).tanh()).softmax(-1) @ v


def scaled_by_length(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return (scores(q, k) * math.log(7) * q.shape[2]).softmax(-1) @ v


def dropout_of_scores(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return F.dropout(scores(q, k), 0.5, training=True).softmax(-1) @ v


def dropout_of_weights(q: Tensor, k: Tensor, v: Tensor, m: nn.Module) -> Tensor:
    return F.dropout(scores(q, k).softmax(-1), 0.5, training=True) @ v


REFUSED: dict[str, Attend] = {
    f.__name__: f
    for f in (
        weights_returned, log_sum_exp_returned, sinks_of_other_scores, factor_over_queries,
        sinks_cut_from_the_wrong_side, over_queries, shifted_by_the_key, weights_transposed, heads_of_weights_swapped,
        two_products, stopped_gradient, off_by_one, pooled_keys, not_own,
        capped_after_the_mask, scaled_by_length, dropout_of_scores, dropout_of_weights,
    )
}  # fmt: skip


@pytest.mark.usefixtures("without_unsharing")
@pytest.mark.parametrize("name", REFUSED)
def test_lookalikes_are_refused_where_they_would_be_wrong(name: str) -> None:
    with pytest.raises(NotPackable) as caught:
        ppcompile.wrap(one_layer(REFUSED[name]))
    assert caught.value.refusal.module.startswith("attention")


def documents_by_running_count(ids: Tensor, words: Tensor) -> Tensor:
    x = F.embedding(ids, words)[:, None]
    document = (ids == 5).cumsum(1)
    mask = (document[:, :, None] == document[:, None, :]) & causal(x)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask[:, None])[:, 0] @ words.T


def test_a_document_mask_of_running_counts_counts_along_each_sequence() -> None:
    """A count of what came before: it once was read as always 0, and the mask dropped."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Parameter(torch.randn(zoo.VOCABULARY, 16))

        def forward(self, ids: Tensor) -> Tensor:
            return documents_by_running_count(ids, self.words)

    torch.manual_seed(0)
    model = Model()
    batch = ppcompile.pack([ppcompile.Group([7, 5, 6, 8], [[9, 5, 4, 3], [10, 11], [5, 12]])] * 2, share="prompt")
    packed = ppcompile.wrap(model)
    assert not packed.compiled().graph.unshared
    torch.testing.assert_close(packed(batch).token_logps, unpacked_logps(model, batch), rtol=0, atol=2e-5)


def test_recognizers_only_read(captured: Any) -> None:
    graph = captured(zoo._transformers("gpt_oss", num_hidden_layers=1, num_local_experts=4, num_experts_per_tok=2)())
    before = graph.readable()
    result = recognize_attention(graph)
    assert graph.readable() == before
    assert len(result.matched) == len(graph.sites) == 1
    assert all(isinstance(site, Site) for site in graph.sites)
    assert {site.spelling for site in graph.sites} == {"softmax"}
