"""Bodies of chunked heads by Inductor's code, where that is faster here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.capture_errors import first_line
from graphopt.kernels.chunked_rows import chunked_rows
from graphopt.kernels.chunked_rows.operands import Operands, may_name_classes
from graphopt.kernels.chunked_rows.pieces import PIECE
from graphopt.program import val
from graphopt.rewrite import arguments
from graphopt.room import extent
from graphopt.source import source_line

ROUNDS = 5
"""Measurements of each, in turn; the fastest counts."""

GAIN = 0.9
"""Code is taken from this share of the operators' time on."""

_known: dict[Any, tuple[float, float]] = {}
"""Seconds of a piece by operators and by code, for the call that was measured."""


def compile_bodies(graph: fx.Graph) -> list[str]:
    """Mark the calls whose bodies run faster by Inductor's code, in place; says by how much.

    On a CPU those that are given integers stay as they are, see `may_name_classes`.
    """
    notes = []
    for node in graph.find_nodes(op="call_function", target=chunked_rows):
        line = source_line(node)
        at = f"the body of `{node.name}`{f' ({line})' if line else ''}"
        given = arguments(node)
        if may_name_classes(Operands(*([val(n) for n in given[name]] for name in _TENSORS))):
            continue
        try:
            plain, code = _paces(given)
        except Exception as error:  # Inductor, and the compiler behind it, have kinds of their own
            notes.append(f"{at} runs by operators: code cannot be made ({first_line(error)})")
            continue
        if code <= GAIN * plain:
            node.kwargs = {**node.kwargs, "compiled": True}
            notes.append(f"{at} runs by Inductor's code: {plain / code:.2g}x as fast")
    return notes


def _paces(given: Mapping[str, Any]) -> tuple[float, float]:
    """Seconds of one piece with its gradients, by operators and by code."""
    fakes = [val(n) for name in _TENSORS for n in given[name]]
    sizes = tuple((f.dtype, f.device, *map(extent, f.shape)) for f in fakes)
    key = (given["body"], tuple(given["differentiable"]), given["autocast"], sizes)
    if key not in _known:
        _known[key] = _measured(given)
    return _known[key]


_TENSORS = ("hidden", "weight", "rows", "whole")


def _measured(given: Mapping[str, Any]) -> tuple[float, float]:
    hidden, weight, rows, whole = ([val(n) for n in given[name]] for name in _TENSORS)
    classes = [math.prod(map(extent, w.shape[:-1])) for w in weight]
    count = min(extent(hidden[0].shape[0]), max(2, PIECE // max(1, sum(classes))))
    groups = extent(weight[0].shape[0]) if weight[0].dim() == 3 else 1
    tensors = [
        [_drawn(h, [count, 1]) for h in hidden],
        [_drawn(w, [*map(extent, w.shape[:-1]), 1]) for w in weight],
        [_drawn(r, [count * groups, *map(extent, r.shape[1:])]) for r in rows],
        [_drawn(w, map(extent, w.shape)) for w in whole],
    ]
    names = ("body", "chunk_bytes", "differentiable", "autocast", "filter_threshold")
    call = partial(chunked_rows, *tensors, *(given[name] for name in names))
    runs = [partial(_seconds, partial(call, compiled=made)) for made in (False, True)]
    for run in runs:
        run()
    taken = [[run() for run in runs] for _ in range(ROUNDS)]
    plain, code = (min(times) for times in zip(*taken, strict=True))
    return plain, code


def _drawn(fake: Tensor, sizes: Iterable[int]) -> Tensor:
    """Numbers between 0 and 1, which a body can take for probabilities; class 0; False."""
    if not fake.is_floating_point():
        return torch.zeros([*sizes], dtype=fake.dtype, device=fake.device)
    drawn = torch.rand([*sizes], dtype=torch.float32, device=fake.device).to(fake.dtype)
    return drawn.requires_grad_()


def _seconds(call: Callable[[], Sequence[Tensor]]) -> float:
    start = time.perf_counter()
    with torch.enable_grad():
        made = [r for r in call() if r.requires_grad]
        if made:
            torch.autograd.backward(made, [torch.ones_like(r) for r in made])
    if made and made[0].is_cuda:
        torch.cuda.synchronize(made[0].device)
    return time.perf_counter() - start
