"""all-MiniLM-L6-v2, batch 8, sequence 128, through torch and through ONNX Runtime, interleaved.

Bound: 21.8 GFLOP of matrix products at the machine's float32 rate. Peers: eager, torch.compile;
plain dynamo export, the ``onnxruntime.transformers`` optimizer, onnxscript's fusions.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import graphopt
from benchmarks.models import minilm
from graphopt.emit.onnx_runtime import open_session
from graphopt.emit.onnx_translate import quiet

ROUNDS = 15


def run(_data: Path | None) -> dict[str, object]:
    torch.set_num_threads(2)
    model, inputs, axes = minilm(8, 128)
    fast = graphopt.compile(model, example_kwargs=inputs, dynamic_shapes=axes)
    through_torch = {
        "eager": _call(model, inputs),
        "torch.compile": _call(torch.compile(model), inputs),
        "graphopt": _call(fast, inputs),
        "graphopt + inductor": _call(
            graphopt.compile(model, example_kwargs=inputs, dynamic_shapes=axes, target="inductor"),
            inputs,
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        through_runtime = _sessions(model, fast, inputs, Path(folder))
    with torch.no_grad():
        reference = model(**inputs).last_hidden_state.numpy()
    return {
        "shape": [8, 128],
        "torch": _time(through_torch, reference),
        "onnxruntime": _time(through_runtime, reference),
    }


def _call(model: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> Callable[[], np.ndarray]:
    def call() -> np.ndarray:
        with torch.no_grad():
            return model(**inputs)[0].numpy()

    return call


def _sessions(
    model: torch.nn.Module, fast: Any, inputs: dict[str, torch.Tensor], folder: Path
) -> dict[str, Callable[[], np.ndarray]]:
    plain, fused, old, own = (folder / f"{n}.onnx" for n in ("plain", "fused", "old", "own"))
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = dict.fromkeys(inputs, dims)
    with quiet():
        exported = torch.onnx.export(
            model, (), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, verbose=False
        )
        exported.save(plain)
        from onnxruntime.transformers.optimizer import optimize_model
        from onnxscript.rewriter.ort_fusions import optimize_for_ort

        optimize_model(str(plain), "bert", num_heads=12, hidden_size=384).save_model_to_file(
            str(old)
        )
        exported.model, _ = optimize_for_ort(exported.model)
        exported.save(fused)
    graphopt.export_onnx(fast, own)
    names = {
        "dynamo export": plain,
        "onnxruntime.transformers": old,
        "onnxscript fusions": fused,
        "graphopt": own,
    }
    return {name: _session_call(path, inputs) for name, path in names.items()}


def _session_call(path: Path, inputs: dict[str, torch.Tensor]) -> Callable[[], np.ndarray]:
    session = open_session(path)
    feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    return lambda: session.run(None, feed)[0]


def _time(calls: dict[str, Callable[[], np.ndarray]], reference: np.ndarray) -> dict[str, object]:
    times: dict[str, list[float]] = {name: [] for name in calls}
    errors = {name: float(np.abs(call() - reference).max()) for name, call in calls.items()}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {
        name: {
            "median_ms": round(statistics.median(rows) * 1e3, 2),
            "min_ms": round(min(rows) * 1e3, 2),
            "largest_difference": errors[name],
        }
        for name, rows in times.items()
    }
