"""Everything but attention, drawn by name: norms, feed-forward parts, mixers of tokens, embeddings, heads.

Tables called ``WRONG_...`` hold what no causal model does. Shapes: ``B`` rows, ``L`` tokens, ``C`` width, ``V`` words.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import POSITIONS

VOCABULARY = 31
Function = Callable[..., Tensor]


class Weighted(nn.Module):
    """``function(self, x)``, with some weights to use."""

    def __init__(self, function: Function, width: int) -> None:
        super().__init__()
        self.function, self.width = function, width
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def weighted(function: Function) -> Callable[[int], nn.Module]:
    return lambda width: Weighted(function, width)


# --------------------------------------------------------------------------- norms


class OverChannels(nn.Module):
    """A norm of torch's that takes ``[B, C, L]``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class GroupsOfFeatures(nn.Module):
    """A group norm of each token: tokens stand where torch wants the batch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.reshape(-1, x.shape[-1])).view(x.shape)


def _root_mean_square(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(dim, keepdim=True) + 1e-6)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "layer_without_bias": lambda width: nn.LayerNorm(width, bias=False),
    "layer_written_out": weighted(
        lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt() * m.weight
    ),
    "rms": nn.RMSNorm,
    "rms_written_out": weighted(lambda m, x: x * _root_mean_square(x) * m.weight),
    "rms_of_wide": weighted(lambda m, x: m.weight * (_wide(x) * _root_mean_square(_wide(x))).to(x.dtype)),
    "rms_plus_one": weighted(lambda m, x: x * _root_mean_square(x) * (1 + m.bias)),
    "unit": weighted(lambda m, x: F.normalize(x, dim=-1) * m.width**0.5 * m.weight),
    "tanh": weighted(lambda m, x: torch.tanh(0.5 * x) * m.weight + m.bias),
    "groups_of_features": GroupsOfFeatures,
    "batch_in_eval": lambda width: OverChannels(nn.BatchNorm1d(width)),
}
WRONG_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": lambda width: OverChannels(nn.BatchNorm1d(width, track_running_stats=False)),
    "instance": lambda width: OverChannels(nn.InstanceNorm1d(width, affine=True)),
    "groups_of_tokens": lambda width: OverChannels(nn.GroupNorm(2, width)),
    "layer_over_the_row": weighted(lambda m, x: F.layer_norm(x, x.shape[1:]) * m.weight),
    "rms_over_tokens": weighted(lambda m, x: x * _root_mean_square(x, 1) * m.weight),
    "unit_over_tokens": weighted(lambda m, x: F.normalize(x, dim=1) * 4 * m.weight),
    "by_the_largest": weighted(lambda m, x: x / x.abs().amax((1, 2), keepdim=True) * m.weight),
}

# --------------------------------------------------------------------------- feed-forward


class FeedForward(nn.Module):
    """``down(activation(gate, up))``."""

    def __init__(self, activation: Callable[[Tensor, Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.activation = activation
        self.gate, self.up = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width, bias=False)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x), self.up(x)))


def feed_forward(activation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[int], nn.Module]:
    return lambda width: FeedForward(activation, width)


class Chunked(nn.Module):
    """One matrix for both halves of a gated unit, on rows without a batch axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x.reshape(-1, x.shape[-1])).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up).view(x.shape)


