"""``graphopt::chunked_rows`` for torch: schemas, what runs, fake values. See `autograd` too.

Three operators: the one that users and passes call, and two that its autograd calls, with all
tensors in one list and ``counts`` of the four groups. ``chunked_rows_with_gradients`` gives the
results and then a gradient for each operand that is ``wanted``, for a cotangent of one;
``chunked_rows_backward`` gives the gradients for ``cotangents`` of the differentiable results, of
which those of columns are given again as ``totals``. With a ``filter_threshold`` above zero
gradients are approximate, see `thinning`. With
``compiled`` the body runs by code of Inductor, see `compiled`; on a CPU not where it is given
integers, see `operands.may_name_classes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.body import read
from graphopt.kernels.chunked_rows.chunks import Loop
from graphopt.kernels.chunked_rows.columns import none_added
from graphopt.kernels.chunked_rows.compiled import compiled as compiled_pieces
from graphopt.kernels.chunked_rows.dispatch import evaluated
from graphopt.kernels.chunked_rows.operands import (
    Operands,
    cast,
    check,
    few,
    grouped,
    may_name_classes,
    products,
)
from graphopt.kernels.chunked_rows.steps import Cotangents, recording

Tensors = Sequence[Tensor]
Settings = tuple[str, int, list[bool], torch.dtype | None, float, bool]
"""Body, chunk_bytes, differentiable, autocast, filter_threshold, compiled: what every call ends
with."""

library = torch.library.Library("graphopt", "FRAGMENT")
_SETTINGS = (
    "str body, int chunk_bytes, bool[] differentiable, ScalarType? autocast=None, "
    "float filter_threshold=0.0, bool compiled=False"
)
_FLAT = f"Tensor[] tensors, int[] counts, {_SETTINGS}"
for _schema in (
    "chunked_rows(Tensor[] hidden, Tensor[] weight, Tensor[] rows, Tensor[] whole, "
    f"{_SETTINGS}) -> Tensor[]",
    f"chunked_rows_with_gradients({_FLAT}, *, bool[] wanted) -> Tensor[]",
    f"chunked_rows_backward({_FLAT}, *, bool[] wanted, Tensor[] cotangents, Tensor[] totals)"
    " -> Tensor[]",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

chunked_rows = torch.ops.graphopt.chunked_rows.default


def casting(tensors: Tensors, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """The autocast region that a call was made in; backward runs outside of it."""
    return nullcontext() if dtype is None else torch.autocast(tensors[0].device.type, dtype)


def _loop(operands: Operands[Tensor], settings: Settings) -> Loop:
    body, chunk_bytes, differentiable, autocast, threshold, by_inductor = settings
    check(operands, read(body), chunk_bytes, len(differentiable), threshold)
    pieces = None
    if by_inductor and not may_name_classes(operands):
        pieces = compiled_pieces(body, len(operands.hidden))
    return Loop(read(body), operands, chunk_bytes, autocast, threshold, pieces)


def _run(
    hidden: Tensors,
    weight: Tensors,
    rows: Tensors,
    whole: Tensors,
    body: str,
    chunk_bytes: int,
    differentiable: list[bool],
    autocast: torch.dtype | None = None,
    filter_threshold: float = 0.0,
    compiled: bool = False,
) -> list[Tensor]:
    operands = Operands(hidden, weight, rows, whole)
    loop = _loop(
        operands, (body, chunk_bytes, differentiable, autocast, filter_threshold, compiled)
    )
    with torch.no_grad(), casting(hidden, autocast):
        found = evaluated(loop.body, operands, autocast, filter_threshold)
        return loop.run() if found is None else found


def _run_with_gradients(
    tensors: Tensors,
    counts: Sequence[int],
    body: str,
    chunk_bytes: int,
    differentiable: list[bool],
    autocast: torch.dtype | None = None,
    filter_threshold: float = 0.0,
    compiled: bool = False,
    *,
    wanted: Sequence[bool],
) -> list[Tensor]:
    loop = _loop(
        grouped(tensors, counts),
        (body, chunk_bytes, differentiable, autocast, filter_threshold, compiled),
    )
    with torch.no_grad(), casting(tensors, autocast):
        return loop.run_with_gradients(wanted, differentiable)


def _backward(
    tensors: Tensors,
    counts: Sequence[int],
    body: str,
    chunk_bytes: int,
    differentiable: list[bool],
    autocast: torch.dtype | None = None,
    filter_threshold: float = 0.0,
    compiled: bool = False,
    *,
    wanted: Sequence[bool],
    cotangents: Tensors,
    totals: Tensors,
) -> list[Tensor]:
    loop = _loop(
        grouped(tensors, counts),
        (body, chunk_bytes, differentiable, autocast, filter_threshold, compiled),
    )
    with torch.no_grad(), casting(tensors, autocast):
        return loop.gradients(wanted, differentiable, Cotangents(cotangents, totals))


def _fake(
    hidden: Tensors,
    weight: Tensors,
    rows: Tensors,
    whole: Tensors,
    body: str,
    chunk_bytes: int,
    differentiable: list[bool],
    autocast: torch.dtype | None = None,
    filter_threshold: float = 0.0,
    compiled: bool = False,  # noqa: ARG001 - results are the same
) -> list[Tensor]:
    """Shapes and dtypes from a few rows: nothing about their real number is asked.

    Under autograd's keys, as where a program is captured: below them torch reads the arguments of
    ``nll_loss`` on symbolic sizes as those of its namesake in `torch.nn.functional`.
    """
    operands = Operands(hidden, weight, rows, whole)
    check(operands, read(body), chunk_bytes, len(differentiable), filter_threshold)
    short = cast(few(operands), autocast)
    with recording(), torch.no_grad(), casting(hidden, autocast):
        per_row, sums, matrices = read(body)([*products(short), *short.rows, *whole])
    count = hidden[0].shape[0] * operands.groups
    made = [t.new_empty((count, *t.shape[1:])) for t in per_row]
    return [*made, *(t.new_empty(()) for t in sums), *map(none_added, matrices)]


def _fake_backward(tensors: Tensors, *_: Any, wanted: Sequence[bool], **__: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t, asked in zip(tensors, wanted, strict=True) if asked]


def _fake_with_gradients(
    tensors: Tensors, counts: Sequence[int], *settings: Any, wanted: Sequence[bool]
) -> list[Tensor]:
    operands = grouped(tensors, counts)
    results = _fake(operands.hidden, operands.weight, operands.rows, operands.whole, *settings)
    return [*results, *_fake_backward(tensors, wanted=wanted)]


for _name, _real, _meta in (
    ("chunked_rows", _run, _fake),
    ("chunked_rows_with_gradients", _run_with_gradients, _fake_with_gradients),
    ("chunked_rows_backward", _backward, _fake_backward),
):
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _real, _key)
    torch.library.register_fake(f"graphopt::{_name}", _meta, lib=library)
