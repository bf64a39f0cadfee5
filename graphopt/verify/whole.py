"""The whole program against the whole original, forward and backward, held to float64."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.program import Program
from graphopt.rewrite.rule import Numeric
from graphopt.rewrite.subgraph import float64_by_default, widen
from graphopt.signature import OutputKind
from graphopt.verify.inputs import is_empty
from graphopt.verify.measure import SENSITIVE, Measure, compare, rms, worst
from graphopt.verify.replay import SEED, without_dropout


@dataclass(frozen=True)
class Outcome:
    """Outputs and parameter gradients of one run; gradients by state or input name."""

    outputs: tuple[Any, ...]
    gradients: Mapping[str, Tensor]


Run = Callable[[Sequence[Any]], Outcome]


def run_program(
    program: Program,
    inputs: Sequence[Any],
    *,
    wide: bool,
    grad: bool,
    lower: Callable[[fx.GraphModule], Callable[..., Any]] | None = None,
) -> Outcome:
    """Execute with dropout off; in float64 throughout where ``wide``, through ``lower`` if given.

    Gradients are of the sum of all floating outputs times a fixed random cotangent, with respect to
    every parameter (by its name) and every floating user input (by its placeholder's name). Where
    an operator takes no gradient for an input (some losses for their target), user inputs get none.
    """
    graph = without_dropout(program.graph)
    graph = widen(graph) if wide else graph
    module = fx.GraphModule(program.graph_module, graph)
    call = lower(module) if lower else (_Wide(module) if wide else fx.Interpreter(module)).run
    asked = program.differentiable() if grad and not is_empty(inputs) else frozenset()
    dtypes = float64_by_default() if wide else nullcontext()
    with dtypes, torch.set_grad_enabled(grad), torch.random.fork_rng(devices=[]):
        try:
            return _run(program, call, _leaves(program, inputs, asked, wide=wide))
        except RuntimeError as error:
            if not asked or "is not differentiable with respect to" not in str(error):
                raise
            asked &= {node.name for node in program.state_nodes()}
            return _run(program, call, _leaves(program, inputs, asked, wide=wide))


class _Wide(fx.Interpreter):
    """In float64, though inputs are given as they are: each is widened where it is read.

    Weights held wide all at once would take more memory than all else.
    """

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:  # noqa: ARG002
        def load(read: fx.Node) -> Any:
            value = self.env[read]
            narrow = read.op == "placeholder" and isinstance(value, Tensor)
            return value.double() if narrow and value.is_floating_point() else value

        return fx.node.map_arg(args, load)


def _run(program: Program, call: Callable[..., Any], leaves: Mapping[str, Any]) -> Outcome:
    torch.manual_seed(SEED)
    outputs = tuple(call(*[leaves[n.name] for n in program.placeholders()]))
    gradients = _backward(program, leaves, outputs)
    return Outcome(tuple(o.detach() if isinstance(o, Tensor) else o for o in outputs), gradients)


def _leaves(
    program: Program, inputs: Sequence[Any], asked: Collection[str], *, wide: bool
) -> dict[str, Any]:
    given = iter(inputs)
    made: dict[int, Any] = {}
    found = {}
    for node in program.placeholders():
        target = program.inputs[node.name].target
        value = next(given) if target is None else program.state[target]
        leaf = _leaf(value, wide=wide, grad=node.name in asked)
        found[node.name] = made.setdefault(id(value), leaf)
    return found


def _leaf(value: Any, *, wide: bool, grad: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    plain = value.detach()
    if not plain.is_floating_point():
        return plain
    if not grad:
        return plain  # see `_Wide`
    return (plain.double() if wide else plain).detach().clone().requires_grad_()


def _backward(
    program: Program, leaves: Mapping[str, Any], outputs: Sequence[Any]
) -> dict[str, Tensor]:
    """Gradients of those leaves that ask for one."""
    user = [o for o, s in zip(outputs, program.outputs, strict=True) if s.kind is OutputKind.USER]
    results = [o for o in user if isinstance(o, Tensor) and o.requires_grad]
    names = {
        program.inputs[k].target or k: v
        for k, v in leaves.items()
        if isinstance(v, Tensor) and v.requires_grad
    }
    if not results or not names:
        return {}
    generator = torch.Generator().manual_seed(SEED)
    drawn = [torch.randn(r.shape, generator=generator, dtype=torch.float64) for r in results]
    cotangents = [d.to(r.device, r.dtype) for d, r in zip(drawn, results, strict=True)]
    try:
        found = torch.autograd.grad(results, list(names.values()), cotangents, allow_unused=True)
    except RuntimeError as error:
        if "is not implemented" in str(error):  # the derivative of an operator
            return {}
        raise
    pairs = zip(names.items(), found, strict=True)
    return {k: torch.zeros_like(v) if g is None else g for (k, v), g in pairs}


def compare_outcomes(
    old: Outcome,
    new: Outcome,
    reference: Outcome,
    numeric: Numeric,
    tolerance: float = 0.0,
    rounded: Sequence[Outcome] = (),
    sensitive: float = SENSITIVE,
) -> tuple[Measure, Measure | None]:
    """Measures of outputs and of gradients (``None`` where the old program has no gradients).

    Args:
        tolerance: for lossy programs, the largest relative RMS error.
        rounded: the old program again, with random rounding; its errors count up to ``sensitive``.
    """
    judged = partial(compare, numeric=numeric, tolerance=tolerance, sensitive=sensitive)
    outputs = [
        judged(o, n, r, rounded=[m.outputs[i] for m in rounded])
        for i, (o, n, r) in enumerate(zip(old.outputs, new.outputs, reference.outputs, strict=True))
    ]
    again = [m.gradients for m in rounded]
    loose = Numeric.REASSOCIATED if numeric is Numeric.BITWISE else numeric
    gradients = _compare_gradients(
        old.gradients, new.gradients, reference.gradients, partial(judged, numeric=loose), again
    )
    return worst(outputs), worst(gradients) if gradients else None


def _compare_gradients(
    old: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    reference: Mapping[str, Tensor],
    judged: Callable[..., Measure],
    rounded: Sequence[Mapping[str, Tensor]],
) -> list[Measure]:
    """A parameter that the new program does not have must have had no gradient."""
    known = {name: new.get(name, torch.zeros_like(gradient)) for name, gradient in old.items()}
    largest = max(map(rms, reference.values()), default=0.0)
    return [
        judged(old[k], known[k], reference[k], magnitude=largest, rounded=[m[k] for m in rounded])
        for k in old
        if k in reference
    ]


def hash_inputs(inputs: Sequence[Any]) -> str:
    """SHA-256 over shapes, dtypes and values."""
    digest = hashlib.sha256()
    for value in inputs:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
            plain = value.detach().cpu().contiguous()
            digest.update(
                plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b""
            )
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
