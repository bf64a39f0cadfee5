"""Pieces by code of Inductor: a sweep or two over a matrix, where operators take one each.

A divergence of two softmaxes and its slope are some twenty operators, each of which reads and
writes the piece. Their code is made when the first piece of its dtypes and widths comes, for any
number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from graphopt.kernels.chunked_rows.body import Body, Results, read
from graphopt.kernels.chunked_rows.operands import autocast_of
from graphopt.kernels.chunked_rows.steps import (
    Asked,
    Cotangents,
    Slopes,
    differentiated,
    recording,
)

_OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}
"""A product and the sum after it as one instruction, rounded once."""

Step = Callable[..., list[Tensor]]


class _Code(NamedTuple):
    """What was made of a step.

    Attributes:
        run: takes the step's tensors.
        slopes: which gradients it gives, where it gives some.
    """

    run: Step
    slopes: Sequence[bool]


class Compiled:
    """A body's pieces; interchangeable with `steps.Eager`.

    Args:
        matrices: how many of the body's tensors are its own to write over, from the first on.

    Raises (when called):
        Exception: whatever Inductor says where it cannot make code, without a C++ compiler say.
    """

    def __init__(self, body: Body, matrices: int) -> None:
        self.body, self.matrices = body, matrices
        self._made: dict[Any, _Code] = {}

    def results(self, tensors: Sequence[Tensor]) -> Results:
        def step(*given: Tensor) -> list[Tensor]:
            return [t for group in self.body([*given]) for t in group]

        found = self._code(None, step, tensors).run(*tensors)
        return self._grouped(found)

    def differentiated(
        self, tensors: Sequence[Tensor], asked: Asked, cotangents: Cotangents | None
    ) -> tuple[Results, Slopes]:
        """See `steps.differentiated`; slopes of matrices are written over these."""
        count, slopes_of = len(tensors), list[bool]()
        given = () if cotangents is None else (*cotangents.given, *cotangents.totals)
        named = 0 if cotangents is None else len(cotangents.given)

        def step(*flat: Tensor) -> list[Tensor]:
            inner, rest = flat[:count], flat[count:]
            told = None if cotangents is None else Cotangents(rest[:named], rest[named:])
            results, slopes = differentiated(self.body, inner, asked, told)
            for k in filter(asked.wanted.__getitem__, range(self.matrices)):
                _written(inner[k], slopes[k])
            others = slopes[self.matrices :]
            slopes_of[:] = [slope is not None for slope in others]
            made = [t for group in results for t in group] if told is None else []
            return [*made, *(slope for slope in others if slope is not None)]

        code = self._code((asked, cotangents is None), step, [*tensors, *given], slopes_of)
        found = code.run(*tensors, *given)
        results = self._grouped(found) if cotangents is None else Results([], [], [])
        others = iter(found[sum(map(len, results)) :])
        return results, [
            *tensors[: self.matrices],
            *(next(others) if there else None for there in code.slopes),
        ]

    def _grouped(self, found: Sequence[Tensor]) -> Results:
        rows, sums = len(self.body.rows), len(self.body.sums)
        end = rows + sums + len(self.body.columns)
        return Results([*found[:rows]], [*found[rows : rows + sums]], [*found[rows + sums : end]])

    def _code(
        self, kind: Any, step: Step, tensors: Sequence[Tensor], slopes: Sequence[bool] = ()
    ) -> _Code:
        """Made at the first call for tensors alike but for the number of rows."""
        count = tensors[0].shape[0]
        key = (kind, autocast_of(tensors[0]), min(count, 2), *(_kind(t, count) for t in tensors))
        if key not in self._made:
            self._made[key] = _Code(_compiled(step, tensors), tuple(slopes))
        return self._made[key]


def _written(matrix: Tensor, slope: Tensor | None) -> None:
    if slope is None:
        matrix.zero_()
    else:
        matrix.copy_(slope)


def _kind(tensor: Tensor, count: int) -> Any:
    sizes = tuple(-1 if size == count else size for size in tensor.shape)
    return tensor.dtype, tensor.device, sizes, tensor.is_contiguous()


def _compiled(step: Step, tensors: Sequence[Tensor]) -> Step:
    """Code for a step; sizes equal to the number of rows stay open."""
    from torch._inductor.compile_fx import compile_fx

    count, mode = tensors[0].shape[0], FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(t.detach(), symbolic_context=_open(t, count)) for t in tensors]
    with torch._inductor.config.patch(_OPTIONS), recording(), torch.no_grad():
        graph = make_fx(step)(*fakes)
        return compile_fx(graph, fakes)


def _open(tensor: Tensor, count: int) -> StatelessSymbolicContext:
    sizes = [DimDynamic.DUCK if size == count else DimDynamic.STATIC for size in tensor.shape]
    return StatelessSymbolicContext(dynamic_sizes=sizes)


@lru_cache(maxsize=512)
def compiled(text: str, matrices: int) -> Compiled:
    """The pieces of a body that a text spells."""
    return Compiled(read(text), matrices)
