"""Seconds to capture, rewrite and verify all-MiniLM-L6-v2 with preset exact. Bound: 20 s."""

from __future__ import annotations

import time
from pathlib import Path

import graphopt
from benchmarks.models import minilm


def run(_data: Path | None) -> dict[str, object]:
    model, inputs, axes = minilm(2, 16)
    start = time.perf_counter()
    fast = graphopt.compile(model, example_kwargs=inputs, dynamic_shapes=axes)
    seconds = time.perf_counter() - start
    passes = {f"{i} {p.name}": round(p.seconds, 3) for i, p in enumerate(fast.report.passes)}
    return {
        "seconds": seconds,
        "bound": 20.0,
        "verified": fast.report.verified,
        "rewrites": len(fast.report.applied),
        "passes_s": passes,
    }
