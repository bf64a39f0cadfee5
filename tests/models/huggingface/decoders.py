"""Causal language models."""

from __future__ import annotations

from dataclasses import replace

from models.entry import Entry
from models.huggingface import inputs as kind
from models.huggingface.spec import GROUPED, TINY, VOCAB, Row, entry

CAUSAL = kind.Modality(
    kind.cacheless(kind.text), kind.TEXT_AXES, kind.token_labels, {"labels": kind.TOKENS}
)
UNMASKED = replace(
    CAUSAL, make=kind.cacheless(kind.text_without_mask), axes={"input_ids": kind.TOKENS}
)

GPT = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA = {**GROUPED, "head_dim": 8}
WINDOWED = {**GROUPED, "sliding_window": 4}
# A window shorter than the inputs, so that the banded mask matters.
GEMMA2 = {**GEMMA, "sliding_window": 4, "query_pre_attn_scalar": 8}
OPT = {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32}
NEO = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MPT = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
FALCON = {**TINY, "multi_query": True, "parallel_attn": True, "alibi": False}
XGLM = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "ffn_dim": 48,
    "num_layers": 2,
    "attention_heads": 4,
    "max_position_embeddings": 64,
}
CTRL = {**GPT, "dff": 48}

TABLE: list[Row] = [
    ("gpt2", "GPT2LMHeadModel", CAUSAL, GPT),
    ("gpt2-trunk", "GPT2Model", replace(CAUSAL, label=None), GPT),
    ("llama", "LlamaForCausalLM", CAUSAL, GROUPED),
    ("llama-tied", "LlamaForCausalLM", CAUSAL, {**GROUPED, "tie_word_embeddings": True}),
    ("mistral", "MistralForCausalLM", CAUSAL, WINDOWED),
    ("qwen2", "Qwen2ForCausalLM", CAUSAL, GROUPED),
    ("qwen3", "Qwen3ForCausalLM", CAUSAL, {**GROUPED, "head_dim": 8}),
    ("gemma", "GemmaForCausalLM", CAUSAL, GEMMA),
    ("gemma2", "Gemma2ForCausalLM", CAUSAL, GEMMA2),
    ("gemma3", "Gemma3ForCausalLM", CAUSAL, {**GEMMA2, "sliding_window_pattern": 2}),
    ("phi", "PhiForCausalLM", CAUSAL, {**TINY, "partial_rotary_factor": 0.5}),
    ("phi3", "Phi3ForCausalLM", CAUSAL, GROUPED),
    ("opt", "OPTForCausalLM", CAUSAL, OPT),
    ("bloom", "BloomForCausalLM", CAUSAL, TINY | {"n_layer": 2, "n_head": 4}),
    ("gpt-neo", "GPTNeoForCausalLM", CAUSAL, NEO),
    ("gpt-neox", "GPTNeoXForCausalLM", CAUSAL, TINY),
    ("gptj", "GPTJForCausalLM", CAUSAL, {**GPT, "rotary_dim": 4}),
    ("codegen", "CodeGenForCausalLM", CAUSAL, {**GPT, "rotary_dim": 4}),
    ("gpt-bigcode", "GPTBigCodeForCausalLM", CAUSAL, GPT),
    ("falcon", "FalconForCausalLM", CAUSAL, FALCON),
    ("falcon-alibi", "FalconForCausalLM", CAUSAL, {**FALCON, "alibi": True}),
    ("stablelm", "StableLmForCausalLM", CAUSAL, GROUPED),
    ("olmo", "OlmoForCausalLM", CAUSAL, GROUPED),
    ("olmo2", "Olmo2ForCausalLM", CAUSAL, GROUPED),
    ("cohere", "CohereForCausalLM", CAUSAL, {**GROUPED, "use_qk_norm": True}),
    ("cohere2", "Cohere2ForCausalLM", CAUSAL, WINDOWED),
    ("smollm3", "SmolLM3ForCausalLM", CAUSAL, {**GROUPED, "no_rope_layer_interval": 2}),
    ("starcoder2", "Starcoder2ForCausalLM", CAUSAL, WINDOWED),
    ("mpt", "MptForCausalLM", CAUSAL, MPT),
    ("granite", "GraniteForCausalLM", CAUSAL, {**GROUPED, "residual_multiplier": 0.5}),
    ("glm", "GlmForCausalLM", CAUSAL, {**GROUPED, "head_dim": 8}),
    ("nemotron", "NemotronForCausalLM", CAUSAL, GROUPED),
    ("persimmon", "PersimmonForCausalLM", CAUSAL, TINY),
    ("biogpt", "BioGptForCausalLM", CAUSAL, TINY),
    ("xglm", "XGLMForCausalLM", CAUSAL, XGLM),
    ("openai-gpt", "OpenAIGPTLMHeadModel", replace(CAUSAL, make=kind.text), GPT),
    ("ctrl", "CTRLLMHeadModel", CAUSAL, CTRL),
    ("exaone4", "Exaone4ForCausalLM", CAUSAL, WINDOWED),
    ("diffllama", "DiffLlamaForCausalLM", CAUSAL, GROUPED),
    ("bitnet", "BitNetForCausalLM", CAUSAL, GROUPED),
    ("helium", "HeliumForCausalLM", CAUSAL, {**GROUPED, "head_dim": 8}),
    ("arcee", "ArceeForCausalLM", CAUSAL, GROUPED),
]

ENTRIES: list[Entry] = [entry("decoder", *row) for row in TABLE]