class OneWideConvolution(nn.Module):
    """GPT-2's "Conv1D" taken at its word: a convolution of width one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(width, 2 * width, 1), nn.Conv1d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)


class Experts(nn.Module):
    """Three small experts; ``function(self, x [N, C])`` dispatches."""

    def __init__(self, function: Function, width: int) -> None:
        super().__init__()
        self.function = function
        self.router = nn.Linear(width, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.SiLU()) for _ in range(3))
        self.stacked = nn.Parameter(torch.zeros(3, width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x.reshape(-1, x.shape[-1])).view(x.shape)


def experts(function: Function) -> Callable[[int], nn.Module]:
    return lambda width: Experts(function, width)


def _all_experts(m: Any, x: Tensor) -> Tensor:
    shares = m.router(x).softmax(-1)
    return torch.stack([expert(x) for expert in m.experts], dim=-1).mul(shares[:, None, :]).sum(-1)


def _best_two(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    shares, chosen = m.router(x).softmax(-1).topk(2, dim=-1)
    return shares / shares.sum(-1, keepdim=True), chosen


def _loop_over_masks(m: Any, x: Tensor) -> Tensor:
    shares, chosen = _best_two(m, x)
    out = torch.zeros_like(x)
    for n, expert in enumerate(m.experts):
        out = out + expert(x) * (shares * (chosen == n)).sum(-1, keepdim=True)
    return out


def _loop_over_rows(m: Any, x: Tensor) -> Tensor:
    shares, chosen = _best_two(m, x)
    out = torch.zeros_like(x)
    for n, expert in enumerate(m.experts):
        row, place = torch.where(chosen == n)
        out.index_add_(0, row, expert(x[row]) * shares[row, place, None])
    return out


def _scattered_shares(m: Any, x: Tensor) -> Tensor:
    shares, chosen = _best_two(m, x)
    spread = torch.zeros(x.shape[0], 3, dtype=x.dtype, device=x.device).scatter_(1, chosen, shares)
    return sum(expert(x) * spread[:, n : n + 1] for n, expert in enumerate(m.experts))


def _by_equation(m: Any, x: Tensor) -> Tensor:
    return torch.einsum("ne,ecd,nc->nd", m.router(x).softmax(-1), m.stacked, x)


def _gathered_weights(m: Any, x: Tensor) -> Tensor:
    shares, chosen = _best_two(m, x)
    return (torch.einsum("nc,nkcd->nkd", x, m.stacked[chosen]) * shares[..., None]).sum(1)


def _one_expert(m: Any, x: Tensor) -> Tensor:
    chosen = F.one_hot(m.router(x).argmax(-1), 3).to(x.dtype)
    return torch.bmm(x.expand(3, -1, -1), m.stacked).mul(chosen.T[..., None]).sum(0)


def _sorted_rows(m: Any, x: Tensor) -> Tensor:
    chosen = m.router(x).argmax(-1)
    order = chosen.argsort(stable=True)
    rows, of = x[order], chosen[order]
    rows = sum(expert(rows) * (of == n)[:, None] for n, expert in enumerate(m.experts))
    return torch.empty_like(x).index_copy(0, order, rows)


def _experts_choose(m: Any, x: Tensor) -> Tensor:
    """Each expert takes its best third of the row's tokens."""
    shares, rows = m.router(x).softmax(-1).T.topk(max(1, x.shape[0] // 3), dim=-1)
    out = torch.zeros_like(x)
    for n, expert in enumerate(m.experts):
        out = out.index_add(0, rows[n], expert(x[rows[n]]) * shares[n, :, None])
    return out


def _capacity_by_length(m: Any, x: Tensor) -> Tensor:
    """The last of an expert's tokens are dropped if there are more than the row's length allows."""
    chosen = F.one_hot(m.router(x).argmax(-1), 3)
    kept = chosen * (chosen.cumsum(0) <= x.shape[0] // 4)
    return sum(expert(x) * kept[:, n : n + 1] for n, expert in enumerate(m.experts))


MLPS: dict[str, Callable[[int], nn.Module]] = {
    "gelu": feed_forward(lambda gate, up: F.gelu(gate)),
    "gelu_tanh": feed_forward(lambda gate, up: F.gelu(gate, approximate="tanh")),
    "relu_squared": feed_forward(lambda gate, up: F.relu(gate).square()),
    "silu_gate": feed_forward(lambda gate, up: F.silu(gate) * up),
    "gelu_gate": feed_forward(lambda gate, up: F.gelu(gate) * up),
    "sigmoid_gate": feed_forward(lambda gate, up: gate.sigmoid() * up),
    "product": feed_forward(lambda gate, up: gate * up / 4),
    "clamped_gate": feed_forward(
        lambda gate, up: (gate.clamp(max=3) * torch.sigmoid(1.7 * gate)) * (up.clamp(-3, 3) + 1)
    ),
    "chunked": Chunked,
    "one_wide_convolution": OneWideConvolution,
    "all_experts": experts(_all_experts),
    "experts_by_mask": experts(_loop_over_masks),
    "experts_by_row": experts(_loop_over_rows),
    "experts_by_scatter": experts(_scattered_shares),
    "experts_by_equation": experts(_by_equation),
    "experts_by_gather": experts(_gathered_weights),
    "experts_by_one_hot": experts(_one_expert),
    "experts_by_sort": experts(_sorted_rows),
}
WRONG_MLPS: dict[str, Callable[[int], nn.Module]] = {
    "experts_choose_tokens": experts(_experts_choose),
    "router_over_tokens": experts(lambda m, x: _by_shares(m, x, m.router(x).softmax(0))),
    "balanced_router": experts(lambda m, x: _by_shares(m, x, (m.router(x) - m.router(x).mean(0)).softmax(-1))),
    "capacity_by_length": experts(_capacity_by_length),
    "excited_by_the_row": feed_forward(lambda gate, up: F.silu(gate) * up.mean(1, keepdim=True).sigmoid()),
    "softmax_over_tokens": feed_forward(lambda gate, up: gate.softmax(1) * up),
}


def _by_shares(m: Any, x: Tensor, shares: Tensor) -> Tensor:
    return torch.einsum("ne,ecd,nc->nd", shares, m.stacked, x)


# --------------------------------------------------------------------------- mixers of tokens


class Mixer(nn.Module):
    """``function(self, x [B, L, C])``; projections, a kernel and a decay to use."""

    def __init__(self, function: Function, width: int) -> None:
        super().__init__()
        self.function = function
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.kernel, self.decay = nn.Parameter(torch.zeros(3, width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function(self, x))


def mixer(function: Function) -> Callable[[int], nn.Module]:
    return lambda width: Mixer(function, width)


class DepthwiseConvolution(nn.Module):
    """``keep`` says which of the padded convolution's ``L + 2`` outputs are the tokens'."""

    def __init__(self, width: int, keep: int) -> None:
        super().__init__()
        self.conv, self.keep = nn.Conv1d(width, width, 3, padding=2, groups=width), keep

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x.transpose(1, 2))[..., self.keep : self.keep + x.shape[1]].transpose(1, 2))


def _shifted(x: Tensor, by: int = 1) -> Tensor:
    return F.pad(x, (0, 0, by, 0))[:, : x.shape[1]]


def _recurrence(m: Any, x: Tensor) -> Tensor:
    """A decaying sum, one token after the other."""
    state, out = torch.zeros_like(x[:, 0]), []
    for token in m.v(x).unbind(1):
        state = m.decay.sigmoid() * state + token
        out.append(state)
    return torch.stack(out, dim=1)


def _linear_attention_step_by_step(m: Any, x: Tensor) -> Tensor:
    """A state ``[B, C, C]`` that forgets by a gate of the token's own."""
    q, k, v = m.q(x), m.k(x) / 4, m.v(x)
    forget, state, out = (x * m.kernel[0]).sigmoid(), x.new_zeros(x.shape[0], x.shape[2], x.shape[2]), []
    for t in range(x.shape[1]):
        state = forget[:, t, :, None] * state + k[:, t, :, None] * v[:, t, None, :]
        out.append(torch.einsum("bc,bcd->bd", q[:, t], state))
    return torch.stack(out, dim=1)


def _retention(m: Any, x: Tensor) -> Tensor:
    """Linear attention at once: ``(q k^T * decay^(i - j)) v`` below the diagonal."""
    place = torch.arange(x.shape[1], device=x.device)
    distance = place[:, None] - place
    decay = torch.where(distance >= 0, 0.8 ** distance.clamp(min=0), 0.0).to(x.dtype)
    return (m.q(x) @ m.k(x).transpose(1, 2) / 8 * decay) @ m.v(x)


def _mean_so_far(m: Any, x: Tensor) -> Tensor:
    return m.v(x).cumsum(1) / torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]


def _mean_by_matrix(m: Any, x: Tensor) -> Tensor:
    weights = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device).tril()
    return (weights / weights.sum(-1, keepdim=True)) @ m.v(x)


