"""Products of int8 matrices, exact in int32, by whatever is fast and right on this machine.

Without the instructions that add products of 8 bits in 32 (VNNI, AMX), some libraries add pairs of
them in 16, which saturates from 2 * 128 * 128 on. So a fast path is tried on the numbers that would
show it, once in a process, before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

MOST = 127 * 128
"""The largest magnitude of a product: activations are within 127, weights within 128."""
LONGEST = (2**31 - 1) // MOST
"""The largest K whose sums of products all fit int32: 132,104."""


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left (M, K) @ right (N, K).T``, int8, as int32 ``(M, N)``; K is at most `LONGEST`."""
    fast = "int_mm"
    if _int_mm_takes(left, right) and is_exact(fast, left.device.type):
        return PATHS[fast](left, right)
    return PATHS["float64"](left, right)


def _by_int_mm(left: Tensor, right: Tensor) -> Tensor:
    return torch._int_mm(left, right.t())


def _by_float64(left: Tensor, right: Tensor) -> Tensor:
    """Sums below 2**53 are exact in float64, in any order."""
    return (left.to(torch.float64) @ right.t().to(torch.float64)).to(torch.int32)


PATHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "int_mm": _by_int_mm,
    "float64": _by_float64,
}


def _int_mm_takes(left: Tensor, right: Tensor) -> bool:
    """On a GPU it wants more than 16 rows, and multiples of 8.

    For K = 1, whose transpose has strides that say nothing, torch 2.13 on the CPU reads beyond it.
    """
    if not left.is_cuda:
        return left.shape[1] > 1
    return left.shape[0] > 16 and left.shape[1] % 8 == 0 and right.shape[0] % 8 == 0


@cache
def is_exact(path: str, device: str = "cpu") -> bool:
    """Whether a path of `PATHS` gives what integers give, on numbers that saturate what can.

    It is tried once in a process: all 127, all -128, both in turn, and random ones, for one row and
    for several, on sizes that fill registers and sizes that do not, on the columns of a group too.
    """
    sizes = [(1, 256, 32), (4, 96, 40), (17, 128, 72), (40, 128, 64)]
    if device == "cpu":
        sizes += [(1, 63, 17), (33, 131, 9), (2, 2, 1), (1, 3, 5)]
    else:
        sizes = [size for size in sizes if size[0] > 16]
    return all(_agrees(PATHS[path], size, device) for size in sizes)


def _agrees(path: Callable[[Tensor, Tensor], Tensor], size: tuple[int, ...], device: str) -> bool:
    rows, width, columns = size
    lefts, rights = _adversaries(rows, width), _adversaries(columns, width)
    pairs = [*zip(lefts, rights, strict=True), (lefts[0], rights[1]), (lefts[2], rights[0])]
    for left, right in pairs:
        wanted = left.to(torch.int64) @ right.to(torch.int64).t()
        for wide in (False, True):
            found = path(_laid(left, wide, device), _laid(right, wide, device)).cpu()
            if not torch.equal(found.to(torch.int64), wanted):
                return False
    return True


def _laid(matrix: Tensor, wide: bool, device: str) -> Tensor:
    """The matrix by itself, or as columns of a wider one."""
    if not wide:
        return matrix.to(device)
    columns = matrix.shape[1]
    return torch.cat((matrix, matrix, matrix), 1).to(device)[:, columns : 2 * columns]


def _adversaries(rows: int, width: int) -> list[Tensor]:
    generator = torch.Generator("cpu").manual_seed(rows)
    shape = (rows, width)
    most, least = (
        torch.full(shape, value, dtype=torch.int8, device="cpu") for value in (127, -128)
    )
    turns = most.clone()
    turns[:, 1::2] = -128
    noise = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8, device="cpu")
    return [most, least, turns, noise]
