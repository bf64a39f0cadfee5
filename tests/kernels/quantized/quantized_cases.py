"""Schemes, and what they mean, spelled out number by number."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.kernels.quantized import QuantizedWeight, Scheme
from graphopt.kernels.quantized.tables import E2M1, nf4

WIDTH = 96
SCHEMES = [
    Scheme(),
    Scheme(symmetric=False),
    Scheme(8, group_size=32),
    Scheme(6),
    Scheme(4),
    Scheme(4, group_size=32),
    Scheme(4, group_size=32, symmetric=False),
    Scheme(3, group_size=48),
    Scheme(3, symmetric=False),
    Scheme(2, group_size=16, symmetric=False),
    Scheme(4, "nf4", 48),
    Scheme(4, "fp4"),
    Scheme(8, "fp8"),
    Scheme(4, "mxfp4"),
    Scheme(4, "nvfp4"),
]


def name(scheme: Scheme) -> str:
    zeros = "" if scheme.symmetric else "-zeros"
    return f"{scheme.dtype}{scheme.bits}-g{scheme.group_size}{zeros}"


def error(weight: Tensor, made: QuantizedWeight) -> float:
    """Relative, in the Frobenius norm."""
    off = made.dequantize(torch.float64) - weight.double()
    return float(off.norm() / weight.double().norm())


def bits_of(packed: Tensor, bits: int, width: int) -> list[list[int]]:
    """Codes of packed rows, by Python's integers."""
    rows = [int.from_bytes(bytes(row.tolist()), "little") for row in packed]
    return [[row >> bits * k & (1 << bits) - 1 for k in range(width)] for row in rows]


def numbers(weight: QuantizedWeight) -> Tensor:
    """The weight ``(N, K)``, float64, number by number from what is stored."""
    scheme, (rows, width) = weight.scheme, weight.shape
    size = scheme.group_size or width
    table = nf4().tolist() if scheme.dtype == "nf4" else [*E2M1, *(-v for v in E2M1)]
    if scheme.packed:
        codes = bits_of(weight.codes, scheme.bits, width)
    else:
        codes = weight.codes.to(torch.float64).tolist()
    made = torch.empty(rows, width, dtype=torch.float64)
    for n in range(rows):
        for k in range(width):
            scale, zero = scale_of(weight, n, k // size), 0.0
            if weight.zeros is not None:
                zero = float(weight.zeros[n, k // size])
            code = codes[n][k]
            if scheme.dtype not in ("int", "fp8"):
                code = torch.tensor(table[int(code)]).item()  # in float32, as it is stored
            elif scheme.dtype == "int" and scheme.packed:
                code = code - 2 ** (scheme.bits - 1)
            made[n, k] = (code - zero) * scale
    return made


def scale_of(weight: QuantizedWeight, row: int, group: int) -> float:
    stored = float(weight.scales[row, group])
    if weight.scheme.dtype == "mxfp4":
        return 2.0 ** (stored - 127)
    return stored * (1.0 if weight.tensor_scale is None else float(weight.tensor_scale))
