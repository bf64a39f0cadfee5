"""State space models, linear recurrences, and their hybrids with attention."""

from __future__ import annotations

from models.entry import Entry
from models.huggingface.decoders import CAUSAL
from models.huggingface.spec import GROUPED, TINY, VOCAB, Row, entry

MAMBA = {**TINY, "state_size": 8, "time_step_rank": 4, "conv_kernel": 4, "expand": 2}
MAMBA2 = {
    **TINY,
    "state_size": 8,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 2,
    "expand": 2,
    "chunk_size": 4,
}
JAMBA = {
    **GROUPED,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 4,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}
BAMBA = {
    **GROUPED,
    "attn_layer_indices": [1],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
}
FALCON_H1 = {**BAMBA, "mamba_d_ssm": 64}
FALCON_H1.pop("attn_layer_indices")
HYBRID = {
    **BAMBA,
    "layer_types": ["mamba", "attention"],
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 24,
}
LFM2 = {**GROUPED, "layer_types": ["conv", "full_attention"]}
# The first eval call divides each block's weights by a power of two and sets a flag: a graph that
# repeats the division on every call is wrong from the second call on.
RWKV = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "attention_hidden_size": 32,
    "num_hidden_layers": 2,
    "rescale_every": 1,
}
GRIFFIN = {
    **GROUPED,
    "lru_width": 32,
    "attention_window_size": 4,
    "block_types": ["recurrent", "attention"],
    "head_dim": 8,
}
XLSTM = {**TINY, "num_heads": 4, "num_blocks": 2, "chunk_size": 4}
DELTA = {
    **GROUPED,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}

TABLE: list[Row] = [
    ("mamba", "MambaForCausalLM", CAUSAL, MAMBA),
    ("mamba2", "Mamba2ForCausalLM", CAUSAL, MAMBA2),
    ("falcon-mamba", "FalconMambaForCausalLM", CAUSAL, MAMBA),
    ("jamba", "JambaForCausalLM", CAUSAL, JAMBA),
    ("bamba", "BambaForCausalLM", CAUSAL, BAMBA),
    ("falcon-h1", "FalconH1ForCausalLM", CAUSAL, FALCON_H1),
    ("granite-moe-hybrid", "GraniteMoeHybridForCausalLM", CAUSAL, HYBRID),
    ("lfm2", "Lfm2ForCausalLM", CAUSAL, LFM2),
    ("rwkv", "RwkvForCausalLM", CAUSAL, RWKV),
    ("recurrent-gemma", "RecurrentGemmaForCausalLM", CAUSAL, GRIFFIN),
    ("xlstm", "xLSTMForCausalLM", CAUSAL, XLSTM),
    ("qwen3-next", "Qwen3NextForCausalLM", CAUSAL, DELTA),
]

ENTRIES: list[Entry] = [entry("state-space", *row) for row in TABLE]
