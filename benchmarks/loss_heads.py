"""Losses on large logits: memory and time of a step, forward and backward, interleaved.

Bound: three matrix products of 2 N D V FLOPs (forward, and the gradients of both factors), at the
rate measured here for each of the three shapes; four for pairs, whose columns wait for all rows.
Memory is what allocators were asked for at once beyond the inputs; the gradients of both factors
are in it. Peers: eager, torch.compile, Inductor's auto_chunker, forced to work, and for cross
entropies torch's own ``F.linear_cross_entropy`` with chunks.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import graphopt
from benchmarks.heads import Head, Pairs

ROUNDS = 5
Step = Callable[[], Tensor]


SETUPS = {
    "N=2048 D=512 V=32000 float32": (Head, 2048, 512, 32000, torch.float32),
    "N=2048 D=512 V=32000 bfloat16": (Head, 2048, 512, 32000, torch.bfloat16),
    "SmolLM2-135M's head, 2048 tokens, float32": (Head, 2048, 576, 49152, torch.float32),
    "symmetric pairs, N=8192 D=512 float32": (Pairs, 8192, 512, 8192, torch.float32),
}


def run(_data: Path | None) -> dict[str, object]:
    torch.set_num_threads(2)
    return {name: _setup(*sizes) for name, sizes in SETUPS.items()}


def _setup(
    kind: type[Head], rows: int, width: int, classes: int, dtype: torch.dtype
) -> dict[str, Any]:
    torch.manual_seed(0)
    head = kind(width, classes, dtype).train()
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, classes, (rows,))
    exact = float(head.exact(hidden.detach().double(), head.weight.detach().double(), targets))
    peers = _peers(head, hidden, targets)
    found = {name: _measured(loss, head, hidden, exact) for name, loss in peers.items()}
    steps = {name: partial(_step, loss, head, hidden) for name, loss in peers.items()}
    times = _interleaved({n: s for n, s in steps.items() if "error" not in found[n]})
    for name, seconds in times.items():
        found[name] |= {
            "median_s": round(statistics.median(seconds), 3),
            "min_s": round(min(seconds), 3),
        }
    bound = _bound(hidden, head.weight)
    return {"three products_s": round(bound, 3), "logits_MiB": _mib(rows * classes * 4), **found}


def _peers(head: Head, hidden: Tensor, targets: Tensor) -> dict[str, Step]:
    fast = graphopt.compile(head, example_inputs=(hidden, targets))
    peers: dict[str, Step] = {
        "eager": partial(head, hidden, targets),
        "torch.compile": partial(torch.compile(head), hidden, targets),
        "auto_chunker": partial(_chunked_by_inductor(head), hidden, targets),
        "graphopt": partial(fast, hidden, targets),
    }
    if not isinstance(head, Pairs):
        chunks = nn.LinearCrossEntropyOptions()
        own = partial(F.linear_cross_entropy, hidden, head.weight, targets, options=chunks)
        peers["F.linear_cross_entropy, chunked"] = own
    return peers


def _chunked_by_inductor(head: Head) -> Callable[..., Tensor]:
    """Inductor's own chunking is off by default and asks for larger ratios than these."""
    options = {
        "auto_chunker.enable": True,
        "auto_chunker.amplify_ratio_threshold": 2,
        "auto_chunker.num_chunk": 8,
    }
    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(head, options=options)
    return compiled


def _step(loss: Step, head: Head, hidden: Tensor) -> Tensor:
    """Forward and backward; the gradients of the step before are gone."""
    head.weight.grad = hidden.grad = None
    value = loss()
    value.backward()
    return value.detach()


def _measured(loss: Step, head: Head, hidden: Tensor, exact: float) -> dict[str, Any]:
    try:
        value = float(_step(loss, head, hidden))
    except Exception as error:  # a peer that fails is a result
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"}
    head.weight.grad = hidden.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss().backward()
    events = seen.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    peak = max(accumulate(n for _, n in changes))
    return {"extra_MiB": _mib(peak), "loss_error": abs(value - exact) / exact}


def _interleaved(steps: dict[str, Step]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return times


def _bound(hidden: Tensor, weight: Tensor) -> float:
    """Seconds of the three products, each the fastest of three runs, a quarter of the rows."""
    h, w = hidden.detach()[: len(hidden) // 4], weight.detach()
    slope = h @ w.T
    products = (lambda: h @ w.T, lambda: slope @ w, lambda: slope.T @ h)
    return 4 * sum(min(_seconds(p) for _ in range(3)) for p in products)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _mib(size: int) -> float:
    return round(size / 2**20, 1)
