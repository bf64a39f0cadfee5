"""``genai_config.json``, by which onnxruntime-genai runs a file that decodes.

Its keys are those of the configuration reference of ONNX Runtime (generate API), and of `Config` in
onnxruntime-genai's ``src/config.h``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.huggingface_caches import CAUSAL, PAST, PRESENT
from graphopt.huggingface_decoding import Decoding

TYPES = frozenset(
    {
        *("chatglm", "ernie4_5", "gemma", "gemma2", "gemma3_text", "gpt2", "granite", "internlm2"),
        *("llama", "mistral", "nemotron", "olmo", "phi", "phi3", "phimoe", "qwen2", "qwen3"),
        "smollm3",
    }
)
"""Kinds of models that it knows by the name that transformers has for them (``model_type.h``);
others are a ``decoder``."""


def genai_config(model: nn.Module, decoder: Decoding, inputs: Sequence[str]) -> dict[str, Any]:
    """The model's sizes, what its file calls its tensors, and how it likes to be sampled from."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    generation: Any = model.generation_config
    values = pytree.tree_leaves(decoder.inputs.kwargs)
    key = next(v for v in values if isinstance(v, Tensor) and v.dim() == 4)
    length = _context(config)
    tokens = {
        f"{kind}_token_id": _token(generation, config, kind) for kind in ("bos", "eos", "pad")
    }
    if tokens["pad_token_id"] is None:
        last = tokens["eos_token_id"]
        tokens["pad_token_id"] = last[0] if isinstance(last, list) else last
    sizes = {n: getattr(config, n, None) for n in ("hidden_size", "num_attention_heads")}
    named = [name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs]
    return {
        "model": {
            **{name: value for name, value in tokens.items() if value is not None},
            "type": config.model_type if config.model_type in TYPES else "decoder",
            "vocab_size": config.vocab_size,
            "context_length": length,
            "decoder": {
                "filename": CAUSAL,
                "session_options": {"provider_options": []},
                **{name: size for name, size in sizes.items() if size is not None},
                "num_hidden_layers": sum(name.endswith(".key") for name in inputs),
                "num_key_value_heads": key.shape[1],
                "head_size": key.shape[3],
                "inputs": {
                    **{name: name for name in named},
                    "past_key_names": f"{PAST}.%d.key",
                    "past_value_names": f"{PAST}.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{PRESENT}.%d.key",
                    "present_value_names": f"{PRESENT}.%d.value",
                },
            },
        },
        "search": _search(generation, length),
    }


def _context(config: Any) -> int:
    """Positions that the model can tell apart; models without a limit are given a large one."""
    for name in ("max_position_embeddings", "n_positions", "seq_length"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    return 2048


def _token(generation: Any, config: Any, kind: str) -> Any:
    found = getattr(generation, f"{kind}_token_id", None)
    return found if found is not None else getattr(config, f"{kind}_token_id", None)


def _search(generation: Any, length: int) -> dict[str, Any]:
    """Defaults of its search; the cache grows, so past and present share no buffer."""
    names = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "num_beams")
    given = {name: getattr(generation, name, None) for name in names}
    return {
        **{name: value for name, value in given.items() if value is not None},
        "max_length": length,
        "past_present_share_buffer": False,
    }
