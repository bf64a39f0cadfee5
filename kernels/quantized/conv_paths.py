"""Ways to run ``graphopt::quantized_conv``: the definition, and what is faster for some calls.

Weight-only: a convolution with the dequantized weight, rounded to the dtype of x.

Dynamic activations: each sample b has one scale, ``a_b = max|x_b| / 127``, and ``q_b = round(x_b /
a_b)``; then ``y_b = a_b * conv(q_b, W) + bias``, in float32. (For ``fp8``, q are E4M3 numbers and
``a_b = max|x_b| / 448``.) A scale per sample, not per batch: no result depends on its neighbours.

Static activations: ``q = clamp(round(x / scale) + zero, 0, 255)`` for all of x, and ``y = scale *
conv(q - zero, W) + bias``; what pads x stands for 0. Samples that hold NaN or infinity give no
finite number.

``im2col`` copies the windows of a sample, int8, into rows, for exact products of integers: bytes
are those of x times the size of the kernel, so it pays for many channels on few places. ``onednn``
computes on x itself, but orders the weight anew in each call: it pays for few channels on many
places.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.kernels.quantized import definition, integers
from graphopt.kernels.quantized.choice import quartiles
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.static import Static, quantized, row_factors
from graphopt.kernels.quantized.weight import QuantizedWeight


class Window(NamedTuple):
    """How a convolution moves over its input; one number per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def places(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        """Spatial sizes of the result."""
        rows = zip(sizes, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in rows)


def numbers(weight: QuantizedWeight, window: Window, dtype: torch.dtype) -> Tensor:
    """The weight ``(N, C / groups, *kernel)``, dequantized; stored rows count channels last."""
    flat = weight.dequantize(dtype)
    return flat.view(weight.shape[0], *window.kernel, -1).movedim(-1, 1)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, window: Window) -> Tensor:
    """As ``torch.nn.functional.conv1d``, ``conv2d`` and ``conv3d`` do it."""
    _, stride, padding, dilation, groups = window
    none = [0] * len(stride)
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, none, groups)


def weight_only(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, window: Window) -> Tensor:
    """``x (B, C, *sizes)`` to ``(B, N, *places)`` in the dtype of x."""
    bias = None if bias is None else bias.to(x.dtype)
    return convolution(x, numbers(weight, window, x.dtype), bias, window)


def dynamic(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, window: Window) -> Tensor:
    """The definition for quantized activations."""
    q, scale = quantized_samples(x, weight.scheme.dtype)
    made = convolution(q, numbers(weight, window, q.dtype), None, window)
    return _rescaled(made, scale, bias).to(x.dtype)


def static(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, window: Window, given: Static
) -> Tensor:
    """The definition for activations with one scale."""
    q = quantized(x, given).sub_(given.signed)
    made = convolution(q, numbers(weight, window, q.dtype), None, window)
    return _rescaled(made, _factors(x, given.scale), bias).to(x.dtype)


def _factors(x: Tensor, scale: float) -> Tensor:
    """The scale for each sample ``(B, 1, ...)``; NaN for those that hold NaN or infinity."""
    return row_factors(x.flatten(1), scale).view(-1, *[1] * (x.ndim - 1))


