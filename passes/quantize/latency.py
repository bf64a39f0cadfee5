"""How long products take in a format, on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import fx

from graphopt.kernels.quantized.autograd import linear
from graphopt.kernels.quantized.choice import quartiles
from graphopt.kernels.quantized.rounding import quantize
from graphopt.passes.quantize.layers import Kind
from graphopt.passes.quantize.plan import Settings
from graphopt.program import val
from graphopt.room import extent


def nanoseconds(products: Sequence[fx.Node], settings: Settings) -> int:
    """Of calls of ``linear`` on example inputs, by the fastest path for a format."""
    return sum(_measured(settings.kind, *_sizes(node)) for node in products)


def _sizes(node: fx.Node) -> tuple[int, int, int, torch.dtype, torch.device]:
    """Rows, N and K."""
    x, weight = val(node.args[0]), val(node.args[1])
    rows = 1
    for size in x.shape[:-1]:
        rows *= extent(size)
    return rows, weight.shape[0], weight.shape[1], x.dtype, x.device


@cache
def _measured(
    kind: Kind, rows: int, outputs: int, inputs: int, dtype: torch.dtype, device: torch.device
) -> int:
    generator = torch.Generator("cpu").manual_seed(0)  # the caller's random numbers are their own
    stored = quantize(torch.randn(outputs, inputs, generator=generator).to(device), kind.scheme)
    x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    with torch.no_grad():
        seconds = quartiles([partial(linear, x, stored, None, kind.activations)])[0]
    return max(1, round(seconds * 1e9))
