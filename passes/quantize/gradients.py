"""How much a model's outputs feel its weights: gradients of samples, as output Fisher information.

For outputs f with the loss ``|f - f0|^2 / |f0|^2`` the Gauss-Newton matrix of weights is ``J^T J /
|f0|^2``, J the derivative of f. It is the second moment of the gradient of ``(v * f).sum() / |f0|``
with random signs v (Hutchinson 1990). For logits, where the loss is the divergence from what the
model gave, it is that of the log-probability of classes drawn from this (Martens 2020, "New
insights and perspectives on the natural gradient method", section 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from graphopt.analysis.flow import ancestors
from graphopt.analysis.regions import FIXED
from graphopt.calibration import Segment
from graphopt.calibration.segment import widened
from graphopt.errors import GraphoptError
from graphopt.program import Program, val
from graphopt.quantized_outputs import output_names

DRAWS = 16
"""Gradients that are taken at least, over all samples."""


class Slopes(NamedTuple):
    """Means over samples and draws.

    Attributes:
        rows: by product, for each output channel ``(N,)``: the mean over rows of squared gradients.
        weights: by weight: the sum of squared gradients over the number of its entries, which is
            the mean of the diagonal of the Hessian of the loss of a sample.
        unit: what squared changes are multiplied by to be the loss of a sample.
    """

    rows: Mapping[fx.Node, Tensor]
    weights: Mapping[fx.Node, float]
    unit: float


def slopes(
    program: Program,
    samples: Sequence[Sequence[Any]],
    products: Iterable[fx.Node],
    weights: Iterable[fx.Node],
) -> Slopes:
    """Of a program's outputs on samples, in the memory that training on one of them takes.

    Args:
        products: calls of ``linear``.
        weights: state that is differentiated.

    Raises:
        GraphoptError: there are no outputs in floats, or they cannot be differentiated.
    """
    return _Slopes(program, list(products), list(weights)).run(samples)


class _Slopes:
    def __init__(
        self, program: Program, products: Sequence[fx.Node], weights: Sequence[fx.Node]
    ) -> None:
        self.program = program
        self.outputs, self.draw = _outputs(program)
        needed = ancestors(self.outputs)
        nodes = tuple(n for n in program.graph.nodes if n in needed and n.op not in FIXED)
        self.segment = Segment(nodes, tuple(self.outputs))
        self.stands = {n: partial(self._product, n) for n in products if n in needed}
        self.rows = {n: [0.0, 0] for n in products}
        self.sums = dict.fromkeys(weights, 0.0)
        self.state: dict[fx.Node, Any] = {}

    def run(self, samples: Sequence[Sequence[Any]]) -> Slopes:
        draws = max(1, -(-DRAWS // len(samples)))
        devices = {t.device for t in self.program.state.values() if t.device.type == "cuda"}
        unit = 0.0
        with torch.inference_mode(False), torch.random.fork_rng(devices), torch.enable_grad():
            torch.manual_seed(0)
            self.state = {n: self._held(n, n in self.sums) for n in self.segment.reads}
            for sample in samples:
                unit += self._sample(sample, draws) / len(samples)
        count = draws * len(samples)
        weights = {n: total / count / val(n).numel() for n, total in self.sums.items()}
        rows = {n: total / max(seen, 1) for n, (total, seen) in self.rows.items()}
        shaped = {n: torch.as_tensor(r).expand(val(n).shape[-1]) for n, r in rows.items()}
        return Slopes(shaped, weights, unit)

    def _sample(self, sample: Sequence[Any], draws: int) -> float:
        given = dict(zip(self.program.user_inputs(), sample, strict=True))
        try:
            outputs = self.segment.run({**self.state, **_read(given, self.segment)}, self.stands)
            unit = 1.0
            for left in reversed(range(draws)):
                loss, unit = self.draw(outputs)
                loss.backward(retain_graph=left > 0)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise GraphoptError(
                f"{self.program.name} has no gradients that say how sensitive its weights are: "
                f"{error!s:.200}",
                where="QuantizeMatmul:bits",
                fix="give bits= as one number, and layers= for those that differ",
            ) from error
        return unit

    def _held(self, node: fx.Node, differentiated: bool) -> Any:
        if node.op == "get_attr":
            return attrgetter(str(node.target))(self.program.graph_module)
        name = self.program.target_of(node)
        if name is None:
            return None
        held = widened(self.program.state[name].detach())
        if not differentiated:
            return held
        leaf = held.view_as(held).requires_grad_()
        leaf.register_post_accumulate_grad_hook(partial(self._weight, node))
        return leaf

    def _weight(self, node: fx.Node, leaf: Tensor) -> None:
        assert leaf.grad is not None  # a hook behind its accumulation
        self.sums[node] += float(leaf.grad.square().sum(dtype=torch.float64))
        leaf.grad = None

    def _product(self, node: fx.Node, x: Tensor, weight: Tensor, bias: Any = None) -> Tensor:
        made = F.linear(x, weight, bias)
        if made.requires_grad:
            made.register_hook(partial(self._row, node))
        return made

    def _row(self, node: fx.Node, gradient: Tensor) -> None:
        total, seen = self.rows[node]
        rows = gradient.reshape(-1, gradient.shape[-1])
        self.rows[node] = [total + rows.square().sum(0), seen + len(rows)]


def _read(given: Mapping[fx.Node, Any], segment: Segment) -> dict[fx.Node, Any]:
    return {node: value for node, value in given.items() if node in segment.reads}


Draw = Callable[[Sequence[Tensor]], tuple[Tensor, float]]


def _outputs(program: Program) -> tuple[list[fx.Node], Draw]:
    """Logits, where the model names them so, and else all floats; and how a gradient is drawn."""
    named = zip(program.user_outputs(), output_names(program), strict=True)
    shown = [(n, name) for n, name in named if isinstance(n, fx.Node) and _is_float(n)]
    for node, name in shown:
        if name == "logits":
            return [node], _classes
    floats = [node for node, _ in shown]
    if not floats:
        raise GraphoptError(
            f"{program.name} returns no floats: nothing says how sensitive its weights are",
            where="QuantizeMatmul:bits",
            fix="give bits= as one number, and layers= for those that differ",
        )
    return list(dict.fromkeys(floats)), _signs


def _is_float(node: fx.Node) -> bool:
    fake = val(node)
    return isinstance(fake, Tensor) and fake.is_floating_point()


def _classes(outputs: Sequence[Tensor]) -> tuple[Tensor, float]:
    """The log-probability of classes drawn for each row, and half of one over the rows."""
    rows = outputs[0].flatten(0, -2) if outputs[0].dim() > 1 else outputs[0][None]
    chosen = torch.multinomial(rows.detach().softmax(-1), 1)
    return rows.log_softmax(-1).gather(-1, chosen).sum(), 0.5 / len(rows)


def _signs(outputs: Sequence[Tensor]) -> tuple[Tensor, float]:
    """Each output in a random direction, relative to its size."""
    terms = []
    for value in outputs:
        size = value.detach().norm().clamp(min=1e-30)
        terms.append((value * torch.randn_like(value).sign()).sum() / size)
    return torch.stack(terms).sum(), 1.0
