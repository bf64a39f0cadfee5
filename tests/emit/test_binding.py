"""Calls are bound however they are written, or refused with the argument's name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.emit.guards import CallBinder
from graphopt.errors import GraphoptError


class Model(nn.Module):
    def forward(
        self,
        x: Tensor,
        pair: tuple[Tensor, Tensor],
        y: Tensor | None = None,
        gain: int = 2,
        *,
        shift: float = 0.0,
    ) -> Tensor:
        return (x + pair[0] * pair[1] + (0 if y is None else y)) * gain + shift


A, B, C, D = (torch.full((2,), float(i)) for i in range(4))


def binder(*args: Any, **kwargs: Any) -> CallBinder:
    return CallBinder(capture(Model(), args, kwargs))


def values(flat: list[Any]) -> list[Any]:
    return [float(v[0]) if isinstance(v, Tensor) else v for v in flat]


WAYS: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((A, (B, C)), {"y": D}),
    ((A, (B, C), D), {}),
    ((A,), {"pair": (B, C), "y": D}),
    ((), {"y": D, "x": A, "pair": (B, C)}),
    ((A, (B, C), D, 2), {"shift": 0.0}),
]


@pytest.mark.parametrize("args, kwargs", WAYS)
def test_position_and_keyword_are_the_same(args: Any, kwargs: Any) -> None:
    for captured_args, captured_kwargs in WAYS[:4]:
        bind = binder(*captured_args, **captured_kwargs)
        wanted = values(bind(captured_args, captured_kwargs))
        assert values(bind(args, kwargs)) == wanted and sorted(wanted) == [0.0, 1.0, 2.0, 3.0]


def test_captured_defaults_may_be_left_out() -> None:
    bind = binder(A, (B, C), D, 2)
    assert values(bind((A, (B, C), D), {})) == [0.0, 1.0, 2.0, 3.0, 2]
    with pytest.raises(GraphoptError, match="Model needs gain"):
        binder(A, (B, C), D, 3)((A, (B, C), D), {})


REFUSED: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((A,), {"y": D}, "needs pair"),
    ((A, (B, C)), {"z": D}, "captured without an argument 'z'"),
    ((A, (B, C), D), {"x": A}, "got x by position and by keyword"),
    ((A, (B, C), D, 2, 0.0), {}, "takes 4 positional arguments, but 5 were given"),
    ((A, (B, C), D, 3), {}, "captured with gain=2, not 3"),
    ((A, (B, C), D), {"shift": A}, "captured with shift=0.0, not a tensor"),
    ((A, [B, C], D), {}, "got pair with another structure"),
    ((A, (B, C, D), D), {}, "got pair with another structure"),
]


@pytest.mark.parametrize("args, kwargs, message", REFUSED)
def test_calls_that_do_not_fit(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(GraphoptError, match=message) as caught:
        binder(A, (B, C), y=D)(args, kwargs)
    assert caught.value.where == "call of Model" and caught.value.fix


def test_rest_arguments() -> None:
    class Rest(nn.Module):
        def forward(self, *xs: Tensor, **named: Tensor) -> Tensor:
            return sum(xs) + named["bias"]

    bind = CallBinder(capture(Rest(), (A, B), {"bias": C}))
    assert values(bind((A, B), {"bias": C})) == [0.0, 1.0, 2.0]
    with pytest.raises(GraphoptError):
        bind((A, B, D), {"bias": C})
    with pytest.raises(GraphoptError, match="without an argument 'gain'"):
        bind((A, B), {"bias": C, "gain": D})
