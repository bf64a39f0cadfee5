"""Schemes that go together, packing, and what stored tensors stand for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from quantized_cases import SCHEMES, WIDTH, bits_of, name, numbers

from graphopt.kernels.quantized import QuantizedWeight, Scheme, quantize
from graphopt.kernels.quantized.packing import pack, row_chunks, unpack
from graphopt.kernels.quantized.rounding import encoded
from graphopt.kernels.quantized.tables import E2M1, nearest, nf4, table

PUBLISHED_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""Dettmers et al. 2023, appendix E."""


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"dtype": "int4"}, "not one of int, nf4"),
        ({"bits": 5}, "int has 2, 3, 4, 6, 8 bits, not 5"),
        ({"dtype": "nf4"}, "nf4 has 4 bits, not 8"),
        ({"bits": 4, "dtype": "nf4", "symmetric": False}, "no zero points"),
        ({"dtype": "fp8", "group_size": 32}, "scale per output channel"),
        ({"bits": 4, "dtype": "mxfp4", "group_size": 16}, "groups of 32, not 16"),
        ({"group_size": 0}, "positive"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Scheme(**fields)


def test_a_format_has_its_own_group() -> None:
    assert Scheme(4, "mxfp4").group_size == 32
    assert Scheme(4, "nvfp4") == Scheme(4, "nvfp4", 16)


@pytest.mark.parametrize(
    ("scheme", "width", "says"),
    [
        (Scheme(4, group_size=128), 576, "does not divide K = 576.* 96 and 144"),
        (Scheme(4, group_size=64), 7, "nearest that do are 7;"),
        (Scheme(4, group_size=4), 7, "are 1 and 7"),
        (Scheme(4, "mxfp4"), 48, "another dtype"),
        (Scheme(), 0, "nothing to quantize"),
    ],
)
def test_groups_that_do_not_divide_name_those_that_do(
    scheme: Scheme, width: int, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        scheme.groups(width)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 7, 8, 9, 31, 64])
def test_packed_codes_lie_little_endian_and_come_back(bits: int, width: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, width), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, (width * bits + 7) // 8)
    assert bits_of(packed, bits, width) == codes.tolist()
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_what_a_last_byte_has_left_is_zero(bits: int) -> None:
    packed = pack(torch.full((1, 5), (1 << bits) - 1, dtype=torch.uint8), bits)
    assert int.from_bytes(bytes(packed[0].tolist()), "little") == (1 << 5 * bits) - 1


def test_packing_goes_by_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [(s.start, s.stop) for s in row_chunks(5, 10, 25)] == [(0, 2), (2, 4), (4, 5)]
    assert len(list(row_chunks(3, 1000, 10))) == 3
    assert not list(row_chunks(0, 8))
    codes = torch.randint(0, 8, (50, 11), dtype=torch.uint8)
    whole = pack(codes, 3)
    monkeypatch.setattr("graphopt.kernels.quantized.packing.row_chunks.__defaults__", (64,))
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 11), codes)


def test_nf4_is_the_published_table() -> None:
    assert torch.allclose(nf4(), torch.tensor(PUBLISHED_NF4).double(), atol=2e-7, rtol=0)
    assert nf4()[7] == 0


@pytest.mark.parametrize("dtype", ["nf4", "fp4"])
def test_nearest_is_nearest(dtype: str) -> None:
    values = torch.cat((torch.linspace(-7.3, 7.1, 4001), table(dtype), torch.randn(500)))
    values = values / 6 if dtype == "nf4" else values
    numbers = table(dtype)
    taken = (numbers[nearest(values, dtype).long()] - values).abs()
    least = (numbers[None] - values[:, None]).abs().amin(1)
    assert torch.equal(taken, least)


def test_ties_of_e2m1_go_to_the_even_code() -> None:
    ties = torch.tensor([(a + b) / 2 for a, b in pairwise(E2M1)])
    assert nearest(ties, "fp4").tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert nearest(-ties, "fp4").tolist() == [0, 10, 10, 12, 12, 14, 14]


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_stored_tensors_stand_for_what_the_scheme_says(scheme: Scheme) -> None:
    weight = quantize(torch.randn(5, WIDTH), scheme)
    wanted = numbers(weight)
    assert torch.allclose(weight.dequantize(torch.float64), wanted, rtol=1e-12, atol=0)
    assert torch.allclose(weight.dequantize(), wanted.float(), rtol=2e-6, atol=1e-6)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(weight.dequantize(dtype), weight.dequantize().to(dtype))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_codes_survive_packing(scheme: Scheme) -> None:
    weight = quantize(torch.randn(5, WIDTH), scheme)
    again = QuantizedWeight.from_codes(
        weight.unpacked(), weight.scales, weight.zeros, scheme, weight.tensor_scale
    )
    assert torch.equal(again.codes.view(torch.uint8), weight.codes.view(torch.uint8))
    assert again.nbytes == weight.nbytes == sum(t.nbytes for t in weight.tensors.values())


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_numbers_have_the_codes_that_they_are_read_from(scheme: Scheme) -> None:
    weight = quantize(torch.randn(5, WIDTH), scheme)
    parts = weight.scales, weight.zeros, scheme, weight.tensor_scale
    again = encoded(weight.dequantize(torch.float64), *parts)
    assert torch.equal(again.dequantize(), weight.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("width", [1, 5, 7, 13])
def test_odd_widths(bits: int, width: int) -> None:
    for symmetric in (True, False):
        weight = quantize(torch.randn(3, width), Scheme(bits, symmetric=symmetric))
        assert weight.dequantize().shape == (3, width)
        assert torch.allclose(weight.dequantize(torch.float64), numbers(weight), rtol=1e-12)


def test_sizes() -> None:
    weight = torch.randn(64, 128)
    assert quantize(weight, Scheme(4, group_size=32)).nbytes == 64 * (64 + 4 * 2)
    assert quantize(weight, Scheme(3, group_size=64, symmetric=False)).nbytes == 64 * (48 + 2 * 4)
    assert quantize(weight, Scheme()).nbytes == 64 * (128 + 4)
    assert quantize(weight, Scheme(4, "mxfp4")).nbytes == 64 * (64 + 4)
    assert quantize(weight, Scheme(4, "nvfp4")).nbytes == 64 * (64 + 8) + 4


def test_tensors_that_are_not_of_the_scheme_are_refused() -> None:
    good = quantize(torch.randn(4, WIDTH), Scheme(4, group_size=32, symmetric=False))
    parts = {"scheme": good.scheme, "width": good.width, **good.tensors}
    for part, says in (
        ({"codes": good.codes.view(torch.int8)}, "codes are torch.int8"),
        ({"codes": good.codes[:, 1:]}, r"codes are .*\(4, 47\)"),
        ({"scales": good.scales[:, :2]}, r"scales are .*\(4, 2\)"),
        ({"zeros": None}, "symmetric=False"),
        ({"zeros": good.zeros.float()}, "zeros are torch.float32"),
        ({"scheme": Scheme(4, group_size=32)}, "symmetric=False"),
        ({"tensor_scale": torch.ones(())}, "nvfp4"),
        ({"width": 64}, "codes are"),
    ):
        with pytest.raises(ValueError, match=says):
            QuantizedWeight(**{**parts, **part})


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_rows_are_selected(scheme: Scheme) -> None:
    weight = quantize(torch.randn(6, WIDTH), scheme)
    rows = torch.tensor([4, 0, 4])
    assert torch.equal(weight.select(rows).dequantize(), weight.dequantize()[rows])
    assert torch.equal(weight.select(slice(2, 5)).dequantize(), weight.dequantize()[2:5])
