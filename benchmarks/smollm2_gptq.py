"""Time and peak memory of GPTQ on SmolLM2: ``python -m benchmarks.smollm2_gptq DATA``."""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch

import graphopt
from benchmarks.models import smollm2
from graphopt.passes import QuantizeMatmul

SEQUENCES, LENGTH = 128, 512


def main() -> None:
    torch.set_num_threads(2)
    loaded = smollm2()
    assert loaded is not None
    model, tokens = loaded
    text = (Path(sys.argv[1]) / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
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
    found = {
        "sequences": SEQUENCES,
        "length": LENGTH,
        "seconds": round(seconds, 1),
        "peak GB": round(most * 1024 / 1e9, 2),
        "peak GB before": round(before * 1024 / 1e9, 2),
        "verified": made.report.verified,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
