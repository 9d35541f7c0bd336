"""Heads are carried over as programs on rows; what does not work row by row is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn

import ppcompile
from ppcompile.passes.base import NotPackable
from ppcompile.verification import unpacked_logps

WIDTH = 16
Head = Callable[[Tensor, "Model"], Tensor]


class Model(nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.words = nn.Embedding(zoo.VOCABULARY, WIDTH)
        self.linear = nn.Linear(WIDTH, zoo.VOCABULARY)
        self.weight = nn.Parameter(torch.randn(WIDTH, zoo.VOCABULARY))
        self.bias, self.scale = nn.Parameter(torch.randn(zoo.VOCABULARY)), nn.Parameter(torch.tensor(1.5))
        self.head = head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids).tanh(), self)


HEADS: dict[str, tuple[Head, str]] = {
    "linear": (lambda x, m: m.linear(x), "linear(x, c0, c1)"),
    "tied": (lambda x, m: F.linear(x, m.words.weight), "linear(x, c0)"),
    "transposed": (lambda x, m: x @ m.words.weight.T, "matmul(x, c0)"),
    "matmul_and_bias": (lambda x, m: x @ m.weight + m.bias, "add(matmul(x, c0), c1)"),
    "addmm": (lambda x, m: torch.addmm(m.bias, x[0], m.weight)[None], "add(matmul(x, c0), c1)"),
    "mm_of_rows": (lambda x, m: (x.view(-1, WIDTH) @ m.weight).view(1, -1, zoo.VOCABULARY), "matmul(x, c0)"),
    "scaled": (lambda x, m: m.linear(x) * 0.5 / 2, "div(mul(linear(x, c0, c1), 0.5), 2)"),
    "learned_scale": (lambda x, m: m.linear(x) * m.scale, "mul(linear(x, c0, c1), c2)"),
    "from_left": (lambda x, m: 0.5 * m.linear(x), "mul(linear(x, c0, c1), 0.5)"),
    "softcap": (lambda x, m: 4 * (m.linear(x) / 4).tanh(), "mul(tanh(div(linear(x, c0, c1), 4)), 4)"),
    "cast": (lambda x, m: m.linear(x).double(), "float64(linear(x, c0, c1))"),
    "activation": (lambda x, m: F.gelu(m.linear(x)), "gelu(linear(x, c0, c1))"),
    "contiguous": (lambda x, m: m.linear(x).contiguous().clone(), "linear(x, c0, c1)"),
    "bias_with_axes": (lambda x, m: x @ m.weight + m.bias[None, None], "add(matmul(x, c0), c1)"),
    "weight_with_an_axis": (lambda x, m: x @ m.weight[None], "matmul(x, c0)"),
    "equation": (lambda x, m: torch.einsum("btc,cv->btv", x, m.weight), "matmul(x, c0)"),
    "log_softmax": (lambda x, m: m.linear(x).log_softmax(-1), "log_softmax(linear(x, c0, c1))"),
    "fewer_words": (lambda x, m: m.linear(x)[..., 5:50], "columns(linear(x, c0, c1), 5, 50)"),
    "two_products": (lambda x, m: m.linear(x) + x @ m.weight, "add(linear(x, c0, c1), matmul(x, c2))"),
    "low_rank_adapter": (
        lambda x, m: m.linear(x) + 0.5 * ((x * 2) @ m.weight[:, :3]) @ m.weight[:3],
        "add(linear(x, c0, c1), matmul(mul(matmul(mul(x, 2), c2), 0.5), c3))",
    ),
    "scale_of_each_token": (
        lambda x, m: m.linear(x) * (x @ m.weight[:, :1]).sigmoid(),
        "mul(linear(x, c0, c1), sigmoid(matmul(x, c2)))",
    ),
    "norm_over_words": (
        lambda x, m: F.normalize(m.linear(x), dim=-1),
        "div(linear(x, c0, c1), wide(clamp(norm(linear(x, c0, c1)), 1e-12, None), 97))",
    ),
    "expanded_scale_along_the_row": (
        lambda x, m: m.linear(x) * (x @ m.weight[:, :1]).expand(-1, -1, zoo.VOCABULARY).softmax(-1, torch.float32),
        "mul(linear(x, c0, c1), softmax(float32(wide(matmul(x, c2), 97))))",
    ),
    "centred": (
        lambda x, m: m.linear(x) - m.linear(x).mean(-1, keepdim=True),
        "sub(linear(x, c0, c1), mean(linear(x, c0, c1)))",
    ),
    "clamped": (lambda x, m: m.linear(x).clamp(-1, 2), "clamp(linear(x, c0, c1), -1, 2)"),
    "words_left_out": (
        lambda x, m: m.linear(x).masked_fill(torch.arange(zoo.VOCABULARY) > 20, -1e9),
        "where(c2, -1000000000.0, linear(x, c0, c1))",
    ),
    "alpha": (lambda x, m: torch.add(m.linear(x), m.bias, alpha=2), "add(linear(x, c0, c1), mul(c2, 2))"),
    "tanh_gelu": (lambda x, m: F.gelu(m.linear(x), approximate="tanh"), "gelu(linear(x, c0, c1), 'tanh')"),
    "scaled_addmm": (
        lambda x, m: torch.addmm(m.bias, x[0], m.weight, alpha=2)[None],
        "add(mul(matmul(x, c0), 2), c1)",
    ),
    "rounded": (
        lambda x, m: m.linear(x) + torch.div(m.linear(x), 2, rounding_mode="floor"),
        "add(linear(x, c0, c1), floordiv(linear(x, c0, c1), 2))",
    ),
    "same_weight_twice": (lambda x, m: x @ m.weight + m.weight[0], "add(matmul(x, c0), c1)"),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    head, program = HEADS[name]
    model = zoo.sharpen(Model(head))
    packed = ppcompile.wrap(model)
    (stage,) = (stage for stage in packed.compiled().stages if stage.name == "insert_epilogue")
    assert stage.result.matched == [f"head: {program}"]
    batch = ppcompile.pack([ppcompile.Group([5, 6, 7], [[8, 9], [10]])])
    found, expected = packed(batch).token_logps, unpacked_logps(model, batch)
    torch.testing.assert_close(found, expected, check_dtype=False)
    parameters = list(model.parameters())
    ours = torch.autograd.grad(found.sum(), parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected.sum(), parameters, allow_unused=True)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def shifted(x: Tensor, m: Model) -> Tensor:
    logits = m.linear(x)
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


REFUSED: dict[str, Head] = {
    "over_tokens": lambda x, m: m.linear(x) - m.linear(x).mean(1, keepdim=True),
    "shifted": shifted,
    "last_token": lambda x, m: m.linear(x)[:, -1:],
    "scrambled": lambda x, m: m.linear(x).transpose(1, 2).reshape(1, -1, zoo.VOCABULARY),
    "words_first": lambda x, m: m.linear(x).view(1, zoo.VOCABULARY, -1),
    "product_with_itself": lambda x, m: x @ x.transpose(1, 2),
    "divided_by_length": lambda x, m: m.linear(x) / x.shape[1],
    "softmax_over_tokens": lambda x, m: m.linear(x).softmax(1),
    "tokens_left_out": lambda x, m: m.linear(x).masked_fill((torch.arange(x.shape[1]) > 2)[:, None], 0.0),
    "every_second_word": lambda x, m: m.linear(x)[..., ::2],
    "another_hidden_state": lambda x, m: m.linear(x) + (x.roll(1, 1) * 2) @ m.weight,
    "several_weights": lambda x, m: (x @ torch.stack([m.weight, m.weight]))[:1],
    "dropout": lambda x, m: F.dropout(m.linear(x), 0.1),
    "no_head": lambda x, m: x,
    "centred_on_the_row": lambda x, m: m.linear(x) - m.linear(x).max(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(NotPackable) as caught:
        ppcompile.wrap(Model(REFUSED[name]))
    assert caught.value.refusal.reason
