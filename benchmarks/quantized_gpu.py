"""Quantized products on a GPU, for the layers of Llama-3-8B: time, errors, and the bounds.

W4A16 (groups of 128) for 1, 16, 64 and 256 rows; W8A8 in E4M3 and int8, activations quantized in
the same run, for 4096. Every path of graphopt is there by itself, with the one that is chosen.
Times are of the device alone, nothing of the operands in L2, peers in turn, round by round. Bounds:
the bytes that a peer's operands have at the bandwidth of a copy, or ``2 M N K`` operations at the
rate of torch's own product of 8192 x 8192 x 8192 of that kind, both measured here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.kernels.quantized import QuantizedWeight, Scheme, linear, quantize, using
from graphopt.kernels.quantized.gpu_timing import beside, device_seconds

ROUNDS, WARM, LARGE = 20, 3, 8192
Run = Callable[[], Tensor]
LAYERS = ((6144, 4096), (4096, 4096), (28_672, 4096), (4096, 14_336))
"""N and K of qkv, the output of attention, gate with up, and down."""
FOUR = Scheme(4, group_size=128)


@dataclass(frozen=True)
class Setup:
    rows: int
    outputs: int
    inputs: int
    scheme: Scheme = FOUR
    activations: str = "none"

    @property
    def name(self) -> str:
        kind = f"W{self.scheme.bits}A{16 if self.activations == 'none' else 8}"
        sizes = f"M={self.rows} N={self.outputs} K={self.inputs}"
        return f"{kind} {self.scheme.dtype}, {sizes}"


SETUPS = [
    *(Setup(m, n, k) for m in (1, 16, 64, 256) for n, k in LAYERS),
    *(Setup(4096, n, k, Scheme(8, d), "dynamic") for d in ("fp8", "int") for n, k in LAYERS),
]


def run(_data: Path | None) -> dict[str, object]:
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    device = torch.device("cuda")
    rates = {kind: _rate(kind, device) for kind in ("bf16", "fp8", "int")}
    ceilings = {"bandwidth": _bandwidth(device), **rates}
    found = {setup.name: measured(setup, device, ceilings) for setup in SETUPS}
    return {"ceilings": {k: f"{v:.3g}" for k, v in ceilings.items()}, **_versions(), **found}


def measured(setup: Setup, device: torch.device, ceilings: dict[str, float]) -> dict[str, Any]:
    """Every peer on one set-up; ratios are of medians, above 1 where a peer is faster."""
    torch.manual_seed(0)
    dense = torch.randn(setup.outputs, setup.inputs, device=device) / setup.inputs**0.5
    x = torch.randn(setup.rows, setup.inputs, device=device).bfloat16()
    weight = _quantized(dense, setup.scheme)
    exact = (x[:64].double() @ dense.double().t()).float()
    runs = {name: _tried(call, exact) for name, call in _peers(setup, x, dense, weight).items()}
    able = {name: call for name, (call, found) in runs.items() if "error" not in found}
    figures = {name: found for name, (_, found) in runs.items()}
    medians = {name: statistics.median(taken) for name, taken in _interleaved(able, device).items()}
    bound = _bound(setup, x, weight, ceilings)
    for name, seconds in medians.items():
        figures[name] |= {
            "median_us": round(1e6 * seconds, 2),
            "over_bf16": round(medians["F.linear, bf16"] / seconds, 3),
            "of_bound": round(bound / seconds, 3),
        }
    return {"bound_us": round(1e6 * bound, 2), **figures}


def _quantized(dense: Tensor, scheme: Scheme) -> QuantizedWeight:
    made = quantize(dense, scheme)
    named = {name: tensor.contiguous() for name, tensor in made.tensors.items()}
    return QuantizedWeight(scheme, made.width, **named)


def _peers(setup: Setup, x: Tensor, dense: Tensor, weight: QuantizedWeight) -> dict[str, Run]:
    how = setup.activations
    paths = ["weight_only", "dequantized"] if how == "none" else ["dynamic_rows"]
    if how == "dynamic":
        paths.append("by_scaled_mm" if setup.scheme.dtype == "fp8" else "by_int_mm")
    peers: dict[str, Run] = {
        "F.linear, bf16": partial(F.linear, x, dense.bfloat16()),
        "graphopt": partial(linear, x, weight, None, how),
        **{f"graphopt, {path}": partial(_by, path, x, weight, how) for path in paths},
        "torchao": _Torchao(setup, x, dense),
    }
    return peers | ({"Marlin": _Marlin(x, dense)} if how == "none" else {})


def _by(path: str, x: Tensor, weight: QuantizedWeight, how: str) -> Tensor:
    with using(path):
        return linear(x, weight, None, how)


class _Torchao:
    """Prepared at the first call, so that what fails is a result."""

    def __init__(self, setup: Setup, x: Tensor, dense: Tensor) -> None:
        self.setup, self.x, self.dense = setup, x, dense
        self.layer: torch.nn.Module | None = None

    def __call__(self) -> Tensor:
        if self.layer is None:
            self.layer = self._prepared()
        with torch.no_grad():
            return self.layer(self.x)  # type: ignore[no-any-return]

    def _prepared(self) -> torch.nn.Module:
        ao, per_row = import_module("torchao.quantization"), None
        if self.setup.scheme.dtype == "fp8":
            per_row = ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow())
        elif self.setup.activations == "dynamic":
            per_row = ao.Int8DynamicActivationInt8WeightConfig()
        layer = torch.nn.Linear(*self.dense.shape[::-1], bias=False, device=self.x.device)
        layer = layer.bfloat16()
        with torch.no_grad():
            layer.weight.copy_(self.dense)
        holder = torch.nn.Sequential(layer)
        ao.quantize_(holder, per_row or ao.Int4WeightOnlyConfig(group_size=128))
        return holder


class _Marlin:
    """The kernel of github.com/IST-DASLab/marlin, float16; prepared at the first call."""

    def __init__(self, x: Tensor, dense: Tensor) -> None:
        self.x, self.dense = x.half(), dense
        self.layer: torch.nn.Module | None = None

    def __call__(self) -> Tensor:
        if self.layer is None:
            self.layer = self._prepared()
        return self.layer(self.x)  # type: ignore[no-any-return]

    def _prepared(self) -> torch.nn.Module:
        outputs, inputs = self.dense.shape
        weight = _quantized(self.dense, FOUR)
        source = torch.nn.Linear(inputs, outputs, bias=False, device=self.x.device).half()
        with torch.no_grad():
            source.weight.copy_(weight.dequantize(torch.float16))
        layer = import_module("marlin").Layer(inputs, outputs, groupsize=128)
        layer.pack(source.cpu(), weight.scales.half().t().contiguous().cpu())
        return layer.to(self.x.device)  # type: ignore[no-any-return]


def _tried(call: Run, exact: Tensor) -> tuple[Run, dict[str, Any]]:
    """The error of a peer, relative in the Frobenius norm, to the product with the dense weight."""
    try:
        found = call()[: len(exact)].float()
    except Exception as error:  # a peer that fails, or is not installed, is a result
        text = (str(error).splitlines() or [""])[0]
        return call, {"error": f"{type(error).__name__}: {text[:120]}"}
    return call, {"off": float(f"{float((found - exact).norm() / exact.norm()):.3g}")}


def _interleaved(runs: dict[str, Run], device: torch.device) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    other = beside() if device.type == "cuda" else None
    for turn in range(WARM + ROUNDS):
        for name, call in runs.items():
            seconds = _seconds(call, other)
            if turn >= WARM:
                times[name].append(seconds)
    return times


def _seconds(call: Run, other: Tensor | None) -> float:
    if other is not None:
        return device_seconds(call, other)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _bound(setup: Setup, x: Tensor, weight: QuantizedWeight, ceilings: dict[str, float]) -> float:
    """Seconds: each operand and the result once, or the operations."""
    moved = weight.nbytes + x.nbytes + x.element_size() * setup.rows * setup.outputs
    kind = "bf16" if setup.activations == "none" else setup.scheme.dtype
    operations = 2 * setup.rows * setup.outputs * setup.inputs
    return max(moved / ceilings["bandwidth"], operations / ceilings[kind])


def _bandwidth(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written."""
    source = torch.randn(1 << 28, device=device)
    into = torch.empty_like(source)
    times = _interleaved({"copy": lambda: into.copy_(source)}, device)["copy"]
    return 2 * source.nbytes / statistics.median(times)


def _rate(kind: str, device: torch.device) -> float:
    """Operations a second of a large product."""
    a, b = (torch.randn(LARGE, LARGE, device=device) for _ in range(2))
    one = torch.ones((), device=device)
    products: dict[str, Callable[[], Tensor]] = {
        "bf16": partial(F.linear, a.bfloat16(), b.bfloat16()),
        "int": partial(torch._int_mm, (32 * a).to(torch.int8), (32 * b).to(torch.int8).t()),
        "fp8": partial(
            torch._scaled_mm,
            a.to(torch.float8_e4m3fn),
            b.to(torch.float8_e4m3fn).t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
        ),
    }
    times = _interleaved({kind: products[kind]}, device)[kind]
    return 2 * LARGE**3 / statistics.median(times)


def _versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for package in ("triton", "torchao", "marlin"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return {"peers": ", ".join(f"{name} {text}" for name, text in found.items())}
