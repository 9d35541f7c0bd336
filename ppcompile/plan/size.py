"""What one token costs in a model, counted by running the model's own code on the meta device.

The model runs without weights or data at four lengths ``L``. Operations and the bytes that autograd keeps for the
backward grow as ``a + b L + c L**2`` (three lengths give the three numbers, the fourth checks them):

==========  ================================================  ==================================================
            operations of a forward                           bytes kept for the backward
==========  ================================================  ==================================================
``b``       of a token: every matrix product but attention    of a slot: everything but attention scores
``c``       of a token and one in its row: attention          of attention scores, which no fast attention keeps
==========  ================================================  ==================================================

A multiplication and an addition are two operations. The language model head counts apart, from the call of the
model's output embeddings on: it is where padded rows and packs differ most.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ppcompile.model_source import on_meta

__all__ = ["DTYPES", "ModelSize", "default_config", "model_size"]

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_LENGTHS = (64, 128, 192, 256)  # multiples of 64: some models cut rows into chunks of that many


# What models raise that ask for data, for a kernel that the meta device lacks, or for a package that is not there.
_FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ImportError)


@dataclass(frozen=True)
class ModelSize:
    """A model, as far as its cost depends on it.

    Attributes:
        name: type and number of parameters, for people.
        parameters: all of them.
        layers, hidden_size, vocabulary: as the configuration says.
        heads: attention heads of a layer; ``None`` for a model without attention.
        max_positions: the longest sequence that the configuration allows; ``None`` if it does not say.
        itemsize: bytes of a number in weights and activations.
        token_flops: operations of a forward in front of the head, for each token.
        pair_flops: operations of a forward for each pair of a token and one that it sees.
        head_flops: operations of a forward of the head, for each token that it is applied to.
        kept_bytes: bytes kept for the backward in front of the head, for each token.
    """

    name: str
    parameters: int
    layers: int
    heads: int | None
    hidden_size: int
    vocabulary: int
    max_positions: int | None
    itemsize: int
    token_flops: float
    pair_flops: float
    head_flops: float
    kept_bytes: float


def default_config() -> Any:
    """What is assumed where no model is named: a Llama of 1.2 billion parameters."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=True,
    )


def model_size(config: Any, dtype: str = "bfloat16") -> ModelSize:
    """Count a model.

    Args:
        config: of transformers.
        dtype: one of :data:`DTYPES`.

    Raises:
        ValueError: the model cannot be counted this way: it does not run without data, has no head, or costs something
            else than the formula above.
    """
    try:
        # Eager attention, because fused kernels ask for data; its scores are told apart by their growth.
        model = on_meta(config, dtype=DTYPES[dtype], attn_implementation="eager").train()
        runs = [_run(model, length) for length in _LENGTHS]
        body, head, kept = (_fit([getattr(run, name) for run in runs]) for name in ("body", "head", "kept"))
        _check_complete(model, body.linear)
    except _FAILURES as error:
        first = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"the cost of a model of type {config.model_type!r} cannot be counted on the meta device "
            f"({type(error).__name__}: {first})"
        ) from error
    text = config.get_text_config()
    parameters = sum(p.numel() for p in model.parameters())
    return ModelSize(
        name=f"{config.model_type}, {parameters / 1e6:,.0f}M parameters",
        parameters=parameters,
        layers=text.num_hidden_layers,
        heads=getattr(text, "num_attention_heads", None),
        hidden_size=text.hidden_size,
        vocabulary=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        itemsize=DTYPES[dtype].itemsize,
        token_flops=body.linear,
        pair_flops=body.square,
        head_flops=head.linear,
        kept_bytes=kept.linear,
    )


# --------------------------------------------------------------------------- one run


@dataclass
class _Run:
    """Operations in front of the head and in it, and bytes kept in front of it."""

    body: float = 0
    head: float = 0
    kept: float = 0
    storages: dict[int, Any] = field(default_factory=dict)


def _run(model: nn.Module, length: int) -> _Run:
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    run = _Run()
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    with FlopCounterMode(display=False, custom_mapping=_grouped_products()) as counter:

        def at_the_head() -> None:
            run.body = counter.get_total_flops()
            run.kept = sum(storage.nbytes() for storage in run.storages.values())

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                run.storages[storage._cdata] = storage  # held, so that its address stays its own
            return tensor

        with _before_head(model, at_the_head), torch.autograd.graph.saved_tensors_hooks(keep, _unchanged):
            # A mask of ones, because without one some models look into the data for the ends of packed rows.
            model(ids, attention_mask=torch.ones_like(ids), use_cache=False)
    run.head = counter.get_total_flops() - run.body
    return run


@contextlib.contextmanager
def _before_head(model: nn.Module, call: Callable[[], None]) -> Iterator[None]:
    """Have something called when the forward reaches the language model head.

    Raises:
        ValueError: there is no head, or the forward does not come to it once.
    """
    head: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        raise ValueError("it names no output embeddings")
    calls: list[nn.Module] = []

    def hook(module: nn.Module, inputs: Any) -> None:
        calls.append(module)
        call()

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if len(calls) != 1:
        raise ValueError(f"its forward calls the output embeddings {len(calls)} times")


def _grouped_products() -> dict[Any, Callable[..., int]]:
    """Products of experts, which torch does not count: each row of the first meets one matrix of the second."""

    def flops(rows: Any, matrices: Any, *others: Any, **options: Any) -> int:
        return 2 * prod(rows) * matrices[-1]

    # transformers' own operator stands in where sizes are too odd for the fused one; it exists once a model does.
    own = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return {operator: flops for operator in (torch.ops.aten._grouped_mm, own) if operator is not None}


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _check_complete(model: nn.Module, token_flops: float) -> None:
    """Every token meets the weights of all linear layers (experts are no such layers).

    Raises:
        ValueError: fewer operations were counted than that takes, so some operator is not known here.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    needed = 2 * sum(module.weight.numel() for module in linear)
    if token_flops < needed:
        raise ValueError(f"{token_flops:,.0f} operations a token are too few: its linear layers alone need {needed:,}")


# --------------------------------------------------------------------------- growth


@dataclass(frozen=True)
class _Growth:
    """``constant + linear * length + square * length ** 2``."""

    constant: float
    linear: float
    square: float

    def at(self, length: int) -> float:
        return self.constant + self.linear * length + self.square * length**2


def _fit(values: list[float]) -> _Growth:
    """The polynomial through values at the first three lengths.

    Raises:
        ValueError: the value at the fourth is another.
    """
    (a, b, c, last), step = values, _LENGTHS[0]  # lengths are 1, 2, 3 and 4 steps
    square = (c - 2 * b + a) / (2 * step**2)
    linear = (b - a) / step - 3 * step * square
    growth = _Growth(a - linear * step - square * step**2, linear, square)
    predicted = growth.at(_LENGTHS[3])
    if abs(predicted - last) > 1e-3 * last:
        raise ValueError(f"cost is not a + b L + c L**2: {last:.4g} at L = {_LENGTHS[3]}, and not {predicted:.4g}")
    return growth
