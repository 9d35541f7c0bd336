"""Small causal language models drawn at random from a grammar of blocks, and wrong ones made of them.

A :class:`Model` is a nest of names, each of which picks one way to write one part from a table; ``build`` makes the
module. What hypothesis prints for a failing example can be pasted: ``grammar.build(grammar.Model(...))``.

A wrong model is a right one with one part taken from a table of what no causal model does: ``planted(model, name)``
for the names of ``WRONG``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from . import attention, parts
from .attention import Attend, Attention, MultiheadAttention, consistent
from .parts import VOCABULARY, Bigrams, add_words_places_and_head

__all__ = ["VOCABULARY", "WRONG", "Attention", "Layer", "Model", "build", "models", "planted"]


@dataclass(frozen=True)
class Layer:
    """One layer: where its norms stand, what mixes its tokens, a second mixer beside that, and its feed-forward part.

    ``tokens`` is an attention, the name of a mixer, or ``"torch_attention"``; ``gated`` puts the second mixer behind
    a gate that starts at zero.
    """

    order: str = "pre"
    norm: str = "layer"
    tokens: Attention | str = dataclasses.field(default_factory=Attention)
    beside: str = "nothing"
    gated: bool = False
    mlp: str = "gelu"


@dataclass(frozen=True)
class Model:
    """A model: keys of the tables in ``parts``, sizes, and the seed and spread of its weights."""

    layers: tuple[Layer, ...] = (Layer(),)
    repeated: bool = False
    index: str = "arange"
    embed: str = "plain"
    places: str = "learned"
    head: str = "untied"
    returns: str = "tensor"
    width: int = 16
    heads: int = 2
    spread: float = 0.4
    seed: int = 0


# --------------------------------------------------------------------------- modules

ORDERS: dict[str, Callable[..., Tensor]] = {
    "pre": lambda m, x, mix: (x := x + mix(m.norms[0](x))) + m.mlp(m.norms[1](x)),
    "post": lambda m, x, mix: m.norms[1]((x := m.norms[0](x + mix(x))) + m.mlp(x)),
    "sandwich": lambda m, x, mix: (x := x + m.norms[1](mix(m.norms[0](x)))) + m.norms[3](m.mlp(m.norms[2](x))),
    "parallel": lambda m, x, mix: x + mix(m.norms[0](x)) + m.mlp(m.norms[0](x)),
    "scaled": lambda m, x, mix: (x := x + m.scales[0] * mix(m.norms[0](x))) + m.scales[1] * m.mlp(m.norms[1](x)),
    "tokens_only": lambda m, x, mix: x + mix(m.norms[0](x)),
}


class Block(nn.Module):
    """``spec`` as a module: ``[B, L, C]``, positions ``[L]`` and ids ``[B, L]`` -> ``[B, L, C]``."""

    def __init__(self, spec: Layer, width: int, heads: int) -> None:
        super().__init__()
        self.spec = spec
        norm = (parts.NORMS | parts.WRONG_NORMS)[spec.norm]
        mixers = parts.MIXERS | parts.WRONG_MIXERS
        self.norms = nn.ModuleList(norm(width) for _ in range(4))
        self.mlp = (parts.MLPS | parts.WRONG_MLPS)[spec.mlp](width)
        self.scales, self.gate = nn.Parameter(torch.ones(2, width)), nn.Parameter(torch.zeros(width))
        self.attention = self.mixer = self.beside = None
        if isinstance(spec.tokens, Attention):
            self.attention = Attend(spec.tokens, width, heads)
        elif spec.tokens == "torch_attention":
            self.attention = MultiheadAttention(width, heads)
        else:
            self.mixer = mixers[spec.tokens](width)
        if spec.beside != "nothing":
            self.beside = mixers[spec.beside](width)

    def forward(self, x: Tensor, index: Tensor, ids: Tensor) -> Tensor:
        return ORDERS[self.spec.order](self, x, lambda y: self._mix(y, index, ids))

    def _mix(self, x: Tensor, index: Tensor, ids: Tensor) -> Tensor:
        y = self.mixer(x) if self.attention is None else self.attention(x, index, ids)
        if self.beside is None:
            return y
        return y + (self.gate * self.beside(x) if self.spec.gated else self.beside(x))


@dataclass
class Output:
    """What transformers' models return, in small."""

    loss: Tensor | None = None
    logits: Tensor | None = None


torch.export.register_dataclass(Output, serialized_type_name="grammar.Output")

RETURNS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tensor": lambda logits, x: logits,
    "tuple": lambda logits, x: (logits, x),
    "dict": lambda logits, x: {"hidden": x, "logits": logits},
    "dataclass": lambda logits, x: Output(logits=logits),
}


class Drawn(nn.Module):
    """``spec`` as a module: ids ``[B, L]`` -> logits ``[B, L, V]``, in whatever they are returned."""

    def __init__(self, spec: Model) -> None:
        super().__init__()
        self.spec = spec
        add_words_places_and_head(self, spec.width)
        self.bigrams = Bigrams(spec.width) if spec.embed == "bigrams" else None
        self.layers = nn.ModuleList(Block(layer, spec.width, spec.heads) for layer in spec.layers)
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Any:
        spec = self.spec
        index = parts.INDEX[spec.index](self, ids, positions)
        embed = parts.EMBED | parts.WRONG_EMBED
        x = self.bigrams(ids) if self.bigrams is not None else embed[spec.embed](self, ids)
        x = (parts.PLACES | parts.WRONG_PLACES)[spec.places](self, x, index)
        for layer in [*self.layers] * (2 if spec.repeated else 1):
            x = layer(x, index, ids)
        x = self.norm(x)
        return RETURNS[spec.returns]((parts.HEADS | parts.WRONG_HEADS)[spec.head](self, x), x)


