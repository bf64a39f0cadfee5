"""Mixtures of experts: a router picks a few feed-forward networks per token."""

from __future__ import annotations

from models.entry import Entry
from models.huggingface.decoders import CAUSAL
from models.huggingface.spec import GROUPED, Row, entry

ROUTED = {**GROUPED, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN = {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
DEEPSEEK = {
    **ROUTED,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
DOTS = {
    **ROUTED,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "head_dim": 8,
}

TABLE: list[Row] = [
    ("mixtral", "MixtralForCausalLM", CAUSAL, {**ROUTED, "num_local_experts": 4}),
    ("qwen2-moe", "Qwen2MoeForCausalLM", CAUSAL, QWEN),
    ("qwen3-moe", "Qwen3MoeForCausalLM", CAUSAL, {**QWEN, "head_dim": 8}),
    ("olmoe", "OlmoeForCausalLM", CAUSAL, {**ROUTED, "num_experts": 4}),
    ("granite-moe", "GraniteMoeForCausalLM", CAUSAL, {**ROUTED, "num_local_experts": 4}),
    ("phimoe", "PhimoeForCausalLM", CAUSAL, {**ROUTED, "num_local_experts": 4}),
    (
        "gpt-oss",
        "GptOssForCausalLM",
        CAUSAL,
        {**ROUTED, "num_local_experts": 4, "head_dim": 8, "sliding_window": 4},
    ),
    ("deepseek-v3", "DeepseekV3ForCausalLM", CAUSAL, DEEPSEEK),
    ("deepseek-v2", "DeepseekV2ForCausalLM", CAUSAL, DEEPSEEK),
    ("glm4-moe", "Glm4MoeForCausalLM", CAUSAL, DOTS),
    ("dots1", "Dots1ForCausalLM", CAUSAL, DOTS),
    (
        "ernie4-5-moe",
        "Ernie4_5_MoeForCausalLM",
        CAUSAL,
        {**ROUTED, "moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1},
    ),
    ("jetmoe", "JetMoeForCausalLM", CAUSAL, {**ROUTED, "num_local_experts": 4, "kv_channels": 8}),
    (
        "minimax",
        "MiniMaxForCausalLM",
        CAUSAL,
        {**ROUTED, "num_local_experts": 4, "block_size": 4, "head_dim": 8},
    ),
]

ENTRIES: list[Entry] = [entry("experts", *row) for row in TABLE]
