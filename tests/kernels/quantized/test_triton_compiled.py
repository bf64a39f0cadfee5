"""What the interpreter does not see: kernels compile for GPUs, to the instructions they should."""

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

from graphopt.kernels.quantized import triton_configs as configs
from graphopt.kernels.quantized import triton_dynamic, triton_scales, triton_weight_only

SHARED_MEMORY = {80: 163 * 2**10, 89: 99 * 2**10, 90: 227 * 2**10}
"""Of a block, in bytes, by compute capability."""
ALIKE = {"table": "*fp32", "outer": "*fp32", "parts": "*fp32", "q_scales": "*fp32", "rows": "*i64"}
ALIKE |= {"products": "*i32"}


def compiled(kernel: Any, types: dict[str, str], capability: int = 90, **fixed: Any) -> Any:
    """A kernel whose pointers and sizes are multiples of 16; what is not named is a size."""
    warps, stages = fixed.pop("warps", 4), fixed.pop("stages", 3)
    known = ALIKE | types
    named = {n: "constexpr" if n in fixed else known.get(n, "i32") for n in kernel.arg_names}
    places = {(kernel.arg_names.index(n),): v for n, v in fixed.items()}
    even = [i for i, n in enumerate(kernel.arg_names) if named[n] != "constexpr"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in even}
    source = ASTSource(fn=kernel, signature=named, constexprs=places, attrs=attributes)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert made.metadata.shared <= SHARED_MEMORY[capability]
    return made


def weight_only(
    bits: int, form: str, group: int, kind: str, config: Any, capability: int = 90, **named: Any
) -> str:
    scale = {"mxfp4": "u8", "nvfp4": "fp8e4nv"}.get(form, "fp16" if group else "fp32")
    types = dict.fromkeys(("x", "bias", "out"), f"*{kind}")
    types |= {"codes": "*i32", "scales": f"*{scale}", "zeros": f"*{scale}"}
    unused = {"zeros": None, "outer": None, "table": None, "bias": None} | named
    for name, users in (("outer", "nvfp4"), ("table", "nf4")):
        if form == users:
            unused.pop(name)
    constants = {"BITS": bits, "FORMAT": form, "KIND": kind, "GROUP": group, "PRECISION": "ieee"}
    kernel = triton_weight_only.weight_only.fn
    made = compiled(kernel, types, capability, **constants, **unused, **sizes(config))
    return str(made.asm["ptx"])


def dynamic(bits: int, form: str, group: int, config: Any, capability: int = 90) -> str:
    code = "*fp8e4nv" if form == "fp8" else "*i8"
    types = {"q": code, "codes": code if bits == 8 else "*i32", "out": "*bf16", "scales": "*fp32"}
    constants = {"BITS": bits, "FORMAT": form, "GROUP": group, "zeros": None, "bias": None}
    made = compiled(triton_dynamic.dynamic.fn, types, capability, **constants, **sizes(config))
    return str(made.asm["ptx"])


def sizes(config: Any) -> dict[str, Any]:
    return {**config.kwargs, "warps": config.num_warps, "stages": config.num_stages}


def rows_of(config: Any) -> int:
    return int(config.kwargs["BLOCK_M"])


@pytest.mark.parametrize("config", configs.WEIGHT_ONLY, ids=str)
def test_weight_only_on_hopper(config: Any) -> None:
    text = weight_only(4, "int", 128, "bf16", config)
    assert ("wgmma" in text) == (rows_of(config) >= 64)
    assert "cp.async" in text
    if rows_of(config) < 128:  # where codes become numbers as fast as they are read, or it is slow
        assert "add.bf16x2" in text


@pytest.mark.parametrize(
    ("bits", "form", "group"),
    [
        *((2, "int", 64), (3, "int", 64), (3, "int", 48), (6, "int", 0), (8, "int", 32)),
        *((4, "nf4", 64), (4, "fp4", 0), (8, "fp8", 0), (4, "mxfp4", 32), (4, "nvfp4", 16)),
    ],
)
@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
def test_formats_on_hopper(bits: int, form: str, group: int, kind: str) -> None:
    found = configs.FULL if kind == "fp32" else configs.WEIGHT_ONLY
    weight_only(bits, form, group, kind, found[0])