def build(spec: Model) -> nn.Module:
    """The module of ``spec`` in eval mode, with weights large enough that a mistake with a mask shows."""
    model = Drawn(spec)
    generator = torch.Generator().manual_seed(spec.seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(".gate"):
                continue
            parameter.copy_(spec.spread * noise if parameter.dim() >= 2 else parameter + 0.2 * noise)
        for name, buffer in model.named_buffers():
            if "running_" in name:
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    return model.eval()


# --------------------------------------------------------------------------- drawing


def mostly(first: str, table: Iterable[str]) -> st.SearchStrategy[str]:
    """``first`` three times out of four, otherwise any other of ``table``: models are to be odd in few ways at once."""
    others = [name for name in table if name != first]
    return st.sampled_from([first] * 3 * len(others) + others)


def rarely(strategy: st.SearchStrategy[Any], otherwise: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """One time out of six ``strategy``."""
    return st.integers(0, 5).flatmap(lambda n: strategy if n == 5 else otherwise)


def attentions() -> st.SearchStrategy[Attention]:
    """Attention that sees the past and nothing else."""
    a = attention
    return st.builds(
        Attention,
        written=st.sampled_from(a.WRITTEN),
        project=st.sampled_from([*a.PROJECT]),
        groups=st.sampled_from([*a.GROUPS]),
        repeat=st.sampled_from([*a.REPEAT]),
        normed=mostly("no", a.NORMED),
        turn=mostly("no", a.TURN),
        queries=mostly("as_they_are", a.QUERIES),
        scaled=st.sampled_from(a.SCALED),
        change=mostly("no", a.CHANGE),
        bias=mostly("no", a.BIAS),
        past=st.sampled_from([*a.PAST]),
        sees=mostly("past", a.SEES),
        hide=st.sampled_from([*a.HIDE]),
        softmax=mostly("softmax", a.SOFTMAX),
        sinks=mostly("no", a.SINKS),
        twice=rarely(st.sampled_from(a.TWICE), st.just("no")),
        gate=mostly("no", a.GATE),
        merge=st.sampled_from([*a.MERGE]),
        span=st.integers(2, 6),
        key_size=st.sampled_from([8, 4, 12]),
        value_size=st.sampled_from([8, 6, 10]),
    ).map(consistent)


def layers() -> st.SearchStrategy[Layer]:
    """Layers of right parts."""
    mixers = st.sampled_from([*parts.MIXERS])
    return st.builds(
        Layer,
        order=st.sampled_from([*ORDERS]),
        norm=st.sampled_from([*parts.NORMS]),
        tokens=rarely(st.one_of(mixers, st.just("torch_attention")), attentions()),
        beside=rarely(mixers, st.just("nothing")),
        gated=st.booleans(),
        mlp=st.sampled_from([*parts.MLPS]),
    )


def models(several_layers: bool = True) -> st.SearchStrategy[Model]:
    """Right models: causal, whatever their weights."""
    one, two = st.tuples(layers()), st.tuples(layers(), layers())
    return st.builds(
        Model,
        layers=rarely(two, one) if several_layers else one,
        repeated=rarely(st.just(True), st.just(False)),
        index=st.sampled_from([*parts.INDEX]),
        embed=mostly("plain", [*parts.EMBED, "bigrams"]),
        places=st.sampled_from([*parts.PLACES]),
        head=st.sampled_from([*parts.HEADS]),
        returns=st.sampled_from([*RETURNS]),
        width=st.sampled_from([16, 24, 32]),
        heads=st.sampled_from([2, 4]),
        spread=st.sampled_from([0.3, 0.4, 0.5]),
        seed=st.integers(0, 1000),
    )


# --------------------------------------------------------------------------- wrong on purpose

_PLACES_OF_ATTENTION = {"sees": attention.WRONG_SEES, "hide": attention.WRONG_HIDE, "softmax": attention.WRONG_SOFTMAX}
_PLACES_OF_LAYERS = {"norm": parts.WRONG_NORMS, "mlp": parts.WRONG_MLPS, "beside": parts.WRONG_MIXERS}
_PLACES_OF_MODELS = {"embed": parts.WRONG_EMBED, "places": parts.WRONG_PLACES, "head": parts.WRONG_HEADS}

WRONG: tuple[str, ...] = tuple(
    f"{place}:{name}"
    for places in (_PLACES_OF_ATTENTION, _PLACES_OF_LAYERS, _PLACES_OF_MODELS)
    for place, table in places.items()
    for name in table
)
"""``part:name`` for everything that no causal model does."""


def planted(model: Model, wrong: str) -> Model:
    """``model`` with one part wrong: in its last layer, where layers have that part."""
    place, _, name = wrong.partition(":")
    if place in _PLACES_OF_MODELS:
        return dataclasses.replace(model, **{place: name})
    last = model.layers[-1]
    if place in _PLACES_OF_ATTENTION:
        spec = last.tokens if isinstance(last.tokens, Attention) else Attention()
        last = dataclasses.replace(last, tokens=consistent(dataclasses.replace(spec, **{place: name})))
    else:
        order = "pre" if last.order == "tokens_only" else last.order
        last = dataclasses.replace(last, order=order, **{place: name})
    return dataclasses.replace(model, layers=(*model.layers[:-1], last))
