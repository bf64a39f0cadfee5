"""Tile sizes to choose from, for Hopper; under Triton's interpreter one small choice.

Candidates are few: all fit into 227 KiB of shared memory. The choice is made once for each dtype
and number of features, on the first call, which takes seconds longer.
"""

from __future__ import annotations

import os
from typing import Any

import triton

Config = Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STREAMING_PROCESSORS = 132
"""Of an H100 or H200."""


def _tiles(n: int, v: int, d: int, warps: int, stages: int) -> Config:
    sizes = {"BLOCK_N": n, "BLOCK_V": v, "BLOCK_D": d}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def _product(m: int, c: int, k: int, warps: int, stages: int) -> Config:
    sizes = {"BLOCK_M": m, "BLOCK_C": c, "BLOCK_K": k}
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


TILES = [
    _tiles(128, 256, 64, 8, 3),
    _tiles(128, 256, 64, 8, 4),
    _tiles(128, 128, 64, 8, 4),
    _tiles(128, 128, 64, 4, 3),
    _tiles(64, 64, 32, 4, 3),
    _tiles(64, 128, 32, 8, 3),
]
PRODUCTS = [
    _product(128, 256, 64, 8, 3),
    _product(128, 256, 64, 8, 4),
    _product(128, 128, 64, 8, 4),
    _product(128, 128, 64, 4, 3),
    _product(64, 64, 32, 4, 3),
    _product(64, 128, 32, 8, 3),
]
if INTERPRETED:
    TILES = [_tiles(64, 64, 32, 4, 1)]
    PRODUCTS = [_product(32, 64, 32, 4, 1)]


def tile(element_size: int) -> int:
    """Rows and classes of the tiles that are kept or dropped in filtering."""
    if INTERPRETED:
        return 64
    return 64 if element_size == 4 else 128


def fitting_tiles(found: list[Config], named: dict[str, Any], **others: Any) -> list[Config]:
    """Large tiles for two bytes a number, small ones for four; square ones to filter by."""
    size = {**named, **others}.get("TILE")
    fit = _fitting(found, "BLOCK_N", named["hidden"].element_size())
    return [c for c in fit if not size or c.kwargs["BLOCK_N"] == c.kwargs["BLOCK_V"] == size]


def fitting_products(found: list[Config], named: dict[str, Any], **_: Any) -> list[Config]:
    """As `fitting_tiles`; each of these divides a tile to filter by."""
    return _fitting(found, "BLOCK_M", named["a"].element_size())


def _fitting(found: list[Config], rows: str, element_size: int) -> list[Config]:
    if INTERPRETED:
        return found
    return [c for c in found if (c.kwargs[rows] == 64) == (element_size == 4)]
