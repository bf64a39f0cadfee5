"""The layouts of the compressed-tensors library, which llm-compressor writes and vLLM reads.

A layer ``(N, K)`` in G groups, by the format:

* ``pack-quantized``: ``weight_packed`` int32 ``(N, K * B / 32)``, signed codes plus
  ``2 ** (B - 1)``; ``weight_scale`` ``(N, G)``; where there are zero points, ``weight_zero_point``
  int32 ``(N * B / 32, G)``, packed along N like the codes; ``weight_shape``, N and K.
* ``int-quantized`` (and ``naive-quantized``): ``weight`` int8 ``(N, K)``, ``weight_scale``,
  ``weight_zero_point`` int8 ``(N, G)``.
* both with static activations: ``input_scale`` ``(1,)`` and, where they are not symmetric,
  ``input_zero_point`` int8 ``(1,)``, of codes from -128 to 127.
* ``float-quantized``: ``weight`` float8_e4m3fn ``(N, K)``, ``weight_scale`` ``(N, 1)``.
* ``nvfp4-pack-quantized``: ``weight_packed`` uint8 ``(N, K / 2)``, ``weight_scale`` float8_e4m3fn
  ``(N, K / 16)``, relative to ``1 / weight_global_scale``.
* ``mxfp4-pack-quantized``: ``weight_packed`` as above, ``weight_scale`` uint8 exponents.

One scale for a whole tensor is read as one per output channel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.interchange.bits import pack_words, spaced_words_of, unpack_words, words_of
from graphopt.interchange.gptq import integer_zeros_refusal
from graphopt.interchange.layout import FLOATS, Linear, Shape, Wanted, finished
from graphopt.kernels.quantized import QuantizedWeight, Scheme, Static
from graphopt.kernels.quantized.static import MIDDLE

PACKED, INTEGERS, FLOAT8 = "pack-quantized", "int-quantized", "float-quantized"
NVFP4, MXFP4 = "nvfp4-pack-quantized", "mxfp4-pack-quantized"
FORMATS = (PACKED, INTEGERS, FLOAT8, NVFP4, MXFP4)
_FP8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class CompressedTensors:
    """One layer in a layout of compressed-tensors.

    Attributes:
        format: one of `FORMATS`.
        bits: of a code, 1 to 8; widths that `Scheme` has not are held in the next larger.
        group_size: None is one group per output channel.
        per_tensor: one scale for the whole weight.
        activations: as ``graphopt::quantized_linear`` takes them.
        zero_input: whether static ones have a zero point.
    """

    format: str
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    per_tensor: bool = False
    activations: str = "none"
    zero_input: bool = False

    @property
    def text(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "per channel"
        return f"compressed-tensors {self.format}, {self.bits} bits, {groups}"

    def wanted(self, outputs: int, inputs: int) -> dict[str, Wanted]:
        groups = Scheme(group_size=self.group_size).groups(inputs)
        if self.format in (NVFP4, MXFP4):
            return self._wanted_fp4(outputs, inputs, groups)
        scales: tuple[Shape, ...] = ((outputs, groups),)
        if groups == 1:
            scales = ((), (1,)) if self.per_tensor else (*scales, (outputs,))
        named = {"weight_scale": Wanted(scales, FLOATS)}
        if self.activations == "static":
            named["input_scale"] = Wanted(((1,), ()), FLOATS)
            if self.zero_input:
                named["input_zero_point"] = Wanted(((1,), ()), (torch.int8,))
        if self.format == FLOAT8:
            return named | {"weight": Wanted(((outputs, inputs),), (_FP8,))}
        if self.format == INTEGERS:
            named["weight"] = Wanted(((outputs, inputs),), (torch.int8,))
            zero = Wanted(scales, (torch.int8,), optional=self.symmetric)
        else:
            along = {w(inputs, self.bits) for w in (words_of, spaced_words_of)}
            named["weight_packed"] = Wanted(tuple((outputs, w) for w in along), (torch.int32,))
            named["weight_shape"] = Wanted(((2,),), (torch.int64, torch.int32))
            down = {w(outputs, self.bits) for w in (words_of, spaced_words_of)}
            shapes = tuple((w, groups) for w in down)
            zero = Wanted(shapes, (torch.int32,), optional=self.symmetric)
        if not self.symmetric:
            named["weight_zero_point"] = zero
        named["weight_g_idx"] = Wanted(((inputs,),), (torch.int32, torch.int64), optional=True)
        return named

    def _wanted_fp4(self, outputs: int, inputs: int, groups: int) -> dict[str, Wanted]:
        kind = _FP8 if self.format == NVFP4 else torch.uint8
        named = {
            "weight_packed": Wanted(((outputs, inputs // 2),), (torch.uint8,)),
            "weight_scale": Wanted(((outputs, groups),), (kind,)),
        }
        if self.format == NVFP4:
            named["weight_global_scale"] = Wanted(((), (1,)), (torch.float32,))
        return named

    def read(self, raw: Mapping[str, Tensor], outputs: int, inputs: int) -> Linear:
        if self.format in (NVFP4, MXFP4):
            return Linear(self._fp4(raw, inputs), None, self.activations)
        scales = raw["weight_scale"].reshape(-1, self._groups(inputs)).expand(outputs, -1)
        if self.format == FLOAT8:
            if not scales.isfinite().all():
                raise ValueError("weight_scale holds NaN or infinity")
            weight = QuantizedWeight.from_codes(
                raw["weight"], scales.contiguous(), None, Scheme(8, "fp8")
            )
            return Linear(weight, None, self.activations)
        codes, zeros = self._integers(raw, outputs, inputs)
        g_idx = raw.get("weight_g_idx")
        if g_idx is not None and bool((g_idx == -1).all()):  # how the library spells none
            g_idx = None
        bits, size = self.bits, self.group_size
        made = finished(codes, scales, zeros, bits, size, g_idx, self.activations)
        return made._replace(static=self._static(raw))

    def _static(self, raw: Mapping[str, Tensor]) -> Static | None:
        if self.activations != "static":
            return None
        zero = int(raw["input_zero_point"]) if self.zero_input else 0
        scale = float(raw["input_scale"].to(torch.float32))
        if not 0 < scale < math.inf:
            raise ValueError(f"input_scale is {scale}; it is positive")
        return Static(scale, zero + MIDDLE)

    def _groups(self, inputs: int) -> int:
        return Scheme(group_size=self.group_size).groups(inputs)

    def _integers(
        self, raw: Mapping[str, Tensor], outputs: int, inputs: int
    ) -> tuple[Tensor, Tensor | None]:
        """Signed codes ``(N, K)`` and zeros ``(N, G)``."""
        groups, zeros = self._groups(inputs), None
        if self.format == INTEGERS:
            codes = raw["weight"]
            limit = 1 << self.bits - 1
            if codes.numel() and not -limit <= int(codes.min()) <= int(codes.max()) < limit:
                raise ValueError(f"weight has numbers that {self.bits} bits do not hold")
            if not self.symmetric:
                zeros = raw["weight_zero_point"].reshape(-1, groups).expand(outputs, -1)
            return codes, zeros
        if raw["weight_shape"].tolist() != [outputs, inputs]:
            raise ValueError(
                f"weight_shape says {raw['weight_shape'].tolist()} of a layer {[outputs, inputs]}"
            )
        codes = self._signed(raw["weight_packed"], inputs)
        if not self.symmetric:
            zeros = self._signed(raw["weight_zero_point"].t(), outputs).t()
        return codes, zeros

    def _signed(self, words: Tensor, count: int) -> Tensor:
        offset = 1 << self.bits - 1
        unsigned = unpack_words(words, self.bits, count)
        return (unsigned.to(torch.int16) - offset).to(torch.int8)

    def _fp4(self, raw: Mapping[str, Tensor], inputs: int) -> QuantizedWeight:
        scheme = Scheme(4, "nvfp4" if self.format == NVFP4 else "mxfp4")
        packed, scales, outer = raw["weight_packed"], raw["weight_scale"], None
        if self.format == NVFP4:
            outer = raw["weight_global_scale"].reshape(()).reciprocal()
            if not outer.isfinite():
                raise ValueError("weight_global_scale is 0, NaN or infinity")
        return QuantizedWeight(scheme, inputs, packed, scales, None, outer)


def refusal(weight: QuantizedWeight) -> str | None:
    """Why a layer cannot be held by these layouts, or None."""
    scheme = weight.scheme
    if scheme.dtype in ("nf4", "fp4"):
        return f"compressed-tensors has no {scheme.dtype} numbers (nvfp4 and mxfp4 it has)"
    return None if weight.zeros is None else integer_zeros_refusal(weight)


def written(
    weight: QuantizedWeight, activations: str, static: Static | None = None
) -> tuple[dict[str, Tensor], CompressedTensors]:
    """The tensors of a layer without `refusal`, and how they are to be read."""
    scheme = weight.scheme
    if scheme.dtype in ("nvfp4", "mxfp4"):
        return _written_fp4(weight)
    named = {"weight_scale": weight.scales.contiguous()}
    if scheme.dtype == "fp8":
        named["weight"] = weight.codes
        return named, CompressedTensors(FLOAT8, 8, activations=activations)
    if static is not None:
        named["input_scale"] = torch.tensor([static.scale])
        named["input_zero_point"] = torch.tensor([static.signed], dtype=torch.int8)
    form = PACKED if activations == "none" else INTEGERS
    layout = CompressedTensors(
        form,
        scheme.bits,
        scheme.group_size,
        scheme.symmetric,
        activations=activations,
        zero_input=static is not None,
    )
    codes = weight.unpacked()
    zeros = None if weight.zeros is None else weight.zeros.to(torch.int8)
    if form == INTEGERS:
        named["weight"] = codes.contiguous()
        return (named if zeros is None else named | {"weight_zero_point": zeros}), layout
    named["weight_packed"] = _packed(codes, scheme.bits)
    named["weight_shape"] = torch.tensor(weight.shape)
    if zeros is not None:
        named["weight_zero_point"] = _packed(zeros.t(), scheme.bits).t().contiguous()
    return named, layout


def _packed(codes: Tensor, bits: int) -> Tensor:
    return pack_words((codes.to(torch.int16) + (1 << bits - 1)).to(torch.uint8), bits)


def _written_fp4(weight: QuantizedWeight) -> tuple[dict[str, Tensor], CompressedTensors]:
    named = {"weight_packed": weight.codes, "weight_scale": weight.scales}
    size = weight.scheme.group_size
    if weight.tensor_scale is None:
        return named, CompressedTensors(MXFP4, 4, size)
    named["weight_global_scale"] = weight.tensor_scale.reciprocal().reshape(1)
    return named, CompressedTensors(NVFP4, 4, size)
