"""Losses on large logits on a GPU: memory, time and errors of a step, forward and backward.

The set-ups are those that others published figures for: Wijmans et al. 2024 (Cut Cross-Entropy),
table 1, and larger ones for Hopper. Bound: ``Head.products`` matrix products of ``2 N D V`` FLOPs
at the rate measured here for each of three shapes. Memory is what was allocated at once beyond the
inputs, the gradients of both factors included. All peers of a set-up run in turn, round by round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import graphopt
from benchmarks.heads import Distilled, Head, Pairs, SigmoidPairs, peaked
from graphopt.kernels.filtering import kept as kept_slopes
from graphopt.passes.loss_head import FuseLossHead

ROUNDS, WARM = 10, 3
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Setup:
    head: type[Head]
    rows: int
    width: int
    classes: int
    dtype: torch.dtype = torch.bfloat16


SETUPS = {
    "cross entropy, N=8192 D=2304 V=256000": Setup(Head, 8192, 2304, 256_000),
    "cross entropy, N=8192 D=4096 V=131072": Setup(Head, 8192, 4096, 131_072),
    "cross entropy, N=16384 D=2048 V=248320": Setup(Head, 16_384, 2048, 248_320),
    "Jensen-Shannon, N=8192 D=4096 V=128256": Setup(Distilled, 8192, 4096, 128_256),
    "symmetric pairs, N=65536 D=768": Setup(Pairs, 65_536, 768, 65_536),
    "sigmoid pairs, N=65536 D=768": Setup(SigmoidPairs, 65_536, 768, 65_536),
}


def run(_data: Path | None) -> dict[str, object]:
    if not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    return {name: measured(setup, torch.device("cuda")) for name, setup in SETUPS.items()}


def measured(setup: Setup, device: torch.device) -> dict[str, Any]:
    """Every peer on one set-up; memory and bound on CUDA devices only."""
    torch.manual_seed(0)
    with device:
        head = setup.head(setup.width, setup.classes, setup.dtype).train()
    hidden, targets, entropy = peaked(head, setup.rows)
    hidden.requires_grad_()
    steps = {n: partial(_step, p, head, hidden) for n, p in _peers(head, hidden, targets).items()}
    exact = _exact(head, hidden, targets)
    found = {name: _tried(step, head, hidden, exact) for name, step in steps.items()}
    del exact
    able = {name: step for name, step in steps.items() if "error" not in found[name]}
    for name, seconds in _interleaved(able, device).items():
        found[name] |= {"median_ms": _ms(statistics.median(seconds)), "min_ms": _ms(min(seconds))}
    figures = {"entropy_nats": round(entropy, 2), **found}
    if device.type == "cuda":
        figures = {"bound_ms": _ms(_bound(head, hidden)), **figures}
    return figures


def _peers(head: Head, hidden: Tensor, targets: Tensor) -> dict[str, Step]:
    loss, inputs = type(head), (hidden, targets)
    peers: dict[str, Step] = {
        "eager": partial(head, *inputs),
        "torch.compile": partial(torch.compile(head), *inputs),
        "graphopt": _Optimized(head, inputs),
        "graphopt, filter_gradients": _Optimized(head, inputs, filter_gradients=True),
    }
    if loss is Head:
        peers |= {
            "F.linear_cross_entropy, chunked": partial(_torch_native, head, *inputs),
            "cut-cross-entropy": partial(_cut, head, *inputs, "high"),
            "cut-cross-entropy, unfiltered": partial(_cut, head, *inputs, None),
            "Liger": partial(_liger, head, *inputs),
        }
    if loss is Distilled:
        peers["Liger"] = partial(_liger_divergence, head, hidden)
    return peers


class _Optimized:
    """Compiled at the first call, so that what fails is a result."""

    def __init__(self, head: Head, inputs: tuple[Tensor, ...], **options: bool) -> None:
        self.head, self.inputs, self.options = head, inputs, options
        self.compiled: Callable[..., Tensor] | None = None

    def __call__(self) -> Tensor:
        if self.compiled is None:
            fuse = FuseLossHead(**self.options)
            self.compiled = graphopt.compile(self.head, example_inputs=self.inputs, passes=fuse)
        return self.compiled(*self.inputs)


def _torch_native(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    chunks = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, head.weight, targets, options=chunks)


def _cut(head: Head, hidden: Tensor, targets: Tensor, threshold: str | None) -> Tensor:
    call = import_module("cut_cross_entropy").linear_cross_entropy
    return call(hidden, head.weight, targets, filter_eps=threshold)  # type: ignore[no-any-return]


def _liger(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    loss = import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    return loss(head.weight, hidden, targets)  # type: ignore[no-any-return]


def _liger_divergence(head: Head, hidden: Tensor) -> Tensor:
    module = import_module("liger_kernel.transformers.fused_linear_jsd")
    teacher = head.weight.detach().flip(0)
    return module.LigerFusedLinearJSD()(  # type: ignore[no-any-return]
        hidden, head.weight, hidden.detach(), teacher, None
    )


def _step(loss: Step, head: Head, hidden: Tensor) -> Tensor:
    """Forward and backward; the gradients of the step before are gone."""
    head.weight.grad = hidden.grad = None
    value = loss()
    value.backward()  # type: ignore[no-untyped-call]
    return value.detach()


def _exact(head: Head, hidden: Tensor, targets: Tensor) -> list[Tensor]:
    """The loss and the gradients of hidden states and weight, in float64."""
    factors = [t.detach().double().requires_grad_() for t in (hidden, head.weight)]
    loss = head.exact(*factors, targets)
    return [loss.detach(), *torch.autograd.grad(loss, factors)]


def _tried(step: Step, head: Head, hidden: Tensor, exact: list[Tensor]) -> dict[str, Any]:
    """Errors, relative in the Frobenius norm, the memory of a step, and the tiles it kept."""
    try:
        step()
        head.weight.grad = hidden.grad = None
        with kept_slopes() as kept, _Peak(hidden.device) as peak:
            loss = step()
    except Exception as error:  # a peer that fails, or is not installed, is a result
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    results = (loss, hidden.grad, head.weight.grad)
    names = ("loss_error", "hidden_grad_error", "weight_grad_error")
    errors = {n: _error(r, e) for n, r, e in zip(names, results, exact, strict=True)}
    shares = {"kept": round(float(torch.stack(kept).mean()), 4)} if kept else {}
    return {**peak.found, **errors, **shares}


def _error(result: Tensor | None, exact: Tensor) -> float:
    if result is None:
        return float("nan")
    return float(f"{float((result.double() - exact).norm() / exact.norm()):.3g}")


class _Peak:
    """``found["extra_MB"]``: what was allocated at once inside, on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.watched = device.type == "cuda"
        self.found: dict[str, float] = {}

    def __enter__(self) -> _Peak:
        if self.watched:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        if self.watched:
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - self.before
            self.found["extra_MB"] = round(peak / 1e6)


def _interleaved(steps: dict[str, Step], device: torch.device) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(WARM + ROUNDS):
        for name, step in steps.items():
            seconds = _seconds(step, device)
            if turn >= WARM:
                times[name].append(seconds)
    return times


def _bound(head: Head, hidden: Tensor) -> float:
    """Seconds of the products at the rate of the fastest of three runs, an eighth of the rows."""
    h, w = hidden.detach()[: len(hidden) // 8], head.weight.detach()
    slope = h @ w.T
    products = (lambda: h @ w.T, lambda: slope @ w, lambda: slope.T @ h)
    each = [min(_seconds(p, h.device) for _ in range(WARM)) for p in products]
    return 8 * sum(each) / len(each) * head.products


def _seconds(call: Callable[[], Any], device: torch.device) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 2)
