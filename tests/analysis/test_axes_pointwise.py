"""Every operator that torch tags ``pointwise`` is elementwise with broadcasting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from axis_check import Draw, Sample, b, check, f, i, pos

KEYWORDS: dict[str, Any] = {"rounding_mode": "floor", "decimals": 1}
TENSORS = [(3, 4), (1, 4), (3, 1), (4,)]
SETTINGS: dict[str, Any] = {
    "clamp.default": (f(3, 4), -0.5, 0.5), "clip.default": (f(3, 4), -0.5, 0.5),
    "clamp.Tensor": (f(3, 4), f(1, 4), f(3, 1)), "clip.Tensor": (f(3, 4), f(1, 4), f(3, 1)),
    "gelu_backward.default": (f(3, 4), f(3, 4)),
    "polygamma.default": (1, f(3, 4)), "mvlgamma.default": (pos(3, 4), 1),
    "special_polygamma.default": (1, f(3, 4)),
    "native_dropout_backward.default": (f(3, 4), b(3, 4), 2.0),
}  # fmt: skip


def _pointwise() -> list[torch._ops.OpOverload]:
    found = []
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            op = getattr(packet, overload)
            fits = torch.Tag.pointwise in op.tags and not op._schema.is_mutable
            if fits and not any(arg.is_out for arg in op._schema.arguments):
                found.append(op)
    return found


@pytest.mark.parametrize("op", _pointwise(), ids=lambda op: str(op)[5:])
def test_tagged_operator_is_elementwise(op: torch._ops.OpOverload) -> None:
    name = str(op)[5:]
    for make in (f, pos, _ints, b):
        args, kwargs = SETTINGS.get(name) or _arguments(op, make), _keywords(op)
        sample = Sample(name, args, kwargs)
        try:
            op(*(value.make() if isinstance(value, Draw) else value for value in args), **kwargs)
        except (RuntimeError, NotImplementedError):
            continue
        check(sample)
        return
    pytest.fail(f"no arguments found for {op}")


def _ints(*shape: int) -> Draw:
    return i(5, *shape)


def _arguments(op: torch._ops.OpOverload, make: Any) -> tuple[Any, ...]:
    """A value per argument without default, tensors that broadcast against each other."""
    shapes = iter(TENSORS)
    out: list[Any] = []
    for arg in op._schema.arguments:
        if arg.kwarg_only or arg.has_default_value():
            break
        kind = str(arg.type)
        if kind == "Tensor":
            out.append(make(*next(shapes)))
        elif "Optional" in kind:
            out.append(None)
        else:
            out.append({"str": "none", "bool": False}.get(kind, 1))
    return tuple(out)


def _keywords(op: torch._ops.OpOverload) -> dict[str, Any]:
    required = (a for a in op._schema.arguments if a.kwarg_only and not a.has_default_value())
    return {arg.name: KEYWORDS[arg.name] for arg in required}
