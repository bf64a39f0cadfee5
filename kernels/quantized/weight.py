"""A quantized weight: the tensors that are stored, and the numbers that they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized.packing import row_chunks
from graphopt.kernels.quantized.scheme import Scheme

_SCALES = {"mxfp4": (torch.uint8,), "nvfp4": (torch.float8_e4m3fn,)}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

OPERANDS = ("codes", "scales", "zeros", "tensor_scale")
"""The tensors of a weight, in the order in which the operators take them."""


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A weight ``(N, K)`` in G groups along K.

    Attributes:
        scheme: how the tensors are read.
        width: K, which packed codes do not tell.
        codes: uint8 ``(N, ceil(K * bits / 8))``, packed along K (see `packing`); codes of 8 bits
            are ``(N, K)``: int8, or float8_e4m3fn for ``fp8``. Integers are signed; packed ones are
            stored plus ``2 ** (bits - 1)``.
        scales: ``(N, G)``; float16 or float32 (see `scales`), uint8 exponents for ``mxfp4``,
            float8_e4m3fn for ``nvfp4``. They may be negative.
        zeros: ``(N, G)`` in the dtype of scales, for schemes that are not symmetric: a number is
            ``(code - zero) * scale`` with a signed code. They need not be integers: rounded to
            integers they cost 7 to 9 % more error at 2 bits and 2 % at 4 bits, in groups of 64
            after a search, on Gaussian numbers.
        tensor_scale: the float32 ``()`` that scales of ``nvfp4`` are relative to.

    Raises:
        ValueError: shapes or dtypes are not those of the scheme.
    """

    scheme: Scheme
    width: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def from_codes(
        cls,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        scheme: Scheme,
        tensor_scale: Tensor | None = None,
    ) -> QuantizedWeight:
        """From codes ``(N, K)`` that are not packed, see `codes`; the rest is as it is stored."""
        stored = coding.store(codes, scheme)
        return cls(scheme, codes.shape[1], stored, scales, zeros, tensor_scale)

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        return self.codes.shape[0], self.width

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """The tensors as the operators take them."""
        return self.codes, self.scales, self.zeros, self.tensor_scale

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the names that the operators have for it."""
        named = zip(OPERANDS, self.operands, strict=True)
        return {name: tensor for name, tensor in named if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def unpacked(self) -> Tensor:
        """The codes ``(N, K)``: int8, uint8 that count into a table, or float8_e4m3fn."""
        return coding.load(self.codes, self.scheme, self.width)

    def select(self, rows: Tensor | slice) -> QuantizedWeight:
        """Some rows, by a slice or by their numbers ``(n,)``."""
        zeros = None if self.zeros is None else _rows(self.zeros, rows)
        return QuantizedWeight(
            self.scheme,
            self.width,
            _rows(self.codes, rows),
            _rows(self.scales, rows),
            zeros,
            self.tensor_scale,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers ``(N, K)``, computed in float32 or float64 and then rounded to ``dtype``."""
        made = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        for chunk in row_chunks(*self.shape):
            made[chunk] = _numbers(self.select(chunk), dtype)
        return made


def _rows(tensor: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows by number are read as bytes where they are float8, which not every device selects."""
    if isinstance(rows, slice):
        return tensor[rows]
    if tensor.dtype != torch.float8_e4m3fn:
        return tensor.index_select(0, rows)
    return tensor.view(torch.uint8).index_select(0, rows).view(torch.float8_e4m3fn)


def _numbers(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """As `QuantizedWeight.dequantize`, all rows at once."""
    scheme, wide = weight.scheme, torch.promote_types(dtype, torch.float32)
    groups = weight.unpacked().unflatten(1, (weight.scales.shape[1], -1))
    scales = scaling.load(weight.scales, scheme, weight.tensor_scale, wide)[..., None]
    zeros = None if weight.zeros is None else weight.zeros.to(wide)[..., None]
    return coding.decode(groups, scales, zeros, scheme).flatten(1)


def stored_dtype(scheme: Scheme) -> torch.dtype:
    """Of stored codes."""
    if scheme.packed:
        return torch.uint8
    return torch.float8_e4m3fn if scheme.dtype == "fp8" else torch.int8


def check(weight: QuantizedWeight) -> None:
    """Shapes and dtypes, without reading a number."""
    scheme, codes, scales, zeros = weight.scheme, weight.codes, weight.scales, weight.zeros
    groups = scheme.groups(weight.width)
    stored = (codes.shape[0], scheme.row_codes(weight.width))
    _expect("codes", codes, stored, (stored_dtype(scheme),))
    _expect("scales", scales, (codes.shape[0], groups), _SCALES.get(scheme.dtype, _FLOATS))
    if (zeros is None) != scheme.symmetric:
        raise ValueError("zeros go with symmetric=False, and only with it")
    if zeros is not None:
        _expect("zeros", zeros, tuple(scales.shape), (scales.dtype,))
    if (weight.tensor_scale is None) != (scheme.dtype != "nvfp4"):
        raise ValueError("tensor_scale goes with nvfp4, and only with it")
    if weight.tensor_scale is not None:
        _expect("tensor_scale", weight.tensor_scale, (), (torch.float32,))


def _expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], kinds: tuple[torch.dtype, ...]
) -> None:
    if tensor.shape != shape or tensor.dtype not in kinds:
        raise ValueError(
            f"{name} are {tensor.dtype} {tuple(tensor.shape)}; the scheme has "
            f"{' or '.join(map(str, kinds))} {shape}"
        )