def _attention_free(m: Any, x: Tensor) -> Tensor:
    """A running softmax of keys, weighing values."""
    weights = m.k(x).tanh().exp()
    return m.q(x).sigmoid() * (weights * m.v(x)).cumsum(1) / weights.cumsum(1)


MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "convolution": lambda width: DepthwiseConvolution(width, 0),
    "convolution_by_shifts": mixer(lambda m, x: sum(m.kernel[n] * _shifted(x, n) for n in range(3))),
    "convolution_by_windows": mixer(
        lambda m, x: torch.einsum("blcn,nc->blc", F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1), m.kernel)
    ),
    "token_shift": mixer(lambda m, x: torch.lerp(x, _shifted(x), m.decay.sigmoid())),
    "token_shift_by_cat": mixer(lambda m, x: m.v(torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1))),
    "running_sum": mixer(lambda m, x: m.v(x).cumsum(1) / 4),
    "mean_so_far": mixer(_mean_so_far),
    "mean_by_matrix": mixer(_mean_by_matrix),
    "largest_so_far": mixer(lambda m, x: m.v(x).cummax(1)[0]),
    "recurrence": mixer(_recurrence),
    "gated_linear_attention": mixer(_linear_attention_step_by_step),
    "linear_attention": mixer(lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)).tril() @ m.v(x) / 16),
    "sigmoid_attention": mixer(lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)).sigmoid().tril() @ m.v(x) / 4),
    "retention": mixer(_retention),
    "attention_free": mixer(_attention_free),
    "first_token": mixer(lambda m, x: m.v(x) * x[:, :1].tanh()),
    "lstm": lambda width: Recurrent(nn.LSTM(width, width, batch_first=True)),
    "gru": lambda width: Recurrent(nn.GRU(width, width, batch_first=True)),
}


