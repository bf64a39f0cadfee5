"""Rewriting and verifying a transformer 10x as deep. Bound: 12x the time."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from graphopt.capture import capture
from graphopt.recipe import Options, rewrite_program

SHALLOW, DEEP = 3, 30


def _seconds(layers: int) -> float:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_attention_heads=4,
        num_hidden_layers=layers,
    )  # fmt: skip
    ids = torch.randint(128, (2, 8))
    program = capture(BertModel(config).eval(), (), {"input_ids": ids})
    start = time.perf_counter()
    _, report = rewrite_program(program, Options(measure=False))
    if not report.verified:
        raise SystemExit("not verified")
    return time.perf_counter() - start


def run(_data: Path | None) -> dict[str, object]:
    _seconds(1)
    shallow, deep = _seconds(SHALLOW), _seconds(DEEP)
    return {
        "layers": [SHALLOW, DEEP],
        "seconds": [shallow, deep],
        "ratio": deep / shallow,
        "bound": 12.0,
    }
