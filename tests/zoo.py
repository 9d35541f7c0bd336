"""Models for tests: tiny, random, with weights large enough that a masking mistake shows.

``EXACT`` are the models that must be exact, ``FLEX`` those that FlexAttention must run on a GPU, ``REFUSED`` those that
must be refused; each has a builder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 97  # prime: no other size of a model equals it by chance
POSITIONS = 512
_BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MIXED = ["sliding_attention", "full_attention"] * 2


def _transformers(kind: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = CONFIG_MAPPING[kind](**{**_BASE, **options})
        return sharpen(AutoModelForCausalLM.from_config(config)).eval()

    return build


def sharpen(model: nn.Module, spread: float = 0.3, seed: int = 0) -> nn.Module:
    """Random weights of standard deviation ``spread``, biases and sinks included: attention far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
            elif "bias" in name or "sinks" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


# --------------------------------------------------------------------------- models that are not from transformers


class FusedAttention(nn.Module):
    """One qkv projection, ``is_causal=True``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        q, k, v = (t.view(B, L, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, L, C))


class WrittenOutAttention(FusedAttention):
    """The softmax and its triangular mask, written out; the mask lives in a buffer."""

    def __init__(self, width: int, heads: int, hidden: float = float("-inf")) -> None:
        super().__init__(width, heads)
        self.hidden = hidden
        self.register_buffer("mask", torch.tril(torch.ones(POSITIONS, POSITIONS))[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        q, k, v = (t.view(B, L, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        scores = q @ k.transpose(-2, -1) / math.sqrt(C // self.heads)
        scores = scores.masked_fill(self.mask[:, :, :L, :L] == 0, self.hidden)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, L, C))


class TriangleAttention(FusedAttention):
    """An additive mask built on the fly: ``triu(full(-inf), 1)``."""

    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        q, k, v = (t.view(B, L, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        mask = torch.triu(torch.full((L, L), float("-inf")), diagonal=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(B, L, C))


class Bidirectional(FusedAttention):
    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        q, k, v = (t.view(B, L, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, C))


class SeesOneAhead(FusedAttention):
    def forward(self, x: Tensor) -> Tensor:
        B, L, C = x.shape
        q, k, v = (t.view(B, L, self.heads, -1).transpose(1, 2) for t in self.qkv(x).split(C, dim=2))
        position = torch.arange(L)
        mask = position[None, :] <= position[:, None] + 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(B, L, C))


class Block(nn.Module):
    def __init__(self, attention: nn.Module, width: int, mixer: nn.Module | None = None) -> None:
        super().__init__()
        self.attention, self.mixer = attention, mixer
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        if self.mixer is not None:
            x = x + self.mixer(x)
        return x + self.mlp(self.norm2(x))


class PlainGPT(nn.Module):
    """Learned positions from ``arange``; returns a tensor of logits."""

    def __init__(
        self, attention: type[nn.Module] = FusedAttention, mixer: type[nn.Module] | None = None, **options: Any
    ):
        super().__init__()
        width = 32
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(
            Block(attention(width, 4, **options), width, mixer(width) if mixer else None) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Convolution(nn.Module):
    """A causal depthwise convolution over tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


class CentredConvolution(Convolution):
    """Sees one token ahead."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., 1:-1].transpose(1, 2)


class LoopOverTokens(nn.Module):
    """A recurrence written as a loop, which no capture can keep for all lengths."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.decay = nn.Linear(width, width), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        state, out = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.sigmoid(self.decay) * state + self.inner(x[:, t])
            out.append(state)
        return torch.stack(out, dim=1)


class GatedMean(nn.Module):
    """A mean over all tokens behind a gate that starts at zero: harmless now, wrong after a step of training."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gate * x.mean(dim=1, keepdim=True)


class MeanOverTokens(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean(dim=1, keepdim=True)).expand_as(x)


class TokenShift(nn.Module):
    """Adds the previous token, the RWKV way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.pad(x, (0, 0, 1, -1)))


class RunningSum(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.cumsum(1))


