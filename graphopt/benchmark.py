"""Times that can be compared: every variant in one process, interleaved, medians and ratios."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.inputs import Inputs
from graphopt.recipe import Options, environment

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One variant: median, fastest and slowest seconds, and how it compares with eager."""

    name: str
    median: float
    fastest: float
    slowest: float
    speedup: float
    error: float


@dataclass(frozen=True)
class BenchResult:
    """All variants of one model, with the machine they were timed on."""

    model: str
    rows: tuple[Timing, ...]
    environment: dict[str, str]
    shapes: dict[str, str]
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """A plain table."""
        width = max(len(r.name) for r in self.rows)
        head = f"{'':{width}}  median ms  min ms  max ms  vs eager  rel. error"
        rows = [
            f"{r.name:{width}}  {r.median * 1e3:9.2f}  {r.fastest * 1e3:6.2f}  "
            f"{r.slowest * 1e3:6.2f}  {r.speedup:7.2f}x  {r.error:10.1e}"
            for r in self.rows
        ]
        machine = ", ".join(f"{k} {v}" for k, v in self.environment.items())
        inputs = ", ".join(f"{k} {v}" for k, v in self.shapes.items())
        skipped = [f"not measured: {s}" for s in self.skipped]
        return [f"{self.model}: {inputs}", head, *rows, *skipped, machine]


def bench(
    model: nn.Module,
    inputs: Inputs,
    options: Options,
    *,
    rounds: int = 11,
    inductor: bool = True,
    onnx: bool = False,
    ablation: bool = True,
    step: Callable[[str], None] = lambda _text: None,
) -> BenchResult:
    """Time ``model`` eagerly, under ``torch.compile``, under graphopt, and without each pass."""
    variants: dict[str, Call] = {"eager": _caller(model, inputs.kwargs)}
    skipped: list[str] = []
    makers = _makers(model, inputs, options, inductor=inductor, onnx=onnx, ablation=ablation)
    for name, make in makers.items():
        step(f"prepare {name}")
        try:
            call = make()
            call()
        except Exception as error:  # a peer that fails is a result, not the end of the run
            skipped.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
            continue
        variants[name] = call
    step("time")
    times = _interleave(variants, rounds)
    rows = _rows(variants, times)
    shapes = {k: _shape(v) for k, v in inputs.kwargs.items()}
    return BenchResult(type(model).__name__, rows, environment(), shapes, tuple(skipped))


def _makers(
    model: nn.Module,
    inputs: Inputs,
    options: Options,
    *,
    inductor: bool,
    onnx: bool,
    ablation: bool,
) -> dict[str, Callable[[], Call]]:
    values = inputs.kwargs

    def graphopt(changed: Options) -> Callable[[], Call]:
        return lambda: _caller(_optimized(model, inputs, changed), values)

    found: dict[str, Callable[[], Call]] = {
        "torch.compile": lambda: _caller(torch.compile(model), values),
        "graphopt": graphopt(options),
    }
    if inductor:
        found["graphopt + inductor"] = graphopt(replace(options, target="inductor"))
    if onnx:
        found["graphopt, ONNX Runtime"] = lambda: _onnx_caller(model, inputs, options)
    if ablation:
        found |= {
            f"  without {name}": graphopt(changed) for name, changed in _without_each(options)
        }
    return found


def _without_each(options: Options) -> list[tuple[str, Options]]:
    from graphopt.presets import resolve

    passes = resolve(options.passes)
    names = [n for n in dict.fromkeys(p.name for p in passes) if n != "Canonicalize"]
    return [
        (name, replace(options, passes=[p for p in passes if p.name != name])) for name in names
    ]


def _optimized(model: nn.Module, inputs: Inputs, options: Options) -> nn.Module:
    from graphopt.optimize import capture_model, optimize_program

    program, eager = capture_model(model, (), inputs.kwargs, inputs.dynamic or None)
    return optimize_program(program, options, eager=eager, original=model)


def _caller(model: Callable[..., Any], values: Mapping[str, Any]) -> Call:
    def call() -> Any:
        with torch.no_grad():
            return model(**values)

    return call


def _onnx_caller(model: nn.Module, inputs: Inputs, options: Options) -> Call:
    from graphopt.emit.onnx import export_onnx
    from graphopt.emit.onnx_runtime import open_session

    module: Any = _optimized(model, inputs, options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(module, path)
        session = open_session(path)
    wanted = [i.name for i in session.get_inputs()]
    feed = {n: inputs.kwargs[n].numpy() for n in wanted}
    return lambda: [torch.from_numpy(a) for a in session.run(None, feed)]


def _interleave(variants: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Each round runs every variant once, so that drift of the machine falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def _rows(variants: Mapping[str, Call], times: Mapping[str, list[float]]) -> tuple[Timing, ...]:
    wanted = _tensors(variants["eager"]())
    base = statistics.median(times["eager"])
    rows = []
    for name, call in variants.items():
        middle = statistics.median(times[name])
        error = _error(wanted, _tensors(call()))
        rows.append(Timing(name, middle, min(times[name]), max(times[name]), base / middle, error))
    return tuple(rows)


def _tensors(result: Any) -> list[Tensor]:
    return [v for v in pytree.tree_leaves(result) if isinstance(v, Tensor)]


def _error(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Largest RMS difference over the outputs, relative to the eager output."""
    rows = [0.0]
    for a, b in zip(wanted, found, strict=False):
        if a.is_floating_point() and a.numel():
            scale = float(a.double().square().mean().sqrt()) or 1.0
            rows.append(float((a.double() - b.double()).square().mean().sqrt()) / scale)
    return max(rows)


def _shape(value: Any) -> str:
    return f"{list(value.shape)}" if isinstance(value, Tensor) else repr(value)
