"""Fast paths hold to the definition, and are used only where they are right."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from graphopt.kernels.quantized import (
    PATHS,
    Scheme,
    choice,
    choose_layout,
    chosen,
    int4pack,
    integers,
    is_exact,
    linear,
    quantize,
    using,
)
from graphopt.kernels.quantized.autograd import quantized_linear
from graphopt.kernels.quantized.paths import Case, paths_for

FOUR = Scheme(4, group_size=32)


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_chosen", {})


def packed_linear(
    x: Tensor, tensors: dict[str, Tensor], bias: Tensor | None, scheme: Scheme
) -> Tensor:
    codes, scales = tensors["codes"], tensors["scales"]
    fields = (scheme.bits, scheme.dtype, scheme.group_size, scheme.symmetric)
    return quantized_linear(x, codes, scales, None, None, bias, *fields, "none", "int4pack")


def off(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.detach()
    return float((found.detach().double() - wanted).norm() / wanted.norm())


def test_paths_are_exact_on_this_machine_or_say_so() -> None:
    assert is_exact("float64")
    assert isinstance(is_exact("int_mm"), bool)


@pytest.mark.parametrize("pair", ["saturates", "wraps", "float32", "off by one"])
def test_a_path_that_is_wrong_is_found_out(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(left: Tensor, right: Tensor) -> Tensor:
        products = left[:, None].int() * right[None].int()
        if pair == "saturates" and left.shape[1] % 2 == 0:  # as vpmaddubsw adds pairs in 16 bits
            halves = products.unflatten(-1, (-1, 2)).sum(-1)
            return halves.clamp(-(2**15), 2**15 - 1).sum(-1).int()
        if pair == "wraps":
            return products.sum(-1).to(torch.int16).int()
        if pair == "float32":
            return products.float().cumsum(-1)[..., -1].to(torch.float16).int()
        exact = products.sum(-1).int()
        return exact + (left.shape[0] == 33) if pair == "off by one" else exact

    integers.is_exact.cache_clear()
    monkeypatch.setitem(integers.PATHS, "int_mm", wrong)
    try:
        assert not is_exact("int_mm")
        left, right = (torch.full((3, 64), -128, dtype=torch.int8) for _ in range(2))
        assert (integers.product(left, right) == 64 * 2**14).all()
    finally:
        integers.is_exact.cache_clear()


@pytest.mark.parametrize("width", [1, 2, 3, 17, 64])
@pytest.mark.parametrize("cut", [False, True])
def test_products_of_narrow_matrices_are_exact(width: int, cut: bool) -> None:
    for rows, columns in ((1, 1), (1, 5), (3, 2), (33, 16)):
        wide = torch.randint(-128, 128, (rows + columns, 3 * width), dtype=torch.int8)
        part = wide[:, width : 2 * width] if cut else wide[:, :width].contiguous()
        left, right = part[:rows], part[rows:]
        assert torch.equal(integers.product(left, right), left.int() @ right.int().t())


@pytest.mark.parametrize("rows", [0, 1, 5, 33])
@pytest.mark.parametrize("with_bias", [True, False])
def test_int8pack_holds_to_the_definition(rows: int, with_bias: bool) -> None:
    weight = quantize(torch.randn(48, 96), Scheme())
    x = torch.randn(rows, 96).bfloat16()
    bias = torch.randn(48).bfloat16() if with_bias else None
    dense = x.double() @ weight.dequantize(torch.float64).t() + (0 if bias is None else bias)
    with using("int8pack"):
        found = linear(x, weight, bias)
    assert found.shape == (rows, 48) and found.dtype == torch.bfloat16
    assert rows == 0 or off(found, dense) < 6e-3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("outputs", [16, 48, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_int4pack_holds_to_the_definition(
    symmetric: bool, outputs: int, dtype: torch.dtype
) -> None:
    scheme = Scheme(4, group_size=32, symmetric=symmetric)
    weight = quantize(torch.randn(outputs, 96), scheme)
    tensors = int4pack.prepare(weight)
    assert sum(t.nbytes for t in tensors.values()) <= weight.nbytes * (1 if not symmetric else 1.2)
    x = torch.randn(3, 5, 96).to(dtype).requires_grad_()
    bias = torch.randn(outputs).to(dtype)
    found = packed_linear(x, tensors, bias, scheme)
    dense = x.double() @ weight.dequantize(torch.float64).t() + bias.double()
    assert found.dtype == dtype and off(found, dense) < 8e-3
    (slope,) = torch.autograd.grad(found.sum(), x)
    wanted = weight.dequantize(torch.float64).sum(0).expand(3, 5, 96)
    assert off(slope, wanted) < 1e-2


def test_int4pack_prepares_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize(torch.randn(208, 64), FOUR)
    whole = int4pack.prepare(weight)
    monkeypatch.setattr(int4pack, "_AT_ONCE", 64 * 64)
    assert torch.equal(int4pack.prepare(weight)["codes"], whole["codes"])


@pytest.mark.parametrize(
    ("scheme", "outputs", "says"),
    [
        (Scheme(8, group_size=32), 32, "int of 4 bits"),
        (Scheme(4, "nf4", 32), 32, "int of 4 bits"),
        (Scheme(4, group_size=16), 32, "groups of 32, 64"),
        (Scheme(4), 32, "groups of 32, 64"),
        (FOUR, 24, "multiple of 16 output channels, not 24"),
    ],
)
def test_weights_that_int4pack_has_not_are_refused(scheme: Scheme, outputs: int, says: str) -> None:
    weight = quantize(torch.randn(outputs, 64), scheme)
    with pytest.raises(ValueError, match=says):
        int4pack.prepare(weight)
    with pytest.raises(ValueError, match=says):
        packed_linear(torch.randn(2, 64), weight.tensors, None, scheme)


def test_plain_tensors_are_not_taken_for_packed_ones() -> None:
    weight = quantize(torch.randn(32, 64), FOUR)
    with pytest.raises(ValueError, match=r"int4pack\.prepare"):
        packed_linear(torch.randn(2, 64), weight.tensors, None, FOUR)


def test_a_case_has_one_definition_and_others_only_where_they_take_it() -> None:
    def names(
        scheme: Scheme, activations: str, dtype: torch.dtype, layout: str = "plain"
    ) -> list[str]:
        case = Case(scheme, layout, activations, dtype, "cpu", 32, 64)
        return [path.name for path in paths_for(case)]

    eight = Scheme()
    assert names(eight, "none", torch.bfloat16) == ["definition", "int8pack"]
    for near_miss in (Scheme(8, group_size=32), Scheme(8, symmetric=False), Scheme(8, "fp8")):
        assert names(near_miss, "none", torch.bfloat16) == ["definition"]
    assert names(eight, "none", torch.float32) == ["definition"]
    assert names(eight, "none", torch.float16) == ["definition"]
    assert names(eight, "dynamic", torch.bfloat16) == ["dynamic"]
    assert names(FOUR, "none", torch.bfloat16, "int4pack") == ["int4pack"]
    assert names(FOUR, "none", torch.float32, "int4pack") == ["unpacked"]
    assert {path.layout for path in PATHS} == {"plain", "int4pack"}


def test_what_is_faster_is_chosen_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = quantize(torch.randn(32, 64), Scheme()), torch.randn(5, 64).bfloat16()
    rounds: list[int] = []
    for times, wanted in (([2.0, 1.0], "int8pack"), ([1.0, 2.0], "definition")):
        monkeypatch.setattr(choice, "_chosen", {})
        monkeypatch.setattr(choice, "quartiles", lambda runs, t=times: rounds.append(1) or t)
        linear(x, weight)
        linear(x[:0], weight)
        linear(torch.randn(8, 64).bfloat16(), weight)
        assert list(chosen().values()) == [wanted]
    assert len(rounds) == 2
    linear(torch.randn(9, 64).bfloat16(), weight)
    assert len(rounds) == 3


def test_quartiles_are_of_runs_in_turn() -> None:
    seen: list[str] = []
    times = choice.quartiles([lambda: seen.append("a"), lambda: seen.append("b")])
    assert len(times) == 2 and all(t >= 0 for t in times)
    assert all(one != other for one, other in pairwise(seen))


def test_a_layout_is_chosen_without_touching_random_numbers() -> None:
    state = torch.get_rng_state()
    assert choose_layout(FOUR, 32, 64, torch.bfloat16, 4) in ("plain", "int4pack")
    assert choose_layout(FOUR, 24, 64, torch.bfloat16, 4) == "plain"
    assert choose_layout(FOUR, 32, 64, torch.float32, 4) == "plain"
    assert torch.equal(torch.get_rng_state(), state)


def test_import_stays_light() -> None:
    code = (
        "import sys, graphopt; assert 'graphopt.kernels' not in sys.modules;"
        "import graphopt.kernels.quantized; assert 'triton' not in sys.modules;"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