class BatchStatistics(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class ScaledByIndex(nn.Module):
    """Divides by the row's length: a function of more than the position."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).flip(0)
        return self.linear(x * (places[None, :, None] / 100))


def _plain(attention: type[nn.Module] = FusedAttention, mixer: type[nn.Module] | None = None, **options: Any):
    return lambda: sharpen(PlainGPT(attention, mixer, **options)).eval()


EXACT: dict[str, Callable[[], nn.Module]] = {
    "llama": _transformers("llama"),
    "llama_eager": _transformers("llama", attn_implementation="eager"),
    "qwen2": _transformers("qwen2"),
    "qwen3": _transformers("qwen3"),
    "mistral": _transformers("mistral", sliding_window=8),
    "gemma2": _transformers(
        "gemma2", layer_types=_MIXED, num_hidden_layers=4, sliding_window=8, query_pre_attn_scalar=8,
        attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
    ),
    "gemma3_text": _transformers("gemma3_text", layer_types=_MIXED, num_hidden_layers=4, sliding_window=8),
    "gpt2": _transformers("gpt2", attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "opt": _transformers("opt", ffn_dim=48, word_embed_proj_dim=32, dropout=0.0),
    "bloom": _transformers("bloom", hidden_dropout=0.0, attention_dropout=0.0),
    "gpt_oss": _transformers(
        "gpt_oss", layer_types=_MIXED, num_hidden_layers=4, sliding_window=8,
        num_local_experts=6, num_experts_per_tok=2,
    ),
    "cohere2": _transformers("cohere2", layer_types=_MIXED, num_hidden_layers=4, sliding_window=8),
    "phi3": _transformers("phi3"),
    # latent attention with heads of two sizes, keys put together in place, experts picked by group
    "deepseek_v3": _transformers(
        "deepseek_v3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=4,
        v_head_dim=6, first_k_dense_replace=1, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3,
        moe_intermediate_size=24, n_shared_experts=1,
    ),
    # complex rotary tables, layers without positions whose queries are scaled by position, chunks, one expert a token
    "llama4_text": _transformers(
        "llama4_text", attention_chunk_size=8, no_rope_layers=[1, 0], moe_layers=[1], intermediate_size_mlp=48,
        num_local_experts=4, num_experts_per_tok=1, floor_scale=16, attn_temperature_tuning=True,
    ),
    # positions that skip padding, where the padding id stands in the text as well
    "roberta": _transformers("roberta", is_decoder=True, type_vocab_size=2, pad_token_id=7,
                             hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    # a table of sines that is gathered by position
    "gptj": _transformers("gptj", n_embd=32, n_head=4, n_layer=2, n_positions=POSITIONS, rotary_dim=4),
    # sinks as a factor after the softmax
    "granite_swa": _transformers(
        "granite_swa", layer_types=_MIXED, num_hidden_layers=4, sliding_window=8, attention_multiplier=0.3
    ),
    # a floor under the scores
    "xglm": _transformers("xglm", d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, dropout=0.0,
                          attention_dropout=0.0),
    "plain_fused": _plain(FusedAttention),
    "plain_written_out": _plain(WrittenOutAttention),
    "plain_written_out_1e9": _plain(WrittenOutAttention, hidden=-1e9),
    "plain_triangle": _plain(TriangleAttention),
}  # fmt: skip

# Heads of 16 and more, the smallest that FlexAttention's GPU kernels take.
FLEX: dict[str, Callable[[], nn.Module]] = {
    "llama": _transformers("llama", head_dim=16),
    "mistral": _transformers("mistral", head_dim=16, sliding_window=150),
    "gemma2": _transformers(
        "gemma2", head_dim=16, layer_types=_MIXED[:2], sliding_window=8, query_pre_attn_scalar=16,
        attn_logit_softcapping=3.0, final_logit_softcapping=4.0,
    ),
    "bloom": _transformers("bloom", hidden_size=64, hidden_dropout=0.0, attention_dropout=0.0),
    "gpt_oss": _transformers(
        "gpt_oss", head_dim=16, layer_types=_MIXED[:2], sliding_window=8, num_local_experts=6, num_experts_per_tok=2,
    ),
    # queries and keys of 24, not a power of two, and values of 16
    "deepseek_v3": _transformers(
        "deepseek_v3", num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16,
        v_head_dim=16, first_k_dense_replace=1, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3,
        moe_intermediate_size=24, n_shared_experts=1,
    ),
}  # fmt: skip

UNSHARED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    # name: builder, one of the modules that must stay as they are
    "mamba2": (_transformers("mamba2", num_heads=4, head_dim=16, state_size=16, n_groups=1), "backbone.layers.0.mixer"),
    "mamba": (_transformers("mamba", state_size=8), "backbone.layers.1.mixer"),
    "convolution": (_plain(mixer=Convolution), "blocks.0.mixer"),
    "token_shift": (_plain(mixer=TokenShift), "blocks.0.mixer"),
    "running_sum": (_plain(mixer=RunningSum), "blocks.0.mixer"),
    "loop_over_tokens": (_plain(mixer=LoopOverTokens), "blocks.0.mixer"),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    # name: builder, module that must be named, op that must be named
    "bert": (_transformers("bert"), "bert.encoder.layer.0.attention.self", "scaled_dot_product_attention"),
    "centred_convolution": (_plain(mixer=CentredConvolution), "blocks.0.mixer.conv", "conv1d"),
    "gated_mean": (_plain(mixer=GatedMean), "blocks.0.mixer", "mean"),
    "bidirectional": (_plain(Bidirectional), "blocks.0.attention", "scaled_dot_product_attention"),
    "one_ahead": (_plain(SeesOneAhead), "blocks.0.attention", "scaled_dot_product_attention"),
    "mean_over_tokens": (_plain(mixer=MeanOverTokens), "blocks.0.mixer", "mean"),
    "batch_statistics": (_plain(mixer=BatchStatistics), "blocks.0.mixer.norm", "batch_norm"),
    "scaled_by_index": (_plain(mixer=ScaledByIndex), "blocks.0.mixer", "flip"),
}
