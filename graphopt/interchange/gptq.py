"""The GPTQ layout, as AutoGPTQ introduced it and GPTQModel and vLLM read it.

A layer ``(N, K)`` of B bits in G groups has ``qweight`` int32 ``(K * B / 32, N)``, codes packed
along K; ``qzeros`` int32 ``(G, N * B / 32)``, zero points packed along N; ``scales`` ``(G, N)``;
and ``g_idx`` int32 ``(K,)``, the group of each input. A number is ``(code - zero) * scale`` with
codes from 0. ``checkpoint_format`` ``gptq`` stores zeros less one, modulo ``2 ** B``; ``gptq_v2``
stores them as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.interchange.bits import pack_words, unpack_words, words_of
from graphopt.interchange.layout import FLOATS, Linear, Wanted, finished
from graphopt.kernels.quantized import QuantizedWeight, Scheme

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq:
    """One layer in the GPTQ layout.

    Attributes:
        group_size: None is one group per output channel (-1 in files).
        less_one: zeros are stored less one (``checkpoint_format`` ``gptq``).
    """

    bits: int
    group_size: int | None
    less_one: bool = True

    @property
    def text(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size else "per channel"
        return f"GPTQ, {self.bits} bits, {groups}"

    def wanted(self, outputs: int, inputs: int) -> dict[str, Wanted]:
        groups = Scheme(self.bits, group_size=self.group_size).groups(inputs)
        packed = words_of(outputs, self.bits)
        return {
            "qweight": Wanted(((words_of(inputs, self.bits), outputs),), (torch.int32,)),
            "qzeros": Wanted(((groups, packed),), (torch.int32,)),
            "scales": Wanted(((groups, outputs),), FLOATS),
            "g_idx": Wanted(((inputs,),), (torch.int32, torch.int64), optional=True),
        }

    def read(self, raw: Mapping[str, Tensor], outputs: int, inputs: int) -> Linear:
        offset = 1 << self.bits - 1
        unsigned = unpack_words(raw["qweight"].t(), self.bits, inputs)
        codes = unsigned.bitwise_xor_(0x80).view(torch.int8) if offset == 128 else None
        if codes is None:
            codes = unsigned.view(torch.int8).sub_(offset)
        zeros = unpack_words(raw["qzeros"], self.bits, outputs).to(torch.int16)
        if self.less_one:
            zeros = zeros.add_(1).bitwise_and_((1 << self.bits) - 1)
        signed = None if bool((zeros == offset).all()) else zeros.t() - offset
        return finished(
            codes, raw["scales"].t(), signed, self.bits, self.group_size, raw.get("g_idx")
        )


def refusal(weight: QuantizedWeight, activations: str) -> str | None:
    """Why a layer cannot be held by this layout, or None."""
    scheme, (outputs, inputs) = weight.scheme, weight.shape
    if activations != "none":
        return "the GPTQ layout is for weights alone, and activations are quantized too"
    if scheme.dtype != "int" or scheme.bits not in BITS:
        return (
            f"the GPTQ layout has integers of 2, 3, 4 or 8 bits, not {scheme.dtype} {scheme.bits}"
        )
    if inputs * scheme.bits % 32 or outputs * scheme.bits % 32:
        return f"the GPTQ layout fills words of 32 bits, which {outputs} x {inputs} does not"
    return _zeros_refusal(weight)


def _zeros_refusal(weight: QuantizedWeight) -> str | None:
    if not weight.scales.to(torch.float16).isfinite().all():
        return "the GPTQ layout has scales in float16, and these are beyond its range"
    return None if weight.zeros is None else integer_zeros_refusal(weight)


def integer_zeros_refusal(weight: QuantizedWeight) -> str | None:
    """Why zeros cannot be stored as integers among the codes, or None."""
    assert weight.zeros is not None
    zeros = weight.zeros.to(torch.float32)
    low, high = weight.scheme.limits
    if not torch.equal(zeros, zeros.round()):
        return "the format has integers for zero points, and these are fractions"
    if zeros.numel() and not low <= float(zeros.min()) <= float(zeros.max()) <= high:
        return f"the format has zero points from {low} to {high} (of signed codes)"
    return None


def written(
    weight: QuantizedWeight, order: Tensor | None, *, less_one: bool
) -> tuple[dict[str, Tensor], Gptq]:
    """The tensors of a layer without `refusal`, and how they are to be read.

    Scales become float16, as every reader of the layout has them. ``order`` is that of `Linear`.
    """
    scheme, inputs = weight.scheme, weight.width
    offset = 1 << scheme.bits - 1
    unsigned = (weight.unpacked().to(torch.int16) + offset).to(torch.uint8)
    zeros = torch.zeros_like(weight.scales) if weight.zeros is None else weight.zeros
    stored = (zeros.to(torch.float32) + offset).to(torch.int16).t().contiguous()
    kept = (stored - int(less_one)) & ((1 << scheme.bits) - 1)
    packed = pack_words(kept.to(torch.uint8), scheme.bits)
    g_idx = (torch.arange(inputs) // (scheme.group_size or inputs)).to(torch.int32)
    if order is not None:
        back = torch.argsort(order)
        unsigned, g_idx = unsigned[:, back], g_idx[back]
    tensors = {
        "qweight": pack_words(unsigned, scheme.bits).t().contiguous(),
        "qzeros": packed,
        "scales": weight.scales.t().to(torch.float16).contiguous(),
        "g_idx": g_idx,
    }
    return tensors, Gptq(scheme.bits, scheme.group_size, less_one)
