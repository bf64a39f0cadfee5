"""Running the whole program and the whole original on the same inputs, and judging the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.program import Program
from graphopt.rewrite.rule import Numeric
from graphopt.verify.inputs import (
    fresh_inputs,
    is_empty,
    sizes_of_one,
    symbols_of,
    unseen_sizes,
)
from graphopt.verify.measure import SENSITIVE, Measure
from graphopt.verify.whole import Outcome, compare_outcomes, run_program

DRAWS = 4
"""How often the original runs with random rounding where its own error is measured again."""

Lower = Callable[[fx.GraphModule], Callable[..., Any]]


def trial_inputs(program: Program, *, ones: bool = True) -> tuple[list[list[Any]], list[str]]:
    """Sets of flat user inputs to try, and in words which of them the program itself refuses.

    The captured inputs come first, then fresh values at sizes that were not seen at capture and,
    with ``ones``, at sizes of 1.
    """
    known = symbols_of(program)
    small = [sizes for sizes in sizes_of_one(program) if sizes != known] if ones else []
    inputs, refused = [list(program.example_inputs)], dict[str, None]()
    if is_empty(program.example_inputs):
        refused["the example inputs are empty: nothing could be compared on them"] = None
    found = [unseen_or_refused(program), *(fresh_or_refused(program, sizes) for sizes in small)]
    for fresh, why in found:
        if why is None:
            inputs.append(fresh)
        else:
            refused[f"random inputs were not tried: {why}"] = None
    return inputs, list(refused)


def fresh_or_refused(
    program: Program, sizes: Mapping[sympy.Symbol, int]
) -> tuple[list[Any], str | None]:
    """Fresh inputs, and why the program does not take them (a loss of probabilities, say)."""
    fresh = fresh_inputs(program, sizes)
    try:
        run_program(program, fresh, wide=False, grad=False)
    except (RuntimeError, IndexError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        return fresh, f"the model refuses them ({first})"
    return fresh, None


def unseen_or_refused(program: Program) -> tuple[list[Any], str | None]:
    """Fresh inputs of sizes that were not seen, of others where the program refuses the first."""
    fresh, why = fresh_or_refused(program, unseen_sizes(program))
    if why is None or not symbols_of(program):
        return fresh, why
    other, still = fresh_or_refused(program, unseen_sizes(program, doubled=True))
    return (other, None) if still is None else (fresh, why)


def hold(
    original: Program,
    optimized: Program,
    inputs: Sequence[Any],
    numeric: Numeric,
    tolerance: float = 0.0,
    *,
    lower: Lower | None = None,
    reference: Program | None = None,
    seen: Callable[[Outcome, Outcome], None] | None = None,
) -> tuple[Measure, Measure | None]:
    """Measures of outputs and, where the model trains, of gradients.

    Where one is outside its bound, the original's own error is measured again, with random
    rounding: a model that magnifies rounding is not held to a run that was near by luck.

    Args:
        tolerance: for lossy programs, the largest relative RMS error.
        lower: makes the optimized graph executable, where the interpreter is not to run it.
        reference: what in float64 both are held to, where it is not the original itself: the
            original without what it rounds. What rounding costs it, in runs with random rounding
            too, is the measure then.
        seen: is shown what the optimized program gave, and the original in float64.
    """
    grad = not original.frozen
    old = run_program(original, inputs, wide=False, grad=grad)
    exact = run_program(reference or original, inputs, wide=True, grad=grad)
    new = run_program(optimized, inputs, wide=False, grad=grad, lower=lower)
    found = compare_outcomes(old, new, exact, numeric, tolerance)
    if seen is not None:
        seen(new, exact)
    if numeric is Numeric.LOSSY or all(m is None or m.ok for m in found):
        return found
    rounded = rounded_runs(original, inputs)
    sensitive = SENSITIVE if reference is None else math.inf
    return compare_outcomes(old, new, exact, numeric, rounded=rounded, sensitive=sensitive)


def rounded_runs(program: Program, inputs: Sequence[Any]) -> list[Outcome]:
    """The program run again, each time with every intermediate value rounded at random."""
    grad = not program.frozen
    return [
        run_program(program, inputs, wide=False, grad=grad, lower=partial(_rounding, seed))
        for seed in range(DRAWS)
    ]


def _rounding(seed: int, module: fx.GraphModule) -> Callable[..., Any]:
    return RandomRounding(module, torch.Generator().manual_seed(seed)).run


class RandomRounding(fx.Interpreter):
    """Multiplies every floating result by ``1 + u``, u uniform within its dtype's eps.

    The spread of the outputs over several runs is what rounding does to this program (Parker,
    Monte Carlo Arithmetic: How to gamble with floating point and win, 1997, random rounding).
    """

    def __init__(self, module: fx.GraphModule, generator: torch.Generator) -> None:
        super().__init__(module)
        self.generator = generator

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        made = n.op == "call_function" and isinstance(value, Tensor)
        return self._rounded(value) if made and value.is_floating_point() else value

    def _rounded(self, value: Tensor) -> Tensor:
        drawn = torch.rand(value.shape, generator=self.generator, dtype=torch.float64) * 2 - 1
        factor = 1 + drawn.to(value.device) * torch.finfo(value.dtype).eps
        moved = (value * factor).to(value.dtype)
        return torch.where(moved.isfinite(), moved, value)
