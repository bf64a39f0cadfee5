"""Run the benchmarks and write one result file each: ``python -m benchmarks [NAME ...]``.

Every result names the machine and the versions. ``--data DIR`` points at weights and images that
some benchmarks need; those are skipped, and say so, without it. The exit status is 1 where one
lists what it found ``failed``.
"""

from __future__ import annotations

import argparse
import datetime
import json
from importlib import import_module
from pathlib import Path

from graphopt.recipe import environment

NAMES = (
    "import_time",
    "optimize_cost",
    "depth",
    "minilm",
    "onnx_exports",
    "resnet20",
    "loss_heads",
    "loss_heads_gpu",
    "quantized_minilm",
    "quantized_smollm2",
    "smollm2_gptq",
    "smollm2_tokens",
    "static_activations",
    "quantized_quality",
    "quantized_gpu",
    "onnxruntime_cuda",
)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--data", type=Path, help="folder with weights/ and images/")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown benchmark {sorted(unknown)[0]!r}; choose from {', '.join(NAMES)}")
    RESULTS.mkdir(exist_ok=True)
    failed: list[str] = []
    for name in options.names or NAMES:
        print(f"== {name}", flush=True)
        found = import_module(f"benchmarks.{name}").run(options.data)
        print(json.dumps(found, indent=2))
        if "skipped" in found:
            continue
        found |= {"environment": environment(), "date": datetime.date.today().isoformat()}
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        failed += found.get("failed", [])
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
