"""``import graphopt`` against ``import torch``, in fresh processes, in turn. Bound: 1.3x."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path


def _seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def run(_data: Path | None) -> dict[str, object]:
    _seconds("import graphopt, torch")
    rows = [(_seconds("import torch"), _seconds("import torch, graphopt")) for _ in range(7)]
    torch, both = (statistics.median(column) for column in zip(*rows, strict=True))
    return {"torch_s": torch, "graphopt_s": both, "ratio": both / torch, "bound": 1.3}
