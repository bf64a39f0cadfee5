"""What the loss of a model gains when one of its weights is rounded: estimates from few samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from graphopt.errors import GraphoptError
from graphopt.passes.quantize.allocation import Choice
from graphopt.passes.quantize.gradients import Slopes, slopes
from graphopt.passes.quantize.methods import Methods
from graphopt.passes.quantize.observed import Observed
from graphopt.passes.quantize.plan import Settings, rounded
from graphopt.program import Program
from graphopt.rewrite import Match

KINDS = ("output", "hessian")
SAMPLES = 32
"""Calibration inputs that are looked at, at most."""

Progress = Callable[[str], None]


class Target(NamedTuple):
    """A weight that is to be stored in one of several formats.

    Attributes:
        match: all that read it.
        matrices: what is stored of it, each ``(N, K)``.
        settings: the formats.
    """

    match: Match
    matrices: Sequence[Tensor]
    settings: Sequence[Settings]

    @property
    def weight(self) -> fx.Node:
        node: fx.Node = self.match["weight"]
        return node

    @property
    def products(self) -> list[fx.Node]:
        """All readers, where these are products of matrices and nothing else."""
        plain = all(n.target is torch.ops.aten.linear.default for n in self.match.nodes)
        return list(self.match.nodes) if plain else []


def choices(
    program: Program,
    targets: Sequence[Target],
    samples: Sequence[Sequence[Any]],
    kind: str,
    progress: Progress,
) -> list[list[Choice]]:
    """Bytes and expected increase of the loss, for each format of each weight.

    The loss is that of `gradients`: for logits the divergence (nats per row) from what the model
    gave, else the squared error of its outputs relative to their size.

    Args:
        samples: flat user inputs; the first `SAMPLES` count.
        kind: ``"output"``: the squared error of each output channel of a product, the diagonal of
            ``E H E^T`` with the second moment H of its inputs and the error E of the weight, times
            the mean squared gradient there: the Hessian as a product of two factors (Martens &
            Grosse 2015, "K-FAC", section 3), of which one is taken as diagonal. ``"hessian"``: the
            mean of the Hessian's diagonal times ``|E|^2`` (Dong et al. 2020, "HAWQ-V2", section
            3.2), which does not see which inputs of a product are large; weights that are read by
            something else than products of matrices are always judged by it.

    Errors are those of rounding to nearest, or of ``hqq``: other methods make all of them smaller.

    Raises:
        GraphoptError: samples hold NaN, or the model has no gradients.
    """
    samples = samples[:SAMPLES]
    progress("gradients of calibration inputs")
    products = [n for t in targets for n in t.products] if kind == "output" else []
    found = slopes(program, samples, products, [t.weight for t in targets])
    _check(program, found)
    moments = _Moments(program, samples, products)
    made: dict[int, list[Choice]] = {}
    for index in sorted(range(len(targets)), key=lambda i: moments.place(targets[i].products)):
        target = targets[index]
        seen = moments.of(target.products)
        made[index] = [_choice(target, each, found, seen) for each in target.settings]
        progress(f"errors of {len(made)} of {len(targets)} weights")
    return [made[index] for index in range(len(targets))]


def _choice(
    target: Target, settings: Settings, found: Slopes, seen: Mapping[fx.Node, Tensor]
) -> Choice:
    methods = Methods("hqq" if settings.methods.rounding == "hqq" else "rtn")
    moment = sum(seen.values()) if seen else None
    size, loss = 0, 0.0
    for matrix in target.matrices:
        stored = rounded(matrix.detach(), settings.scheme, methods, moment)
        error = stored.dequantize() - matrix.detach().to(torch.float32)
        size += stored.nbytes
        if not seen:
            loss += found.weights[target.weight] * float(error.square().sum())
        for product, inputs in seen.items():
            channels = (error @ inputs).mul_(error).sum(1)
            loss += float((channels * found.rows[product].to(channels)).sum().clamp(min=0))
    return Choice(size, loss * found.unit)


class _Moments:
    """Second moments ``(K, K)`` of inputs, means over samples; products are asked for in order."""

    def __init__(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        products: Sequence[fx.Node],
    ) -> None:
        self.count = len(samples)
        self.observed = Observed(program, samples, products)
        self.order = {node: i for i, node in enumerate(self.observed.left)}
        self.open = set(products)

    def place(self, products: Sequence[fx.Node]) -> int:
        """When all of them have run."""
        return max((self.order.get(n, -1) for n in products), default=-1)

    def of(self, products: Sequence[fx.Node]) -> dict[fx.Node, Tensor]:
        wanted = [n for n in products if n in self.order]
        while self.observed.left_of(wanted):
            self.observed.next()
        pairs = zip(wanted, self.observed.of(wanted), strict=True)
        found = {node: seen.moment / self.count for node, seen in pairs}
        self.open.difference_update(wanted)
        self.observed.keep(self.open - {*self.observed.left})
        return found


def _check(program: Program, found: Slopes) -> None:
    sums = (*found.weights.values(), *(float(row.sum()) for row in found.rows.values()))
    if not torch.tensor(sums, dtype=torch.float64).isfinite().all():
        raise GraphoptError(
            f"{program.name}: gradients of its outputs on calibration inputs are NaN or infinite",
            where="calibration",
            fix="leave those inputs out, or correct their values",
        )
