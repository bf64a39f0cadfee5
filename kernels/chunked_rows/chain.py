"""What stands between a product and the matrix that is summed up, as an affine map and a soft-cap.

``z = c tanh(a x + k b)`` of the product ``x``, or ``a x + k b``, with numbers ``a``, ``k``, ``c``
and a bias ``b (V,)``. As ``c tanh((c a x + c k b) / c)`` it is a soft-cap of another product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isclose, isfinite
from typing import Any

import torch

from graphopt.kernels.chunked_rows.fusing import arguments_of, readers_of
from graphopt.kernels.chunked_rows.parsing import Name, Parsed, Step, names

aten = torch.ops.aten


@dataclass(frozen=True)
class Chain:
    """The steps from a product to the last matrix that they alone make of it.

    Attributes:
        matrix: its name; the product's where there are no steps.
        slope, shift: ``a`` and ``k``.
        bias: the parameter that ``b`` is.
        cap: ``c``; ``None`` without a tanh.
    """

    matrix: Name
    steps: tuple[Step, ...] = ()
    slope: float = 1.0
    shift: float = 1.0
    bias: Name | None = None
    cap: float | None = None

    @property
    def scales(self) -> tuple[float, float]:
        """What the product and the bias are multiplied by before the soft-cap."""
        unit = 1.0 if self.cap is None else self.cap
        return _one(self.slope * unit), _one(self.shift * unit)

    @property
    def is_proper(self) -> bool:
        """Whether its numbers can be those of a head."""
        numbers = [*self.scales, *([] if self.cap is None else [self.cap])]
        return all(isfinite(n) and n for n in numbers) and (self.cap is None or self.cap > 0)


def chain_of(parsed: Parsed, product: Name) -> Chain:
    """As far as each matrix has one reader and is no result."""
    chain = Chain(product)
    while chain.matrix not in parsed.results:
        readers = readers_of(parsed, chain.matrix)
        longer = _longer(chain, readers[0], parsed.parameters) if len(readers) == 1 else None
        if longer is None:
            break
        chain = replace(longer, matrix=Name(readers[0].name), steps=(*chain.steps, readers[0]))
    return chain


def _longer(chain: Chain, step: Step, parameters: Sequence[str]) -> Chain | None:
    """The chain with what one more step does; ``None`` where a chain has no such step."""
    given = arguments_of(step)
    if list(names(step)).count(chain.matrix) != 1:
        return None
    if step.target is aten._to_copy.default:
        others = (v for k, v in given.items() if k not in ("self", "dtype"))
        return chain if given["dtype"] == torch.float32 and not any(others) else None
    if step.target is aten.tanh.default:
        return replace(chain, cap=1.0) if chain.cap is None else None
    if step.target is aten.add.Tensor:
        return _biased(chain, given, parameters)
    return _scaled(chain, step, given)


def _biased(chain: Chain, given: dict[str, Any], parameters: Sequence[str]) -> Chain | None:
    first, second = given["self"], given["other"]
    bias = second if first == chain.matrix else first
    named = isinstance(bias, Name) and bias in parameters
    first_of_all = chain.bias is None and chain.cap is None
    return replace(chain, bias=bias) if named and first_of_all and given["alpha"] == 1 else None


def _scaled(chain: Chain, step: Step, given: dict[str, Any]) -> Chain | None:
    number = given.get("other")
    if isinstance(number, Name) or not isinstance(number, int | float) or not number:
        return None
    if step.target in (aten.mul.Tensor, aten.mul.Scalar):
        factor = float(number)
    elif step.target in (aten.div.Tensor, aten.div.Scalar):
        factor = 1 / number
    else:
        return None
    if chain.cap is not None:
        return replace(chain, cap=chain.cap * factor)
    shift = chain.shift if chain.bias is None else chain.shift * factor
    return replace(chain, slope=chain.slope * factor, shift=shift)


def _one(number: float) -> float:
    """1 where it is that but for rounding."""
    return 1.0 if isclose(number, 1.0, rel_tol=1e-12) else number
