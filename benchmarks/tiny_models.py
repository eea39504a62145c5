"""Tiny random models of Hugging Face's causal language models, made from their default configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

WINDOW = 32  # tokens of a sliding window
WINDOWS = "sliding_window attention_window_size sliding_window_size local_attention attention_chunk_size window_size"

# Size to the config fields that get it, if they have a number by default. The rest stays as it is.
SIZES = {
    1: "num_nextn_predict_layers n_group topk_group num_expert_group topk_expert_group n_groups first_k_dense_replace"
    " mamba_n_groups mamba_ngroups num_dense_layers num_kv_shared_layers num_codebooks",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_k moe_topk top_k"
    " linear_num_key_heads index_topk_blocks num_shared_experts swa_num_key_value_heads hc_mult attn_layer_period"
    " num_altup_inputs",
    4: "num_attention_heads num_heads n_head n_heads num_experts n_routed_experts num_local_experts moe_num_experts"
    " decoder_attention_heads encoder_attention_heads linear_num_value_heads linear_num_heads depth"
    " swa_num_attention_heads attention_heads index_topk num_decoder_attention_heads num_encoder_attention_heads"
    " zero_expert_num num_query_groups attn_layer_offset",
    8: "qk_rope_head_dim rotary_dim time_step_rank mamba_dt_rank mamba_n_heads",
    16: "index_n_heads head_dim v_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"
    " index_head_dim d_kv kv_channels swa_head_dim dim_head query_pre_attn_scalar hidden_size_per_layer_input"
    " mamba_headdim mamba_d_state state_size attention_head_size ssm_state_size mamba_d_head mamba_head_dim laurel_rank"
    " adapter_rank",
    24: "qk_head_dim",
    32: "kv_lora_rank q_lora_rank o_lora_rank embedding_size word_embed_proj_dim attention_head_dim",
    64: "hidden_size hidden_size_global d_model n_embd dim_model lru_width moe_intermediate_size emb_dim"
    " shape_embed_dim",
    128: "intermediate_size ffn_dim d_ff dff dim_ff decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner vocab_size"
    " shared_expert_intermediate_size vocab_size_per_layer_input expert_ffn_hidden_size intermediate_size_mlp"
    " shared_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size feed_forward_size"
    " shared_experts_intermediate_size decoder_vocab_size mamba_d_ssm attention_hidden_size shape_vocab_size",
}
FIELDS = {name: size for size, names in SIZES.items() for name in names.split()}
FIELDS |= dict.fromkeys(WINDOWS.split(), WINDOW)
LAYERS = {
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
}
TOKENS = {"eos_token_id", "bos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MAMBA = dict(mamba_n_heads=8, mamba_d_head=16, mamba_expand=2, mamba_d_ssm=128)

#: Models that take no cache but their own, and those whose steps are given the whole text, of which they take the rest.
OWN_CACHE = frozenset({"blt", "minimax"})
WHOLE_TEXT = frozenset({"cpmant"})
#: Models that are never given tokens and a cache, and why.
NO_CACHE = dict.fromkeys(
    ("gemma4_assistant", "gemma4_unified_assistant"),
    "a draft model without a cache: it is given embeddings, and keys and values of the model that it drafts for",
)

# What a shrunk default config needs besides.
EXTRA: dict[str, dict[str, Any]] = {
    "bamba": dict(MAMBA, attn_layer_indices=[1]),
    "blt": dict(num_hidden_layers=2),
    "cohere_compass_text": dict(rope_parameters=dict.fromkeys(["full_attention", "sliding_attention"], ROPE)),
    "cpmant": dict(prompt_length=4),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=128, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "dots3_note": dict(
        vision_config=dict(adapter_in_dim=64, adapter_out_dim=64),
        audio_config=dict(adapter_input_size=64, adapter_out_dim=64),
    ),
    "dots3_note_text": dict(num_key_value_heads=4, per_layer_config=None, head_dim=24),
    "falcon_h1": MAMBA,
    "gemma3n_text": dict(
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        intermediate_size=128,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], max_position_embeddings=128),
    "granitemoehybrid": dict(MAMBA, layer_types=["linear_attention", "full_attention"]),
    "hunyuan_v1_dense": dict(head_dim=16),
    "hunyuan_v1_moe": dict(head_dim=16),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mamba2": dict(num_heads=8, head_dim=16),
    "ministral": dict(head_dim=16),
    "nemotron": dict(num_key_value_heads=2),
    "jamba": dict(attn_layer_offset=1),
    "qwen4_exp_text": dict(
        indexer_n_heads=4, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=2
    ),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "reformer": dict(axial_pos_embds=False),
    "rwkv": dict(attention_hidden_size=64),
    "xlstm": dict(qk_dim_factor=1.0),
    "xmod": dict(languages=["en_XX"], default_language="en_XX"),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2),
    "zamba2": dict(num_hidden_layers=2, layers_block_type=["linear_attention", "hybrid"]),
}


def shrink(default: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments for a tiny model: one layer of each kind, at least two."""
    kinds = list(dict.fromkeys(default.get("layer_types") or []))
    given: dict[str, Any] = {"layer_types": kinds} if len(kinds) > 1 else {}
    for name, value in default.items():
        if isinstance(value, dict) and (name.endswith("_config") or name == "decoder"):
            kind = {k: value[k] for k in ("model_type",) if k in value}
            given[name] = merged({**shrink(value), **kind}, EXTRA.get(kind.get("model_type", ""), {}))
        elif name in LAYERS and isinstance(value, int):
            given[name] = min(value, max(2, len(kinds)))
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif name in FIELDS:
            given[name] = min(value, FIELDS[name])
        elif name in TOKENS and value >= FIELDS["vocab_size"]:
            given[name] = 1
    if "is_decoder" in default:
        given["is_decoder"] = True
    if "qk_rope_head_dim" in default and default.get("head_dim") == default["qk_rope_head_dim"]:
        given["head_dim"] = FIELDS["qk_rope_head_dim"]
    if "kv_lora_rank" in default and "num_key_value_heads" in given:
        given["num_key_value_heads"] = given["num_attention_heads"]
    return given


def merged(given: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """``given`` with ``more``, which wins; dicts in both are merged likewise."""
    both = {k: merged(given[k], v) for k, v in more.items() if isinstance(v, dict) and isinstance(given.get(k), dict)}
    return {**given, **more, **both}


def build(name: str) -> torch.nn.Module:
    """A tiny random model of architecture ``name``."""
    config_class = CONFIG_MAPPING[name]
    config = config_class(**merged(shrink(config_class().to_dict()), EXTRA.get(name, {})))
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[name])
    for part, part_class in config.sub_configs.items():
        if part_class is model_class.config_class:  # the text half of a model of several modalities
            config = getattr(config, part)
    torch.manual_seed(0)
    return model_class._from_config(config).eval()