def quantized_samples(x: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """Codes of ``x (B, C, *sizes)`` and scales ``(B, 1, ...)``, both float32 or float64."""
    scale = sample_scales(x, dtype)
    scaled = x / scale
    if dtype == "fp8":
        return scaled.clamp_(-448, 448).to(torch.float8_e4m3fn).to(scale.dtype), scale
    return scaled.round_(), scale


def sample_scales(x: Tensor, dtype: str) -> Tensor:
    """``(B, 1, ...)``, float32 or float64."""
    least, most = torch.aminmax(x.flatten(1), dim=1)
    top = 448 if dtype == "fp8" else 127
    wide = torch.maximum(-least, most).to(torch.promote_types(x.dtype, torch.float32))
    scale = wide.div_(top).clamp_(min=torch.finfo(torch.float32).tiny)
    return scale.view(-1, *[1] * (x.ndim - 1))


def _rescaled(made: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return made.mul_(scale)
    shaped = bias.to(made.dtype).view(-1, *[1] * (made.ndim - 2))
    return torch.addcmul(shaped, made, scale)


def im2col(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, window: Window) -> Tensor:
    """Exact products of integers, a sample at a time, in memory that samples share."""
    scale, places = sample_scales(x, weight.scheme.dtype), window.places(tuple(x.shape[2:]))
    made = scale.new_empty((x.shape[0], weight.shape[0], *places))
    scaled = scale.new_empty(x.shape[1:])
    q = torch.empty_like(scaled, dtype=torch.int8)
    for sample, own in enumerate(scale.flatten().unbind()):
        torch.div(x[sample].to(scale.dtype), own, out=scaled)
        rows = _windows(q.copy_(scaled.round_()).movedim(0, -1), window)
        part = definition.integer_products(rows, weight, scale.dtype)
        torch.mul(part.t(), own, out=made[sample].view(weight.shape[0], -1))
    if bias is not None:
        made += bias.to(made.dtype).view(-1, *[1] * len(places))
    return made.to(x.dtype)


def _static_im2col(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, window: Window, given: Static
) -> Tensor:
    """The same with one scale: the zero point is a row of its own, as in `static.product`."""
    scale, places = _factors(x, given.scale), window.places(tuple(x.shape[2:]))
    made = scale.new_empty((x.shape[0], weight.shape[0], *places))
    zero = torch.full((1, weight.width), given.signed, dtype=torch.int8, device=x.device)
    shift = definition.integer_products(zero, weight, scale.dtype).t()
    for sample, own in enumerate(scale.flatten().unbind()):
        q = quantized(x[sample], given).to(torch.int8).movedim(0, -1)
        rows = _windows(q, window, given.signed)
        part = definition.integer_products(rows, weight, scale.dtype)
        torch.mul(part.t().sub_(shift), own, out=made[sample].view(weight.shape[0], -1))
    if bias is not None:
        made += bias.to(made.dtype).view(-1, *[1] * len(places))
    return made.to(x.dtype)


def _windows(q: Tensor, window: Window, zero: int = 0) -> Tensor:
    """The windows of one sample ``(*sizes, C)`` as rows ``(places, kernel * C)``."""
    count = len(window.kernel)
    if any(window.padding):
        around = [side for p in reversed(window.padding) for side in (p, p)]
        q = F.pad(q, (0, 0, *around), value=zero)
    for dim, (k, s, d) in enumerate(
        zip(window.kernel, window.stride, window.dilation, strict=True)
    ):
        q = q.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    q = q.movedim(count, -1)  # the channels, last
    return q.reshape(q.shape[:count].numel(), -1).contiguous()  # rows must not share memory


def _onednn(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, window: Window) -> Tensor:
    q, scale = quantized_samples(x, "int")
    made = unsigned_convolution(q, weight.codes, weight.scales[:, 0].to(torch.float32), window)
    return _rescaled(made, scale, bias).to(x.dtype)


def _static_onednn(
    x: Tensor, weight: QuantizedWeight, bias: Tensor | None, window: Window, given: Static
) -> Tensor:
    scales = weight.scales[:, 0].to(torch.float32)
    q = quantized(x, given).sub_(given.signed)
    made = unsigned_convolution(q, weight.codes, scales, window, given.zero)
    return _rescaled(made, _factors(x, given.scale), bias).to(x.dtype)


def unsigned_convolution(
    q: Tensor, codes: Tensor, scales: Tensor, window: Window, zero: int = 128
) -> Tensor:
    """Integers q, float32, by codes: uint8 around ``zero``, as signed ones are computed one by
    one."""
    kernel, stride, padding, dilation, groups = window
    unsigned = q.add_(zero).to(torch.uint8).contiguous(memory_format=torch.channels_last)
    ordered = codes.view(codes.shape[0], *kernel, -1).movedim(-1, 1)
    shape = (stride, padding, dilation, groups)
    packed = torch.ops.onednn.qconv_prepack(ordered, scales, 1.0, zero, *shape, list(q.shape))
    zeros = torch.zeros(len(scales), dtype=torch.int64)
    made: Tensor = torch.ops.onednn.qconv_pointwise(
        *(unsigned, 1.0, zero, packed, scales, zeros, None, *shape),
        *(1.0, 0, torch.float32, "none", [], ""),
    )
    return made.contiguous()


@cache
def onednn_is_exact() -> bool:
    """Whether oneDNN gives what integers give, on numbers that saturate 16 bits; tried once."""
    generator = torch.Generator("cpu").manual_seed(0)
    window = Window((3, 3), (1, 1), (1, 1), (1, 1), 1)
    bits = torch.randint(0, 2, (2, 64, 9, 9), generator=generator, device="cpu")
    shape = (32, 9 * 64)
    codes = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8, device="cpu")
    largest = torch.full_like(codes, 127)
    ones = torch.ones_like(bits)
    tried = [
        (bits * 254 - 127, codes, 128),
        (ones * 127, largest, 128),
        (ones * -127, -largest, 128),
    ]
    tried += [(bits * 255 - zero, codes, zero) for zero in (0, 3, 255)]
    tried += [(ones * 255, largest, 0), (ones * -255, largest, 255)]
    for q, w, zero in tried:
        ordered = w.view(32, 3, 3, 64).movedim(-1, 1).to(torch.float64)
        wanted = convolution(q.to(torch.float64), ordered, None, window)
        try:
            found = unsigned_convolution(q.to(torch.float32), w, torch.ones(32), window, zero)
        except (RuntimeError, AttributeError):  # torch without oneDNN, or another signature of it
            return False
        if not torch.equal(found.double(), wanted):
            return False
    return True


class Case(NamedTuple):
    """What decides which paths can run a call, and which is fast."""

    scheme: Scheme
    activations: str
    dtype: torch.dtype
    device: str
    window: Window
    outputs: int
    sizes: tuple[int, ...]


Run = Callable[..., Tensor]


def _takes_im2col(case: Case) -> bool:
    width = case.sizes[1] * torch.Size(case.window.kernel).numel()
    return case.scheme.dtype == "int" and case.window.groups == 1 and width <= integers.LONGEST


def _takes_onednn(case: Case) -> bool:
    plain = case.scheme == Scheme(8) and case.window.groups == 1 and len(case.window.kernel) == 2
    float32 = case.dtype != torch.float64 and case.device == "cpu"
    return plain and float32 and onednn_is_exact()


PATHS: dict[str, tuple[Callable[[Case], bool], Run]] = {
    "definition": (lambda _: True, dynamic),
    "im2col": (_takes_im2col, im2col),
    "onednn": (_takes_onednn, _onednn),
}
"""For activations quantized as the model runs: whether a path takes a case, and how it runs."""
STATIC_PATHS: dict[str, tuple[Callable[[Case], bool], Run]] = {
    "definition": (lambda _: True, static),
    "im2col": (_takes_im2col, _static_im2col),
    "onednn": (_takes_onednn, _static_onednn),
}
"""The same for static activations."""
_chosen: dict[tuple[Case, int], str] = {}


def choose(case: Case, x: Tensor, weight: QuantizedWeight, *given: Static) -> Run:
    """The fastest path for a call here, measured when a call of its kind first runs."""
    if not x.numel():
        return static if given else weight_only
    if case.activations == "none":
        return weight_only
    paths, kind = STATIC_PATHS if given else PATHS, (case, torch.get_num_threads())
    if kind not in _chosen:
        can = {name: run for name, (takes, run) in paths.items() if takes(case)}
        calls: list[Callable[[], object]] = [
            partial(run, x, weight, None, case.window, *given) for run in can.values()
        ]
        times = quartiles(calls)
        _chosen[kind] = list(can)[times.index(min(times))]
    return paths[_chosen[kind]][1]
