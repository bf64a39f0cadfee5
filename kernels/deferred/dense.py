"""What a deferred call stands for, in ordinary operators."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.kernels.chunked_rows.body import Body, read
from graphopt.kernels.chunked_rows.operands import Operands, few, grouped, products
from graphopt.kernels.chunked_rows.operator import casting

Kind = tuple[torch.dtype, tuple[int, ...]]
"""Dtype and shape of an operand."""


def dense(body: Body, operands: Operands[Tensor], autocast: torch.dtype | None) -> Tensor:
    """The one matrix ``(N, V)`` that a body gives."""
    with casting(operands.all, autocast):
        (matrix,) = body([*products(operands), *operands.rows, *operands.whole]).rows
    if matrix.dim() != 2:
        raise ValueError(f"the body gives {tuple(matrix.shape)}, which is no matrix")
    return matrix


def like(text: str, operands: Operands[Tensor], autocast: torch.dtype | None) -> Tensor:
    """An empty tensor of that matrix's shape and dtype; the number of rows is not asked for."""
    made = dense(read(text), few(operands), autocast)
    return made.new_empty((operands.hidden[0].shape[0], made.shape[1]))


def kind_of(text: str, operands: Operands[Tensor], autocast: torch.dtype | None) -> Kind:
    """Dtype and shape of that matrix; nothing is computed."""
    kinds = operands.filled((t.dtype, tuple(t.shape)) for t in operands.all)
    short = [[(kind, (2, *shape[1:])) for kind, shape in g] for g in (kinds.hidden, kinds.rows)]
    few = Operands(short[0], kinds.weight, short[1], kinds.whole)
    device = operands.hidden[0].device
    dtype, width = _of_few_rows(text, tuple(few.all), tuple(few.counts), device, autocast)
    return dtype, torch.Size((operands.hidden[0].shape[0], width))


@lru_cache(maxsize=512)
def _of_few_rows(
    text: str,
    kinds: tuple[Kind, ...],
    counts: tuple[int, ...],
    device: torch.device,
    autocast: torch.dtype | None,
) -> tuple[torch.dtype, int]:
    with _disable_current_modes(), FakeTensorMode(), torch.no_grad():
        given = [torch.empty(shape, dtype=kind, device=device) for kind, shape in kinds]
        made = dense(read(text), grouped(given, counts), autocast)
    return made.dtype, made.shape[1]