def test_zeros_and_a_bias() -> None:
    config = configs.WEIGHT_ONLY[4]
    named = dict.fromkeys(("outer", "table"))
    scale = {"scales": "*fp16", "zeros": "*fp16", "codes": "*i32"}
    types = dict.fromkeys(("x", "bias", "out"), "*fp16") | scale
    for group in (0, 48, 64):
        constants = {"BITS": 4, "FORMAT": "int", "KIND": "fp16", "GROUP": group}
        compiled(
            triton_weight_only.weight_only.fn,
            types,
            **constants,
            PRECISION="ieee",
            **named,
            **sizes(config),
        )


@pytest.mark.parametrize("config", configs.DYNAMIC, ids=str)
@pytest.mark.parametrize("form", ["int", "fp8"])
def test_dynamic_on_hopper(form: str, config: Any) -> None:
    text = dynamic(8, form, 0, config)
    assert "cp.async" in text
    if rows_of(config) >= 64:
        assert products(text, "wgmma", "e4m3" if form == "fp8" else "s8")
    else:
        assert products(text, "mma.sync", "f16" if form == "fp8" else "s8")


def products(text: str, instruction: str, kind: str) -> bool:
    return any(instruction in line and kind in line for line in text.splitlines())


def test_e4m3_of_few_rows_is_multiplied_as_such() -> None:
    named = {"GROUP": 0, "FORMAT": "fp8"}
    found = configs.fitting_groups(configs.DYNAMIC, {"bucket": 16}, **named)
    assert {rows_of(config) for config in found} == {64}
    found = configs.fitting_groups(configs.DYNAMIC, {"bucket": 16}, **named | {"FORMAT": "int"})
    assert {rows_of(config) for config in found} == {16}


@pytest.mark.parametrize("group", [0, 16, 32, 48, 64, 96, 128, 4096])
@pytest.mark.parametrize("bucket", [16, 32, 64, 128, 8192])
def test_there_is_a_tile_for_every_group(group: int, bucket: int) -> None:
    named = {"bucket": bucket}
    for kind in ("bf16", "fp32"):
        assert configs.fitting(configs.WEIGHT_ONLY, named, GROUP=group, KIND=kind)
    if group % 32 == 0:
        for form in ("int", "fp8"):
            found = configs.fitting_groups(configs.DYNAMIC, named, GROUP=group, FORMAT=form)
            assert found and all(group % c.kwargs["BLOCK_K"] == 0 for c in found)


@pytest.mark.parametrize("capability", [80, 89])
def test_older_gpus(capability: int) -> None:
    few = configs.WEIGHT_ONLY[3]
    for bits, form, group in ((4, "int", 64), (3, "int", 64), (4, "nf4", 64), (4, "mxfp4", 32)):
        weight_only(bits, form, group, "bf16", few, capability)
    for bits, group in ((8, 0), (4, 64)):
        dynamic(bits, "int", group, configs.DYNAMIC[3], capability)
    if capability == 89:
        dynamic(8, "fp8", 0, configs.DYNAMIC[3], capability)


@pytest.mark.parametrize("width", ["bf16", "fp16", "fp32"])
def test_what_stands_beside(width: str) -> None:
    """Quantized rows, numbers of a weight, sums of spans and scales of int32."""
    data = {"x": f"*{width}", "out": f"*{width}", "bias": f"*{width}"}
    for is_float, code in ((True, "*fp8e4nv"), (False, "*i8")):
        named = {"q": code, "scales": "*fp32"} | data
        compiled(triton_dynamic.quantize_rows, named, FLOAT=is_float, BLOCK=4096)
    stored = {"codes": "*i32", "scales": "*fp16", "zeros": "*fp16"} | data
    for bits, group in ((4, 64), (3, 0)):
        compiled(
            triton_scales.dequantize,
            stored,
            **dict.fromkeys(("outer", "table")),
            BITS=bits,
            FORMAT="int",
            GROUP=group,
            BLOCK_N=16,
            BLOCK_K=256,
        )
    compiled(triton_weight_only.add_spans, data, BLOCK=1024)
    compiled(triton_dynamic.rescale, data | {"scales": "*fp32"}, BLOCK=1024)