class Recurrent(nn.Module):
    """torch's own recurrences, first of what they return."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0][..., : x.shape[-1]]


class Keeps(nn.Module):
    """Adds something that it kept from its last call: ``attribute`` or ``buffer``."""

    def __init__(self, width: int, where: str) -> None:
        super().__init__()
        self.linear, self.where, self.last = nn.Linear(width, width), where, None
        self.register_buffer("kept", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        mean = y.detach().mean((0, 1))
        if self.where == "buffer":
            y = y + self.kept
            self.kept.mul_(0.5).add_(mean)
            return y
        y = y if self.last is None else y + self.last
        self.last = mean
        return y


class OtherWay(nn.Module):
    """torch's own attention or recurrence, with nothing that hides later tokens."""

    def __init__(self, width: int, recurrent: bool) -> None:
        super().__init__()
        self.attention = None if recurrent else nn.MultiheadAttention(width, 2, batch_first=True)
        self.cell = nn.GRU(width, width // 2, batch_first=True, bidirectional=True) if recurrent else None

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0] if self.attention is None else self.attention(x, x, x, need_weights=False)[0]


WRONG_MIXERS: dict[str, Callable[[int], nn.Module]] = {
    "mean": mixer(lambda m, x: m.v(x).mean(1, keepdim=True).expand_as(x)),
    "mean_by_product": mixer(
        lambda m, x: torch.ones_like(x[..., :1]) @ torch.ones_like(x[..., :1]).mT @ m.v(x) / x.shape[1]
    ),
    "largest": mixer(lambda m, x: m.v(x) * x.amax(1, keepdim=True).tanh()),
    "pooled_by_attention": mixer(lambda m, x: m.v(x) + (m.q(x)[..., :1].softmax(1) * x).sum(1, keepdim=True)),
    "last_token": mixer(lambda m, x: m.v(x) * x[:, -1:].tanh()),
    "centred_convolution": lambda width: DepthwiseConvolution(width, 1),
    "convolution_with_a_future": lambda width: DepthwiseConvolution(width, 2),
    "shifted_back": mixer(lambda m, x: m.v(F.pad(x, (0, 0, 0, 1))[:, 1:])),
    "rolled": mixer(lambda m, x: m.v(x.roll(1, 1))),
    "sorted": mixer(lambda m, x: m.v(x.sort(1)[0])),
    "reversed": mixer(lambda m, x: m.v(x.flip(1))),
    "sum_from_the_end": mixer(lambda m, x: m.v(x).flip(1).cumsum(1).flip(1) / 4),
    "running_sum_over_the_total": mixer(lambda m, x: m.v(x).exp().cumsum(1) / m.v(x).exp().sum(1, keepdim=True)),
    "linear_attention_without_a_mask": mixer(lambda m, x: m.q(x) @ (m.k(x).transpose(1, 2) @ m.v(x)) / 16),
    "linear_attention_above": mixer(lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2)).triu() @ m.v(x) / 16),
    "fourier": mixer(lambda m, x: torch.fft.fft(m.v(x), dim=1).real / 4),
    "divided_by_length": mixer(lambda m, x: m.v(x).cumsum(1) / x.shape[1]),
    "short_rows_only": mixer(lambda m, x: m.v(x) if x.shape[1] < 9 else m.q(x)),
    "backward_only": mixer(lambda m, x: m.v(x) + x.mean(1, keepdim=True) - x.mean(1, keepdim=True).detach()),
    "noise": mixer(lambda m, x: m.v(x) * torch.randn_like(x)),
    "torch_attention": lambda width: OtherWay(width, recurrent=False),
    "torch_recurrence_both_ways": lambda width: OtherWay(width, recurrent=True),
    "kept_in_an_attribute": lambda width: Keeps(width, "attribute"),
    "kept_in_a_buffer": lambda width: Keeps(width, "buffer"),
}

