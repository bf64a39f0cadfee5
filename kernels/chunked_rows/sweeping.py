"""One step of a body that sweeps over a product, which is never held, for the members on it.

Columns come from ``graphopt::cross_entropy_rows``, and so do their gradients: the log-sum-exp, the
logit of one class, the sum and the argmax of each row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.chain import Chain
from graphopt.kernels.chunked_rows.members import Best, Loss, Member, Picked
from graphopt.kernels.chunked_rows.parsing import Name
from graphopt.kernels.chunked_rows.softmax import Columns
from graphopt.kernels.chunked_rows.summaries import Summaries, cast_as, filled_in
from graphopt.kernels.cross_entropy import cross_entropy_rows

KINDS = (torch.float16, torch.bfloat16, torch.float32)
_NONE = torch.iinfo(torch.int64).min
"""The class to ignore where none is."""


class UnfitError(Exception):
    """The operands are not such that a sweep gives what the body gives."""


class Product(NamedTuple):
    """``hidden (N, D) @ weight (V, D).T``, in place of a body's first parameter.

    Attributes:
        filter_threshold: of the gradients that a sweep over it gives.
    """

    hidden: Tensor
    weight: Tensor
    filter_threshold: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.hidden.shape[0], self.weight.shape[0]

    def no_rows(self) -> Tensor:
        return self.hidden.new_empty((0, self.weight.shape[0]))


@dataclass(frozen=True, eq=False)
class Sweep:
    """``f(product, *others)``: what the members give, in their order.

    Attributes:
        chain: from the product to the matrix.
        summaries: the members, whose plain steps begin with the chain and end with the matrix.
    """

    chain: Chain
    summaries: Summaries

    @property
    def per_class(self) -> list[Name]:
        """The bias, and class weights."""
        members = self.summaries.members
        weights = [m.weight for m in members if isinstance(m, Loss) and m.weight is not None]
        return weights if self.chain.bias is None else [self.chain.bias, *weights]

    def __call__(self, product: Product, *given: Any) -> list[Any]:
        values = dict(zip(self.summaries.names, (product.no_rows(), *given), strict=True))
        bias = self._bias(product, values)
        with torch.no_grad():
            *like, matrix = self.summaries.plainly(dict(values), few=True)
        members = [filled_in(member, values) for member in self.summaries.members]
        whole = matrix.new_empty((1, 1)).expand(product.shape)
        if matrix.dtype not in KINDS or not all(m.matches(whole) for m in members):
            raise UnfitError
        found = self._columns(product, bias, members)
        made = [m.give(_at_places(found, m, whole)) for m in members]
        return list(map(cast_as, made, like))

    def _columns(self, product: Product, bias: Tensor | None, members: Sequence[Member]) -> Columns:
        """The columns of all members."""
        target, ignored = _target(product, members)
        lse, own, total, _, best = cross_entropy_rows(
            self._hidden(product),
            product.weight,
            target,
            bias,
            self.chain.cap,
            ignored,
            any(m.total for m in members),
            False,
            any(isinstance(m, Best) for m in members),
            product.filter_threshold,
        )
        lse, own, total, best = (t.unsqueeze(1) for t in (lse, own, total, best))
        norm, classes = lse, product.weight.shape[0]
        if any(m.normalised for m in members):  # a row without a softmax: NaN, its slopes too
            norm = lse * torch.where(lse.detach().isfinite(), 1.0, torch.nan)
        return Columns(norm, lse.detach(), own, total, None, None, None, classes, best)

    def _hidden(self, product: Product) -> Tensor:
        """Times ``a``, but not in float16, whose range might not do."""
        slope, _ = self.chain.scales
        hidden = product.hidden
        if slope != 1 and hidden.dtype == torch.float16:
            raise UnfitError
        return hidden.contiguous() if slope == 1 else (hidden * slope).contiguous()

    def _bias(self, product: Product, values: dict[str, Any]) -> Tensor | None:
        if self.chain.bias is None:
            return None
        bias: Tensor = values[self.chain.bias]
        if bias.shape != product.weight.shape[:1] or bias.dtype not in KINDS:
            raise UnfitError
        _, shift = self.chain.scales
        return bias if shift == 1 else bias.float() * shift


def _target(product: Product, members: Sequence[Member]) -> tuple[Tensor, int]:
    """The one class of each row that members pick, and the class that they ignore."""
    for member in members:
        if isinstance(member, Loss):
            return member.target, member.ignored
        if isinstance(member, Picked):
            if member.at.shape[1] != 1:
                raise UnfitError
            return member.at.squeeze(1), _NONE
    return product.hidden.new_zeros(product.hidden.shape[0], dtype=torch.int64), _NONE


def _at_places(found: Columns, member: Member, x: Tensor) -> Columns:
    return found._replace(places=member.places(x))


def picks(member: Member) -> tuple[Name, int] | None:
    """Which classes a member picks, by the name of their tensor, and which one it ignores."""
    if isinstance(member, Loss):
        return member.target, member.ignored
    return (member.at, _NONE) if isinstance(member, Picked) else None
