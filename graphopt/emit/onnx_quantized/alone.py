"""A form by itself in ONNX Runtime: how far off it is, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.emitter import MICROSOFT, Emitter
from graphopt.emit.onnx_quantized.form import Form, Product
from graphopt.kernels.quantized import QuantizedWeight
from graphopt.kernels.quantized.definition import embedding, weight_only
from graphopt.kernels.quantized.static import quantized
from graphopt.onnx_types import code_of

EXACT = 2e-5
"""Relative RMS error allowed of forms that leave activations as they are."""
ROUNDING = 0.0083
"""Relative RMS error of Gaussian weights rounded to 8 bits per output channel; a bit less doubles
it. A form may add as much, not more."""
ACTIVATIONS = 0.03
"""Allowed of activations in 8 bits, as it is where they are rounded in torch."""
SAME = 1e-3
"""Allowed of static activations beside the same in float64: a code in thousands may be its
neighbour. Weights in groups may become `MatMulNBits`, which rounds once more."""
ALIKE, SHARED = 1.1, 1.5
"""Times the error of torch that a form may have; and one with a scale for the whole tensor, whose
result for one row depends on the others."""
GAIN = 2e-3
"""How far the factor between a result and the exact one may be from 1. Rounding is noise, which
cancels over many numbers; a scale that is off does not."""
FEW = 64
"""Rows that are too few for that: results of all of them may lie in one direction, such as the mean
of logits, along which what was rounded off does not cancel. As many are drawn then."""


@dataclass(frozen=True)
class Trial:
    """A form on the inputs of a call.

    Attributes:
        error: relative RMS error of the result, against float64 with activations as they are.
        gain: the factor between them that fits best.
        fault: why it may not be used, in words; empty where it may.
        run: the call once more.
        seconds: of a call, where that was measured.
    """

    form: Form
    error: float
    gain: float
    fault: str
    run: Callable[[], Any]
    seconds: float | None = None

    def timed(self, seconds: float) -> Trial:
        return replace(self, seconds=seconds)

    def released(self) -> Trial:
        """The same without its session, which holds the weight."""
        return replace(self, run=_released)

    def __str__(self) -> str:
        took = "" if self.seconds is None else f" {self.seconds * 1e3:.3g} ms,"
        fault = f" ({self.fault})" if self.fault else ""
        return f"{self.form.name}{took} error {self.error:.1e}{fault}"


def _released() -> None:
    raise RuntimeError("the session of this trial is closed")


def attempt(form: Form, call: Call, x: Tensor, opset: int, own: float = 0.0) -> Trial:
    """Run a form on float32 ``x (..., K)`` or indices, where torch has the error ``own``."""
    session = alone(form, call, x.ndim, x.dtype, opset)
    run = partial(session.run, None, {"x": x.numpy()})
    wanted = exact(call, x)
    made = torch.from_numpy(run()[0])
    error, gain = difference(made, wanted)
    held = (error, gain) if call.static is None else difference(made, stated(call, x))
    fault = _fault(allowance(form, call, own), *held, wanted.numel())
    if "scale" in fault and call.static is None and (drawn := _more_rows(call, x)) is not None:
        made, wanted = session.run(None, {"x": drawn.numpy()})[0], exact(call, drawn)
        fault = _fault(math.inf, *difference(torch.from_numpy(made), wanted), wanted.numel())
    return Trial(form, error, gain, fault, run)


def _more_rows(call: Call, x: Tensor) -> Tensor | None:
    """Random rows of the size of those of x; None where these are indices, or many."""
    if call.embedding or x.numel() >= FEW * x.shape[-1]:
        return None
    generator = torch.Generator().manual_seed(0)
    shape = (*[1] * (x.ndim - 2), FEW, x.shape[-1])
    return torch.randn(shape, generator=generator, dtype=x.dtype) * x.square().mean().sqrt()


def difference(made: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative RMS error, and the factor that fits best."""
    size = float(wanted.norm())
    error = float((made.double() - wanted).norm())
    return (error / size, float((made.double() * wanted).sum()) / size**2) if size else (error, 1.0)


def _fault(allowed: float, error: float, gain: float, count: int) -> str:
    if not error <= allowed:
        return f"above the bound, {allowed:.1e}"
    slack = GAIN + 5 * error / count**0.5
    return "" if abs(gain - 1) <= slack else f"a scale is off by {gain - 1:.1%}"


def allowance(form: Form, call: Call, own: float) -> float:
    """The largest error that a form may have on a call, where torch has ``own``."""
    if not form.rounds:
        return EXACT
    if call.activations == "dynamic":
        return min(ACTIVATIONS, SHARED * own) if form.shares else max(ACTIVATIONS, ALIKE * own)
    if call.static is not None:
        return SAME if call.weight.scales.shape[1] == 1 else ACTIVATIONS
    return min(ACTIVATIONS, ROUNDING * 2 ** (8 - call.scheme.bits))


def exact(call: Call, x: Tensor) -> Tensor:
    """The product with the stored weight, or its rows, in float64."""
    weight: QuantizedWeight = call.weight
    if call.embedding:
        return embedding(x, weight, torch.float64)
    flat = weight_only(x.double().reshape(-1, weight.width), weight, None)
    return flat.view(*x.shape[:-1], weight.shape[0])


def stated(call: Call, x: Tensor) -> Tensor:
    """The same with x as static activations leave it, cut off at the ends of their range."""
    assert call.static is not None
    codes = quantized(x.double(), call.static) - call.static.signed
    return exact(call, codes * call.static.scale)


def alone(form: Form, call: Call, rank: int, dtype: torch.dtype, opset: int) -> Any:
    """An ONNX Runtime session of a model that is this one operator."""
    import onnx_ir

    from graphopt.emit.onnx_runtime import open_session

    last = [] if call.embedding else [call.weight.width]
    sizes = [f"n{i}" for i in range(rank - len(last))]
    kind = onnx_ir.TensorType(onnx_ir.DataType(code_of(dtype)))
    x = onnx_ir.Value(name="x", shape=onnx_ir.Shape([*sizes, *last]), type=kind)
    emit = Emitter()
    made = form.build(emit, Product(call, x, rank))
    made.name, made.type = "y", onnx_ir.TensorType(onnx_ir.DataType.FLOAT)
    graph = onnx_ir.Graph(
        [x],
        [made],
        nodes=emit.nodes,
        initializers=list(emit.constants.values()),
        opset_imports={"": opset, MICROSOFT: 1},
        name="alone",
    )
    model = onnx_ir.Model(graph, ir_version=10)
    return open_session(onnx_ir.to_proto(model).SerializeToString())
