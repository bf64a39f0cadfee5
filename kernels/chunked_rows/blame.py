"""Which row an error is for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.body import Body
from graphopt.kernels.chunked_rows.operands import Operands, part, products


@contextmanager
def naming_row(body: Body, operands: Operands[Tensor], first: int) -> Iterator[None]:
    """Errors that one row is to blame for (a class that does not exist) say which row it is.

    Args:
        operands: of the rows at hand.
        first: the number of the first row of a body.
    """
    try:
        yield
    except (IndexError, RuntimeError) as error:
        row = _blamed(body, operands, error)
        if row is None:
            raise
        kind = IndexError if isinstance(error, IndexError) else RuntimeError
        raise kind(f"row {first + row}: {error}") from error


def _blamed(body: Body, operands: Operands[Tensor], error: Exception) -> int | None:
    """The first row that fails by itself; where all do, only if it is for an index."""
    if isinstance(error, torch.OutOfMemoryError):
        return None
    count = operands.hidden[0].shape[0]
    own = (part(operands, slice(i, i + 1)) for i in range(count))
    failed = [failed for one in own for failed in _failing(body, one)]
    index = isinstance(error, IndexError) or "out of bounds" in str(error)
    return failed.index(True) if True in failed and (index or not all(failed)) else None


def _failing(body: Body, operands: Operands[Tensor]) -> Iterator[bool]:
    """For one row of hidden, whether each of its rows of the body fails."""
    tensors = [*products(operands), *operands.rows]
    for k in range(operands.groups):
        yield _fails(body, [*(t[k : k + 1] for t in tensors), *operands.whole])


def _fails(body: Body, tensors: list[Tensor]) -> bool:
    try:
        body(tensors)
    except (IndexError, RuntimeError):
        return True
    return False
