"""Regions in ONNX Runtime on a GPU: whether they are right, and their times beside torch's.

Models with weights on a CUDA device are compiled for its provider; what does not hold is listed
under ``failed``, and the exit status is 1. ``pip install 'graphopt[gpu]'`` in place of onnxruntime.
It checks that operators run on the GPU, that outputs are those of float64 and stay on the device,
that a call waits for what torch computes on its own streams, and that calls from several threads
do not disturb each other. Times are of whole calls, in turn, the device idle before and after.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.onnx_models import SUBJECTS, Feed, Subject
from graphopt.emit.ort.call import OrtRegion
from graphopt.emit.ort.providers import CUDA, available_providers

ROUNDS, WARM, THREADS, CALLS = 20, 3, 4, 8
LARGE = 8192
"""Rows of products that keep a GPU busy for milliseconds."""
ALLOWED = 1e-4
"""Largest relative error of outputs, RMS, to float64."""
TARGETS: dict[str, dict[str, Any]] = {
    "graphopt, torch": {"target": "torch"},
    "graphopt, ONNX Runtime": {"target": "onnxruntime", "measure": False},
}
Call = Callable[[Feed], Tensor]


def run(data: Path | None) -> dict[str, object]:
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    if CUDA not in available_providers():
        return {"skipped": f"no {CUDA}: pip install onnxruntime-gpu in place of onnxruntime"}
    found: dict[str, Any] = {}
    for name, make in SUBJECTS.items():
        subject = make(data)
        if subject is None or subject.decodes:
            continue
        found[name] = checked(subject, torch.device("cuda", 0), "cuda")
        print(name, found[name], flush=True)
    failed = [f"{name}: {text}" for name, row in found.items() for text in row["failed"]]
    return {"device": torch.cuda.get_device_name(), "models": found, "failed": failed}


def checked(subject: Subject, device: torch.device, provider: str) -> dict[str, Any]:
    """What does not hold of a model there, and the milliseconds of its ways to run."""
    model = copy.deepcopy(subject.model).to(device)
    feeds = {name: _to(feed, device) for name, feed in subject.feeds.items()}
    ways: dict[str, nn.Module] = {"eager": model}
    for name, options in TARGETS.items():
        asked = {"providers": [provider]} if options["target"] == "onnxruntime" else {}
        ways[name] = graphopt.compile(
            model,
            example_kwargs=_to(subject.call, device),
            dynamic_shapes=subject.axes,
            **options,
            **asked,
        )
    fast = ways["graphopt, ONNX Runtime"]
    exact = copy.deepcopy(model).double()
    failed = [
        *_of_the_partition(fast, provider),
        *(f"{shape}: {t}" for shape, feed in feeds.items() for t in _of_a_feed(fast, exact, feed)),
    ]
    times = {shape: _timed(ways, feed, device) for shape, feed in feeds.items()}
    return {"partition": _partition(fast), "milliseconds": times, "failed": failed}


def _to(feed: Feed, device: torch.device) -> Feed:
    return {name: tensor.to(device) for name, tensor in feed.items()}


@torch.no_grad()
def _first(module: nn.Module, feed: Feed) -> Tensor:
    """The first output."""
    made = module(**feed)
    found: Tensor = made if isinstance(made, Tensor) else made[0]
    return found


def _partition(fast: Any) -> dict[str, Any]:
    partition = fast.report.partition
    regions = [{"operators": len(r.nodes), "runs on": r.assigned} for r in partition.regions]
    return {"regions": regions, "in torch": {p.reason: p.operators for p in partition.torch}}


def _of_the_partition(fast: Any, provider: str) -> Iterator[str]:
    if not any(isinstance(module, OrtRegion) for module in fast.modules()):
        yield f"nothing runs in ONNX Runtime: {'; '.join(fast.report.notes)}"
    for region in fast.report.partition.regions:
        if region.assigned and not any(provider in name.lower() for name in region.assigned):
            yield f"{region.name} runs on {', '.join(region.assigned)}"


def _of_a_feed(fast: nn.Module, exact: nn.Module, feed: Feed) -> Iterator[str]:
    made, wanted = _first(fast, feed), _first(exact, _double(feed))
    if made.device != wanted.device:
        yield f"outputs are on {made.device}, those of the model on {wanted.device}"
    if (error := _error(made, wanted)) > ALLOWED:
        yield f"outputs are off by {error:.2g}"
    for name, around in _streams(made.device).items():
        with around:
            late = _behind_work(fast, feed)
        if (error := _error(late, wanted)) > ALLOWED:
            yield f"behind other work {name} outputs are off by {error:.2g}"
    with ThreadPoolExecutor(THREADS) as pool:
        several = list(pool.map(lambda _: _first(fast, feed), range(CALLS)))
    if not all(torch.equal(one, several[0]) for one in several):
        yield f"{THREADS} threads got different outputs"


def _double(feed: Feed) -> Feed:
    return {n: t.double() if t.is_floating_point() else t for n, t in feed.items()}


def _error(made: Tensor, wanted: Tensor) -> float:
    return float((made.to(wanted) - wanted).norm() / wanted.norm())


def _streams(device: torch.device) -> dict[str, Any]:
    found: dict[str, Any] = {"on torch's stream": nullcontext()}
    if device.type == "cuda":
        found["on another stream"] = torch.cuda.stream(torch.cuda.Stream(device))
    return found


@torch.no_grad()
def _behind_work(fast: nn.Module, feed: Feed) -> Tensor:
    """Outputs for inputs that are still to be computed when the call comes."""
    device = next(iter(feed.values())).device
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    extent = LARGE if device.type == "cuda" else 64
    busy = torch.zeros(extent, extent, device=device)
    for _ in range(4):
        busy = busy @ busy
    nothing = busy.sum()
    late = {name: t + nothing.to(t.dtype) for name, t in feed.items()}
    return _first(fast, late)


def _timed(ways: dict[str, nn.Module], feed: Feed, device: torch.device) -> dict[str, float]:
    """Medians of calls that are made in turn, another first in every round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(WARM + ROUNDS):
        for name in order:
            _idle(device)
            start = time.perf_counter()
            _first(ways[name], feed)
            _idle(device)
            if turn >= WARM:
                times[name].append(time.perf_counter() - start)
        order = [*order[1:], *order[:1]]
    return {name: round(statistics.median(taken) * 1e3, 4) for name, taken in times.items()}


def _idle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
