"""Tile sizes to choose from; under Triton's interpreter one small choice.

The choice is made once for each size of weight, dtype and number of rows (rounded up to a power of
two), on the first call, which takes seconds longer; choices that do not fit into a GPU's shared
memory are passed over. Not yet tuned on a GPU: the sizes are those whose machine code for Hopper
keeps everything in registers and takes the fewest instructions for a code.
"""

from __future__ import annotations

import os
from typing import Any

import triton

Config = Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FEW = 16
"""Rows of a decoding step: those that one tile of the smallest tensor instruction has."""


def tile(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    sizes = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


WEIGHT_ONLY = [
    tile(16, 32, 128, 4, 5),
    tile(16, 64, 128, 4, 4),
    tile(16, 128, 128, 4, 3),
    tile(16, 32, 64, 4, 5),
    tile(16, 64, 64, 4, 5),
    tile(16, 128, 64, 4, 4),
    tile(32, 128, 64, 4, 4),
    tile(64, 64, 64, 4, 4),
    tile(64, 128, 64, 4, 3),
    tile(128, 128, 64, 8, 3),
    tile(128, 256, 64, 8, 3),
]
FULL = [tile(16, 32, 32, 4, 2), tile(64, 64, 32, 8, 2)]
"""Of float32, products of which are not made by tensor instructions."""
DYNAMIC = [
    tile(16, 32, 128, 4, 5),
    tile(16, 64, 128, 4, 4),
    tile(16, 32, 256, 4, 4),
    tile(16, 64, 64, 4, 5),
    tile(64, 32, 128, 4, 5),
    tile(64, 64, 128, 4, 4),
    tile(64, 128, 64, 4, 4),
    tile(128, 128, 128, 4, 3),
    tile(128, 128, 128, 8, 4),
    tile(128, 256, 64, 8, 4),
    tile(128, 256, 128, 8, 3),
    tile(64, 128, 32, 4, 4),
]
if INTERPRETED:
    WEIGHT_ONLY = FULL = [tile(16, 32, 64, 4, 1)]
    DYNAMIC = [tile(16, 32, 32, 4, 1)]


def fitting(found: list[Config], named: dict[str, Any], **others: Any) -> list[Config]:
    """Weight-only: tiles for the rows there are; steps no longer than a group, if it is long."""
    if others["KIND"] == "fp32":
        found = FULL
    group = others["GROUP"]
    short = [c for c in found if group < 64 or group % c.kwargs["BLOCK_K"] == 0]
    return _for_rows(short or found, named["bucket"])


def fitting_groups(found: list[Config], named: dict[str, Any], **others: Any) -> list[Config]:
    """Dynamic: steps lie in one group. Products of E4M3 on Hopper are of 64 rows at least."""
    group = others["GROUP"]
    fit = [c for c in found if group % c.kwargs["BLOCK_K"] == 0]
    rows = max(named["bucket"], 64) if others["FORMAT"] == "fp8" else named["bucket"]
    return _for_rows(fit, rows)


def _for_rows(found: list[Config], rows: int) -> list[Config]:
    """Tiles of 16 rows for as many, of up to 64 for more, of 64 and more for more than 64."""
    low, high = (0, 16) if rows <= FEW else (17, 64) if rows <= 64 else (64, 1 << 30)
    fit = [c for c in found if low <= c.kwargs["BLOCK_M"] <= high]
    return fit or found
