"""Ways to run ``graphopt::quantized_linear``: the definition, and what is faster for some calls.

Each path reads one layout of the stored tensors. ``"plain"`` is that of `QuantizedWeight`; another
is made of it by `Path.prepare`, takes its place, and is of this machine alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.quantized import definition, gpu, int4pack, static
from graphopt.kernels.quantized.cases import Case
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight


class Stored(NamedTuple):
    """A weight in a layout that is not plain; ``tensors`` are those that `Path.prepare` gave."""

    scheme: Scheme
    layout: str
    tensors: dict[str, Tensor]
    shape: tuple[int, int]


Weight = QuantizedWeight | Stored


class Path(NamedTuple):
    """One way to run the operator.

    Attributes:
        name: what `using` and reports call it.
        layout: what it reads.
        takes: whether it can run a case.
        run: ``x (M, K)``, the weight, a `QuantizedWeight` or a `Stored` as the layout has it, and
            the bias; a `Static` where activations are static; gives ``(M, N)`` in the dtype of x.
        prepare: the tensors of the layout from a plain weight, by the operator's names for them.
    """

    name: str
    layout: str
    takes: Callable[[Case], bool]
    run: Callable[..., Tensor]
    prepare: Callable[[QuantizedWeight], dict[str, Tensor]]


def _plain(weight: QuantizedWeight) -> dict[str, Tensor]:
    return weight.tensors


def _is_weight_only(case: Case) -> bool:
    return case.activations == "none"


def _is_dynamic(case: Case) -> bool:
    return case.activations == "dynamic"


def _is_static(case: Case) -> bool:
    return case.activations == "static"


def _int8pack_takes(case: Case) -> bool:
    """In other dtypes than bfloat16, torch runs it a number at a time."""
    return (
        _is_weight_only(case)
        and case.scheme == Scheme(8)
        and case.dtype == torch.bfloat16
        and case.device == "cpu"
    )


def _int8pack(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    scales = weight.scales[:, 0].to(x.dtype)
    made = torch.ops.aten._weight_int8pack_mm(x.contiguous(), weight.codes, scales)
    return made if bias is None else made.add_(bias)


def _int4pack_takes(case: Case) -> bool:
    return _is_weight_only(case) and case.dtype == torch.bfloat16


def _unpacked_takes(case: Case) -> bool:
    """Slow: for what the kernel would run a number at a time, or not at all."""
    return _is_weight_only(case) and case.dtype != torch.bfloat16


def _int4pack(x: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
    return int4pack.linear(x, **weight.tensors, bias=bias)


def _unpacked(x: Tensor, weight: Stored, bias: Tensor | None) -> Tensor:
    numbers = int4pack.dequantize(**weight.tensors).to(x.dtype)
    return torch.nn.functional.linear(x, numbers, None if bias is None else bias.to(x.dtype))


def _by_gpu(name: str) -> Path:
    """A function of `triton_launch`, under its name."""
    return Path(name, "plain", partial(gpu.takes, name), partial(gpu.run, name), _plain)


PATHS = (
    Path("definition", "plain", _is_weight_only, definition.weight_only, _plain),
    Path("dynamic", "plain", _is_dynamic, definition.dynamic, _plain),
    Path("static", "plain", _is_static, static.product, _plain),
    Path("int8pack", "plain", _int8pack_takes, _int8pack, _plain),
    Path("int4pack", "int4pack", _int4pack_takes, _int4pack, int4pack.prepare),
    Path("unpacked", "int4pack", _unpacked_takes, _unpacked, int4pack.prepare),
    *map(_by_gpu, gpu.NAMES),
)
"""The first that takes a case is its definition; of the others that do, the fastest runs."""
_found: dict[Case, list[Path]] = {}


def is_tried(case: Case) -> bool:
    """Whether it is known what can run a case."""
    return case in _found


def paths_for(case: Case) -> list[Path]:
    """What can run a case; its definition alone where a CUDA graph captures its first call."""
    if case not in _found:
        can = (path for path in PATHS if path.layout == case.layout and path.takes(case))
        if case.is_captured:
            return [next(can)]
        _found[case] = list(can)
    return _found[case]


def _dequantizes(weight: QuantizedWeight, dtype: torch.dtype) -> bool:
    """Whether a kernel can make numbers of the weight where it is."""
    case = Case(weight.scheme, "plain", "none", dtype, weight.codes.device.type, *weight.shape)
    return any(path.name == "dequantized" for path in paths_for(case))


def embedding(indices: Tensor, weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Rows of the weight: ``(*indices.shape, K)``."""
    if _dequantizes(weight, dtype):
        return gpu.embedding(indices, weight, dtype)
    return definition.embedding(indices, weight, dtype)


def input_gradient(grad: Tensor, weight: Weight) -> Tensor:
    """``grad (M, N) @ W``, ``(M, K)``."""
    if isinstance(weight, QuantizedWeight):
        if _dequantizes(weight, grad.dtype):
            return gpu.run("input_gradient", grad, weight)
        return definition.input_gradient(grad, weight)
    numbers = int4pack.dequantize(**weight.tensors)
    return grad @ numbers.to(grad.dtype)
