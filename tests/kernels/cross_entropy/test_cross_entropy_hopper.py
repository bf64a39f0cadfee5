"""What the interpreter does not see: the kernels compile for Hopper, and panels fit its size."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles nothing under the interpreter", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphopt.kernels.cross_entropy import configs, panels, triton_kernels

SHARED_MEMORY = 227 * 2**10
REAL = ("maximum", "total", "own", "summed", "spread", "lse", "entropy", "bar")
REAL += ("d_lse", "d_target", "d_sum", "d_entropy")
WHOLE = {"target": "i64", "order": "i64", "b_rows": "i64", "out_rows": "i64"}
WHOLE |= dict.fromkeys(("best", "kept", "chosen", "numbers"), "i32")
DATA = ("hidden", "weight", "bias", "panel", "a", "b")
OPTIONAL = ("bias", "softcap", "summed", "spread", "best", "order", "entropy", "d_sum", "d_entropy")
OPTIONAL += ("bar", "kept", "b_rows", "out_rows", "chosen", "numbers")
ONES = ("hidden_column", "weight_column", "b_column")


def signature(name: str, dtype: str, added: bool) -> str:
    """The type of an argument, by its name."""
    if name == "softcap":
        return "fp32"
    if name in DATA or (name == "out" and not added):
        return f"*{dtype}"
    if name in REAL or name == "out":
        return "*fp32"
    return f"*{WHOLE[name]}" if name in WHOLE else "i32"


def compiled(tuner: Any, config: Any, dtype: str, lean: bool, **constants: Any) -> Any:
    """A kernel with contiguous features; lean: with nothing that may be left out."""
    kernel = tuner.fn
    chosen = {**config.kwargs, **dict.fromkeys(ONES, 1), "PRECISION": "ieee", "TILE": 0}
    chosen |= constants | (dict.fromkeys(OPTIONAL) if lean else {})
    fixed = {k: v for k, v in chosen.items() if k in kernel.arg_names}
    types = {
        name: "constexpr" if name in fixed else signature(name, dtype, "ADD" in constants)
        for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    even = [i for i, name in enumerate(kernel.arg_names) if types[name] != "constexpr"]
    even = [i for i in even if types[kernel.arg_names[i]] != "fp32"]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=places,
        attrs={(i,): [["tt.divisibility", 16]] for i in even},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def fitting(found: list[Any], key: str, dtype: str) -> list[Any]:
    return [c for c in found if (c.kwargs[key] == 64) == (dtype == "fp32")]


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "full"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kernels_compile(dtype: str, lean: bool) -> None:
    size = configs.tile(4 if dtype == "fp32" else 2)
    square = [c for c in fitting(configs.TILES, "BLOCK_N", dtype) if c.kwargs["BLOCK_V"] == size]
    product = fitting(configs.PRODUCTS, "BLOCK_M", dtype)[0]
    tile = {} if lean else {"TILE": size}
    assert square[0].kwargs["BLOCK_N"] == size
    made = [
        compiled(triton_kernels.sweep, square[0], dtype, lean),
        compiled(triton_kernels.slopes, square[0], dtype, lean, **tile),
        compiled(triton_kernels.assigned, product, dtype, lean, **tile, ADD=False),
        compiled(triton_kernels.added, product, dtype, lean, **tile, ADD=True),
    ]
    assert all(kernel.metadata.shared <= SHARED_MEMORY for kernel in made)
    assert all("wgmma" in kernel.asm["ptx"] for kernel in made) == (dtype == "bf16")


def test_the_largest_choices_fit_into_shared_memory() -> None:
    slopes, products = configs.TILES[1], configs.PRODUCTS[1]
    made = compiled(triton_kernels.slopes, slopes, "bf16", True)
    assert made.metadata.shared <= SHARED_MEMORY
    made = compiled(triton_kernels.assigned, products, "bf16", True, ADD=False)
    assert made.metadata.shared <= SHARED_MEMORY


@pytest.mark.parametrize("rows", [1, 5, 123, 8192, 2**20])
@pytest.mark.parametrize("classes", [1, 123, 50_000, 256_000])
def test_panels_are_narrow_and_fill_whole_tiles(rows: int, classes: int) -> None:
    width = panels.panel_width(rows, 2304, classes, 2)
    assert width % 128 == 0
    assert width < classes + 128
    assert width * rows * 2 <= panels.PANEL_BYTES or width <= 1024


def test_memory_of_a_large_head_stays_below_its_bound() -> None:
    """Two-byte N=8192 D=2304 V=256000: gradients and everything beside them, in bytes."""
    rows, features, classes = 8192, 2304, 256_000
    gradients = 2 * features * (rows + classes)
    total = 4 * rows * features
    panel = 2 * rows * panels.panel_width(rows, features, classes, 2)
    assert 2 * features * classes + total + panel < 1.3e9
    assert gradients + total < 1.3e9