# --------------------------------------------------------------------------- words, places, heads


class Bigrams(nn.Module):
    """Adds an embedding of the token before."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.words, self.before = nn.Embedding(VOCABULARY, width), nn.Embedding(VOCABULARY, width)

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.before(F.pad(ids, (1, 0))[:, :-1])


EMBED: dict[str, Function] = {
    "plain": lambda m, ids: m.words(ids),
    "scaled": lambda m, ids: m.words(ids) * m.width**0.5 / 4,
    "normed": lambda m, ids: F.layer_norm(m.words(ids), (m.width,)),
    "by_one_hot": lambda m, ids: F.one_hot(ids, VOCABULARY).to(m.words.weight.dtype) @ m.words.weight,
    "with_types": lambda m, ids: m.words(ids) + m.more(torch.zeros_like(ids)),
    "with_classes": lambda m, ids: m.words(ids) + m.more(ids % 7),
    "projected": lambda m, ids: m.project(m.words(ids)),
}
WRONG_EMBED: dict[str, Function] = {
    "with_reversed_words": lambda m, ids: m.words(ids) + m.more(ids.flip(1)),
    "with_sorted_words": lambda m, ids: m.words(ids) + m.more(ids.sort(1)[0]),
    "with_rolled_words": lambda m, ids: m.words(ids) + m.more(ids.roll(-1, 1)),
    "by_frequency": lambda m, ids: m.words(ids) / (ids[:, :, None] == ids[:, None, :]).sum(-1)[..., None],
    "centred": lambda m, ids: m.words(ids) - m.words(ids).mean(1, keepdim=True),
    "told_of_a_word": lambda m, ids: m.words(ids) * torch.where((ids == 5).any(1), 2.0, 1.0)[:, None, None],
    "scaled_by_length": lambda m, ids: m.words(ids) * (ids.shape[1] / 10),
    "doubled_in_long_rows": lambda m, ids: m.words(ids) * (2 if ids.shape[1] > 8 else 1),
}

PLACES: dict[str, Function] = {
    "none": lambda m, x, index: x,
    "learned": lambda m, x, index: x + m.places(index),
    "learned_and_shifted": lambda m, x, index: x + m.places(index + 2),
    "learned_slice": lambda m, x, index: x + m.places.weight[: x.shape[1]],
    "learned_in_a_row": lambda m, x, index: x + m.places.weight[None, : x.shape[1], :],
    "sines": lambda m, x, index: (
        x + torch.sin(index[:, None] * 10.0 ** -torch.linspace(0, 1, m.width, device=x.device))
    ),
    "sines_in_a_buffer": lambda m, x, index: x + m.sines[: x.shape[1]],
    "first_is_special": lambda m, x, index: torch.where((index == 0)[:, None], x * 2, x),
}
WRONG_PLACES: dict[str, Function] = {
    "reversed": lambda m, x, index: x + m.places(index.flip(0)),
    "reversed_slice": lambda m, x, index: x + m.places.weight[: x.shape[1]].flip(0),
    "from_the_end": lambda m, x, index: x + m.places(x.shape[1] - 1 - index),
    "part_of_the_row": lambda m, x, index: x + torch.sin(6 * index[:, None] / x.shape[1] * m.sines[3]),
    "of_the_last": lambda m, x, index: x + m.places(index[-1:]),
}

INDEX: dict[str, Function] = {
    "arange": lambda m, ids, given: torch.arange(ids.shape[1], device=ids.device),
    "count": lambda m, ids, given: torch.ones_like(ids).cumsum(1)[0] - 1,
    "count_of_a_mask": lambda m, ids, given: (torch.ones_like(ids, dtype=torch.bool).long().cumsum(-1) - 1).clamp(
        min=0
    )[0],
    "buffer": lambda m, ids, given: m.index[: ids.shape[1]],
    "row_of_a_buffer": lambda m, ids, given: m.index[None, : ids.shape[1]].expand_as(ids)[0],
    "from_floats": lambda m, ids, given: torch.arange(0, ids.shape[1], dtype=torch.float32, device=ids.device).long(),
    "argument": lambda m, ids, given: torch.arange(ids.shape[1], device=ids.device) if given is None else given[0],
}
"""``(model, ids [B, L], positions given by the caller [1, L] or None) -> [L]``."""

HEADS: dict[str, Function] = {
    "untied": lambda m, x: m.head(x),
    "biased": lambda m, x: m.head(x) + m.head_bias,
    "tied": lambda m, x: x @ m.words.weight.T,
    "tied_function": lambda m, x: F.linear(x, m.words.weight, m.head_bias),
    "tied_and_scaled": lambda m, x: F.linear(x * m.width**-0.5, m.words.weight),
    "by_equation": lambda m, x: torch.einsum("blc,vc->blv", x, m.head.weight),
    "softcap": lambda m, x: 5 * torch.tanh(m.head(x) / 5),
    "temperature": lambda m, x: m.head(x) / m.temperature.exp(),
    "log_softmax": lambda m, x: m.head(x).log_softmax(-1),
    "log_softmax_of_wide": lambda m, x: F.log_softmax(_wide(m.head(x)), dim=-1),
    "cosine": lambda m, x: 4 * F.normalize(x, dim=-1) @ F.normalize(m.words.weight, dim=-1).T,
    "weight_norm": lambda m, x: m.normed_head(x),
    "deep": lambda m, x: m.head(F.gelu(m.project(x))),
    "slice": lambda m, x: F.linear(x, m.wide.weight[:VOCABULARY]),
    "cut": lambda m, x: m.wide(x)[..., :VOCABULARY],
    "centred": lambda m, x: m.head(x) - m.head(x).mean(-1, keepdim=True),
}
WRONG_HEADS: dict[str, Function] = {
    "centred_over_tokens": lambda m, x: m.head(x) - m.head(x).mean(1, keepdim=True),
    "softmax_over_tokens": lambda m, x: m.head(x).log_softmax(1),
    "with_the_last": lambda m, x: m.head(x + x[:, -1:]),
    "scaled_by_length": lambda m, x: m.head(x) * (x.shape[1] / 10),
    "sharpest_of_the_row": lambda m, x: m.head(x) / m.head(x).abs().amax((1, 2), keepdim=True) * 5,
}


def add_words_places_and_head(model: nn.Module, width: int) -> None:
    """Give ``model`` what the functions above use."""
    model.width = width
    model.words, model.more = nn.Embedding(VOCABULARY, width), nn.Embedding(VOCABULARY, width)
    model.places, model.project = nn.Embedding(POSITIONS + 2, width), nn.Linear(width, width)
    model.head, model.wide = nn.Linear(width, VOCABULARY, bias=False), nn.Linear(width, VOCABULARY + 6)
    model.normed_head = nn.utils.parametrizations.weight_norm(nn.Linear(width, VOCABULARY))
    model.head_bias, model.temperature = nn.Parameter(torch.zeros(VOCABULARY)), nn.Parameter(torch.zeros(()))
    table = torch.sin(torch.arange(POSITIONS)[:, None] * 10.0 ** -torch.linspace(0, 1, width))
    model.register_buffer("sines", table)
    model.register_buffer("index", torch.arange(POSITIONS), persistent=False)
