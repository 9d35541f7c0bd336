"""Tiny configurations, one for each causal-LM type that transformers registers.

Small enough to build in a second, and made so that a mistake shows: windows and chunks shorter than the prompts,
grouped heads, several experts with a choice among them, biases and sinks, at least two layers of every kind that the
type has, and no size equal to another by chance.

A type gets every option of :data:`OFFERED` that its configuration declares, then its own from :data:`OPTIONS`; an own
option that the configuration does not declare is an error, so that no option is ignored in silence.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["APART", "EXPERTS", "GENTLE", "POSITIONS", "VOCABULARY", "configuration", "registered_types"]

VOCABULARY = 97  # prime: no other size of a model equals it by chance
POSITIONS = 521
WINDOW = 9
CHUNK = 10
LAYERS = 4
EXPERTS = 6

_HEADS, _GROUPS, _WIDTH = 4, 2, 48

OFFERED: dict[str, Any] = {
    # sizes
    "vocab_size": VOCABULARY,
    "hidden_size": _WIDTH,
    "intermediate_size": 56,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _GROUPS,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # masks
    "sliding_window": WINDOW,
    "attention_chunk_size": CHUNK,
    # biases
    "attention_bias": True,
    "mlp_bias": True,
    "use_bias": True,
    # experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 28,
    "first_k_dense_replace": 2,
    "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
    # latent attention
    "q_lora_rank": 18,
    "kv_lora_rank": 22,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 10,
    "v_head_dim": 14,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 10,
    "linear_value_head_dim": 14,
    # BERT-like types: a decoder is asked for
    "is_decoder": True,
    # scores
    "query_pre_attn_scalar": 11,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 4.0,
}


@dataclass(frozen=True)
class Part:
    """A configuration inside another: that of type ``kind``, with ``options`` on top of what the type has here."""

    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)


_SLIDING_AND_FULL = {"layer_types": ["sliding_attention", "full_attention"] * 2}
_LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"] * 2}
_UNGROUPED = {"num_key_value_heads": _HEADS}
# With few heads many keys score exactly zero (relu), and which of them a top-k picks is not defined.
# Scores of an index are sums of rectified products: with few heads many are zero, and whichever of them comes first is
# picked, which differs between rows of different lengths in the model itself.
_SPARSE_INDEX = {**_UNGROUPED, "index_topk": 7, "index_n_heads": 16, "index_head_dim": 12}
_HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
_GPT = {"n_positions": POSITIONS, "n_embd": _WIDTH, "n_layer": LAYERS, "n_head": _HEADS}
_VISION = {"hidden_size": 24, "intermediate_size": 28, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIGLIP = Part("siglip_vision_model", {**_VISION, "image_size": 28, "patch_size": 14})
_SIX_SLIDING_AND_FULL = {"num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3}
_INKLING = {
    "layer_types": ["hybrid_sliding", "hybrid"] * 2,
    "swa_num_attention_heads": 6,
    "swa_num_key_value_heads": 3,
    "swa_head_dim": 12,
    "sliding_window_size": WINDOW,
    "d_rel": 5,
    "rel_extent": 7,
}
_DECODER = {
    "d_model": _WIDTH,
    "encoder_layers": LAYERS,
    "encoder_attention_heads": _HEADS,
    "encoder_ffn_dim": 52,
    "decoder_layers": LAYERS,
    "decoder_attention_heads": _HEADS,
    "decoder_ffn_dim": 56,
    "decoder_start_token_id": 1,
}
# A bias of keys without positions has no gradient, and experts have no float64 to tell that from a wrong one.
_UNBIASED = {"attention_bias": False}
_MAMBA_2 = {"mamba_n_heads": 6, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 10, "mamba_chunk_size": 8}


OPTIONS: dict[str, dict[str, Any]] = {
    "afmoe": {**_SLIDING_AND_FULL, "num_dense_layers": 2, "num_shared_experts": 1},
    "aria_text": {"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1},
    "axk1": _UNGROUPED,
    "axk2": {**_SPARSE_INDEX, "gated_norm_rank": 5},
    "bailing_hybrid": {
        **_UNGROUPED,
        **_LINEAR_AND_FULL,
    },
    "bamba": {**_MAMBA_2, "attn_layer_indices": [1, 3]},
    "bart": _DECODER,
    "beam": _SLIDING_AND_FULL,
    "big_bird": {"attention_type": "original_full"},  # the other type is for encoders
    "bigbird_pegasus": _DECODER,
    "blenderbot": _DECODER,
    "blenderbot-small": _DECODER,
    "bloom": {"n_layer": LAYERS, "n_head": _HEADS},
    "blt": {
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": 101,
        "local_attention_window_len": WINDOW,
        "use_cache": False,
        "patcher_config": Part("blt_patcher"),
        "encoder_config": Part("blt_local_encoder", {"hidden_size_global": 96, "cross_attn_all_layers": True}),
        "decoder_config": Part("blt_local_decoder", {"hidden_size_global": 96}),
        "global_config": Part("blt_global_transformer", {"hidden_size": 96}),
    },
    "codegen": {**_GPT, "rotary_dim": 8},
    "cohere2": _SLIDING_AND_FULL,
    "cohere2_moe": {
        **_SLIDING_AND_FULL,
        **_UNBIASED,
        "num_shared_experts": 1,
        "prefix_dense_intermediate_size": 44,
    },
    "cohere_compass_text": {
        **_SLIDING_AND_FULL,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]},
            "full_attention": None,
        },
    },
    "cpmant": {
        "dim_head": 12,
        "dim_ff": 56,
        "prompt_types": 4,
        "prompt_length": 5,
        "segment_types": 3,
        "position_bias_num_buckets": 14,
        "position_bias_max_distance": 29,
    },
    "ctrl": {**_GPT, "dff": 56},
    "cwm": _SLIDING_AND_FULL,
    "dbrx": {
        "d_model": _WIDTH,
        "n_heads": _HEADS,
        "n_layers": LAYERS,
        "max_seq_len": POSITIONS,
        "attn_config": {"kv_n_heads": _GROUPS, "clip_qkv": 1.5, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 20, "moe_num_experts": EXPERTS, "moe_top_k": 2},
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "deepseek_v2": {**_UNGROUPED, "n_shared_experts": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _UNGROUPED,
    "deepseek_v32": _SPARSE_INDEX,
    "deepseek_v4": {
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        "mlp_layer_types": ["hash_moe", "hash_moe", "moe", "moe"],
        "num_key_value_heads": 1,
        "compress_rates": {"heavily_compressed_attention": 6, "compressed_sparse_attention": 4},
        "o_groups": 2,
        "o_lora_rank": 13,
        "index_n_heads": 16,
        "index_head_dim": 12,
        "index_topk": 3,
        "hc_mult": 3,
        "hc_sinkhorn_iters": 3,
    },
    "dots1": {**_SLIDING_AND_FULL, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": Part("dots3_note_text"),
        "vision_config": {**_VISION, "adapter_in_dim": 24, "adapter_out_dim": _WIDTH, "pyramid_num_routed": [-1]},
        "audio_config": {**_VISION, "adapter_input_size": 24, "adapter_out_dim": _WIDTH},
    },
    "dots3_note_text": {
        **_SPARSE_INDEX,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "shared_experts_intermediate_size": 28,
        "head_dim": 18,
        "swa_num_attention_heads": 6,
        "swa_num_key_value_heads": 6,
        "swa_q_lora_rank": 17,
        "swa_kv_lora_rank": 19,
        "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 10,
        "swa_v_head_dim": 12,
    },
    "emu3": {
        "text_config": Part("emu3_text_model"),
        "vq_config": {"base_channels": 32, "channel_multiplier": [1, 1], "hidden_size": 32, "codebook_size": 7},
        "vocabulary_map": {"<image>": 96},
    },
    "ernie4_5_moe": {
        "moe_num_experts": EXPERTS,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 2,
        "moe_layer_end_index": 3,
    },
    "exaone4": _SLIDING_AND_FULL,
    "exaone_moe": _SLIDING_AND_FULL,
    "falcon": {"num_kv_heads": _GROUPS, "new_decoder_architecture": True, "bias": True, "ffn_hidden_size": 56},
    "falcon_h1": {**_MAMBA_2, "mamba_d_ssm": 96},
    "flint": {**_SLIDING_AND_FULL, "mlp_only_layers": [0, 1]},
    "fuyu": {"text_config": Part("persimmon")},
    "gemma2": _SLIDING_AND_FULL,
    "gemma3": {"text_config": Part("gemma3_text"), "vision_config": _SIGLIP, "mm_tokens_per_image": 4},
    "gemma3_text": _SLIDING_AND_FULL,
    "gemma3n_text": {
        **_SIX_SLIDING_AND_FULL,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 15,
        "vocab_size_per_layer_input": VOCABULARY,
        "altup_num_inputs": 3,
        "laurel_rank": 7,
        "activation_sparsity_pattern": [0.5, 0.5, 0.5, 0.0, 0.0, 0.0],
    },
    "gemma4": {"text_config": Part("gemma4_text"), "vision_config": None, "audio_config": None},
    "gemma4_text": {
        **_SIX_SLIDING_AND_FULL,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 15,
        "vocab_size_per_layer_input": VOCABULARY,
        "global_head_dim": 24,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "top_k_experts": 2,
    },
    "gemma4_unified": {"text_config": Part("gemma4_unified_text"), "vision_config": None, "audio_config": None},
    "gemma4_unified_text": {
        **_SIX_SLIDING_AND_FULL,
        "num_kv_shared_layers": 2,
        "global_head_dim": 24,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
    },
    "git": {"vision_config": {**_VISION, "image_size": 12, "patch_size": 4}},
    "glm4_moe_lite": _UNGROUPED,
    "glm_moe_dsa": _SPARSE_INDEX,
    "got_ocr2": {
        "text_config": Part("qwen2"),
        "vision_config": {
            "hidden_size": 24,
            "output_channels": 20,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "mlp_dim": 28,
            "window_size": 2,
            "global_attn_indexes": [0],
        },
    },
    "gpt-sw3": _GPT,
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gpt_neo": {
        "num_layers": LAYERS,
        "num_heads": _HEADS,
        "attention_types": [[["global", "local"], 2]],
        "window_size": WINDOW,
    },
    "gptj": {**_GPT, "rotary_dim": 8},
    "granite_swa": _SLIDING_AND_FULL,
    "granitemoe_swa": {**_SLIDING_AND_FULL, "shared_intermediate_size": 28},
    "granitemoehybrid": {**_MAMBA_2, **_UNBIASED, **_LINEAR_AND_FULL, "shared_intermediate_size": 28},
    "granitemoeshared": {"shared_intermediate_size": 28},
    "helium": {"head_dim": 12},
    "hunyuan_v1_moe": {"moe_topk": 2},
    "hy_v4": _SPARSE_INDEX,
    "inkling2_text": {**_INKLING, "n_layers_per_attn_res_block": 2},
    "inkling_text": _INKLING,
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 4,
        "expert_layer_offset": 2,
        "num_hidden_layers": 8,
        "mamba_d_state": 10,
        "mamba_dt_rank": 5,
    },
    "jetmoe": {"kv_channels": 12},
    "kimi_linear": {**_UNGROUPED, **_LINEAR_AND_FULL, "linear_head_dim": 10, "linear_num_heads": _HEADS},
    "kolibri1": _SLIDING_AND_FULL,
    "laguna": _SLIDING_AND_FULL,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {
        "num_hidden_layers": 6,
        "layer_types": ["conv", "sliding_attention", "full_attention"] * 2,
    },
    "llama4": {"text_config": Part("llama4_text")},
    "llama4_text": {
        "layer_types": ["chunked_attention", "full_attention"] * 2,
        "moe_layers": [2, 3],
        "no_rope_layers": [1, 0, 1, 0],
        "floor_scale": 7,
        "intermediate_size_mlp": 44,
    },
    "longcat_flash": {
        **_UNGROUPED,
        "num_layers": LAYERS,
        "ffn_hidden_size": 56,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "head_dim": 8,
        "expert_ffn_hidden_size": 20,
    },
    "mamba2": {"num_heads": 6, "head_dim": 16, "state_size": 10, "n_groups": 2, "chunk_size": 8},
    "marian": _DECODER,
    "mbart": _DECODER,
    "mellum": _SLIDING_AND_FULL,
    "mimo_v2_flash": _SLIDING_AND_FULL,
    "minicpm3": _UNGROUPED,
    "minimax": {**_LINEAR_AND_FULL, "block_size": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["minimax_m3_sparse", "full_attention"] * 2,
        "dense_intermediate_size": 44,
        "shared_intermediate_size": 28,
        "rotary_dim": 8,
        "index_n_heads": 2,
        "index_head_dim": 12,
        "index_block_size": 4,
        "index_topk_blocks": 3,
    },
    "ministral": _SLIDING_AND_FULL,
    "mllama": {"text_config": Part("mllama_text_model", {"cross_attention_layers": [4, 5], "num_hidden_layers": 6})},
    "modernbert-decoder": {**_SLIDING_AND_FULL, "local_attention": 2 * WINDOW},
    "moshi": {"ffn_dim": 56, "audio_encoder_config": Part("mimi"), "depth_decoder_config": None},
    "moss_transcribe_diarize": {
        "text_config": Part("qwen3"),
        "audio_config": {**_VISION, "num_mel_bins": 6, "max_source_positions": 20},
    },
    "mpt": {"d_model": _WIDTH, "n_heads": _HEADS, "n_layers": LAYERS, "max_seq_len": POSITIONS},
    "mvp": _DECODER,
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 2,
        "mamba_num_heads": 6,
        "mamba_head_dim": 16,
        "ssm_state_size": 10,
        "n_groups": 2,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 28,
    },
    "olmo": {"clip_qkv": 1.5},
    "olmo3": _SLIDING_AND_FULL,
    "olmo_hybrid": _LINEAR_AND_FULL,
    "olmoe": {"clip_qkv": 1.5},
    "openai-gpt": _GPT,
    "opt": {"ffn_dim": 56, "word_embed_proj_dim": 44},
    "pegasus": _DECODER,
    "phi4_multimodal": {
        "vision_config": {**_VISION, "image_size": 28, "patch_size": 14, "crop_size": 28},
        "audio_config": {
            "hidden_size": 24,
            "intermediate_size": 28,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 24,
            "depthwise_separable_out_channel": 24,
            "nemo_conv_channels": 24,
            "input_size": 8,
            "bias_max_distance": 10,
        },
    },
    "plbart": {name: value for name, value in _DECODER.items() if name != "decoder_start_token_id"},
    "prophetnet": {
        "num_encoder_layers": LAYERS,
        "num_encoder_attention_heads": _HEADS,
        "encoder_ffn_dim": 52,
        "num_decoder_layers": LAYERS,
        "num_decoder_attention_heads": _HEADS,
        "decoder_ffn_dim": 56,
        "num_buckets": 14,
        "relative_max_distance": 29,
        "add_cross_attention": False,
    },
    "qwen2": {**_SLIDING_AND_FULL, "use_sliding_window": True},
    "qwen2_moe": {**_SLIDING_AND_FULL, "use_sliding_window": True, "mlp_only_layers": [0, 1]},
    "qwen3": {**_SLIDING_AND_FULL, "use_sliding_window": True},
    "qwen3_5": {"text_config": Part("qwen3_5_text")},
    "qwen3_5_moe": {"text_config": Part("qwen3_5_moe_text")},
    "qwen3_5_moe_text": _LINEAR_AND_FULL,
    "qwen3_5_text": _LINEAR_AND_FULL,
    "qwen3_moe": {"mlp_only_layers": [0, 1]},
    "qwen3_next": {**_LINEAR_AND_FULL, "mlp_only_layers": [0, 1]},
    "qwen4_exp": {"text_config": Part("qwen4_exp_text")},
    "qwen4_exp_text": {
        "num_hidden_layers": 6,
        "layer_types": ["linear_attention", "linear_attention", "indexed_attention"] * 2,
        "hc_count": 3,
        "hc_lowrank": 5,
        "ple_layer_ids": [1, 4],
        "ple_embed_dim": 12,
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 101,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
        "indexer_n_heads": 16,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 20,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
    "recurrent_gemma": {"num_hidden_layers": 6, "lru_width": 52, "attention_window_size": WINDOW},
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "attention_head_size": 12,
        "axial_pos_shape": [16, 33],
        "axial_pos_embds_dim": [20, 28],
        "feed_forward_size": 56,
        "local_attn_chunk_length": CHUNK,
        "lsh_attn_chunk_length": CHUNK,
        "num_buckets": 6,
        "hash_seed": 3,
    },
    "roc_bert": {
        "pronunciation_embed_dim": 14,
        "pronunciation_vocab_size": 103,
        "shape_embed_dim": 18,
        "shape_vocab_size": 107,
    },
    "smollm3": {**_SLIDING_AND_FULL, "use_sliding_window": True, "no_rope_layers": [1, 1, 0, 0]},
    "stablelm": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        "use_qkv_bias": True,
        "qk_layernorm": True,
    },
    "trocr": {"d_model": _WIDTH, "decoder_layers": LAYERS, "decoder_attention_heads": _HEADS, "decoder_ffn_dim": 56},
    "vaultgemma": _SLIDING_AND_FULL,
    "whisper": {**_DECODER, "max_target_positions": POSITIONS},
    "xglm": {"d_model": _WIDTH, "ffn_dim": 56, "num_layers": LAYERS, "attention_heads": _HEADS},
    "xlm": {"emb_dim": _WIDTH, "n_layers": LAYERS, "n_heads": _HEADS, "causal": True},
    "xlnet": {
        "d_model": _WIDTH,
        "n_layer": LAYERS,
        "n_head": _HEADS,
        "d_inner": 56,
        "attn_type": "uni",
        "mem_len": None,
    },
    "xlstm": {"num_heads": 2, "use_cache": False, "chunk_size": 8},
    "xmod": {"default_language": "en_XX"},
    "youtu": _UNGROUPED,
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
        "mamba_d_state": 10,
        "mamba_dt_rank": 5,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2,
        "mamba_d_state": 10,
        "mamba_ngroups": 2,
        "n_mamba_heads": 6,
        "chunk_size": 8,
        "adapter_rank": 5,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "num_experts_per_tok": 1, "router_hidden_size": 26},
}

GENTLE = frozenset(
    (
        # These normalize after the residual sum: large weights make all their tokens alike, and nothing would show.
        *("bart", "bert", "bert-generation", "big_bird", "blenderbot-small", "camembert", "data2vec-text", "electra"),
        *("ernie", "git", "marian", "mvp", "openai-gpt", "plbart", "rembert", "roberta", "roc_bert", "roformer"),
        *("trocr", "xlm", "xlm-roberta", "xlnet", "xmod"),
        # These amplify float32 rounding beyond the limits, and grouped products of experts have no float64 to decide.
        *("granitemoe_swa", "minimax"),
    )
)
"""Types that get smaller weights than the others."""

APART: dict[str, str] = {
    "gemma3n": "its vision tower needs the package timm; the text model is gemma3n_text",
    "gemma4_assistant": "drafts for another model: attends to that model's keys and values, not to its own",
    "gemma4_unified_assistant": "drafts for another model: attends to that model's keys and values, not to its own",
    "musicgen": "half of an encoder-decoder over rows of audio codes; AutoModelForCausalLM cannot build it",
    "musicgen_melody": "half of an encoder-decoder over rows of audio codes; AutoModelForCausalLM cannot build it",
}


def registered_types() -> tuple[str, ...]:
    """Every causal-LM type of the installed transformers, in alphabetical order."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def configuration(kind: str) -> PreTrainedConfig:
    """The tiny configuration of ``kind``.

    Raises:
        ValueError: an option of :data:`OPTIONS` that the type does not have.
    """
    return _configuration(Part(kind))


def _configuration(part: Part) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[part.kind]
    own = {**OPTIONS.get(part.kind, {}), **part.options}
    names = {*_declared(config_class), *_UNDECLARED}
    unknown = sorted(own.keys() - names)
    if unknown:
        raise ValueError(f"{config_class.__name__} has no option {', '.join(unknown)}; fix OPTIONS[{part.kind!r}]")
    options = {name: value for name, value in {**OFFERED, **own}.items() if name in names}
    return config_class(**{name: _resolved(value) for name, value in options.items()})


def _resolved(value: Any) -> Any:
    return _configuration(value) if isinstance(value, Part) else copy.deepcopy(value)


_UNDECLARED = (
    "global_head_dim",
    "num_global_key_value_heads",
    "swa_num_attention_heads",
    "swa_num_key_value_heads",
    "swa_q_lora_rank",
    "swa_kv_lora_rank",
    "swa_head_dim",
    "swa_qk_nope_head_dim",
    "swa_v_head_dim",
)
"""Keywords that configurations take without declaring them."""


def _declared(config_class: type[PreTrainedConfig]) -> Iterator[str]:
    """Option names of a configuration class: its fields and those of its bases."""
    for base in config_class.__mro__:
        yield from vars(base).get("__annotations__", {})
