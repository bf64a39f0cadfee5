"""Sizes of 1: a trace assumes at least 2, so whether its graph is the model there is tried.

``x.squeeze()``, ``if x.shape[0] == 1`` and broadcasting mean something else at 1, and a trace keeps
no condition for them. Where the graph and the model differ, the size becomes one that calls may not
have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.capture_call import Example
from graphopt.capture_watch import left_as_it_is
from graphopt.errors import CaptureError
from graphopt.program import Program, val
from graphopt.rewrite.rule import Numeric
from graphopt.room import crowded
from graphopt.signature import Assumption, OutputKind
from graphopt.verify.inputs import accepts, combinations_with_one, fresh_inputs, symbols_of
from graphopt.verify.measure import compare, kernel_tolerance

_SEED = 6011


@dataclass(frozen=True)
class Answer:
    """What one run gave: flat outputs, and buffers by name as they were after it."""

    outputs: Sequence[Any]
    buffers: dict[str, Any]


Run = Callable[[Sequence[Any]], Answer]


def settle_ones(program: Program, model: Run | None) -> None:
    """Add an assumption wherever a size of 1 is allowed at which the program is not the model.

    Args:
        model: the original on flat inputs; without one, only what fails at 1 is excluded.

    Raises:
        CaptureError: the example itself has such a size.
    """
    known = symbols_of(program) if model is not None or program.example_inputs else {}
    for sizes in combinations_with_one(program) if known else ():
        if not accepts(program, sizes) or crowded(program, sizes=sizes):
            continue
        why = _difference(program, fresh_inputs(program, sizes), model)
        if why is None:
            continue
        short = [symbol for symbol, size in sizes.items() if size == 1]
        assumption = _assumption(program, short, why)
        program.assumptions = (*program.assumptions, assumption)
        program.notes.append(str(assumption.reason))
        if not accepts(program, known):
            raise CaptureError(
                f"the example has a size of 1 that cannot be dynamic: {assumption.reason}",
                fix="give an example with sizes of at least 2, or leave axes of size 1 out of "
                "dynamic_shapes",
            )


def _difference(program: Program, inputs: Sequence[Any], model: Run | None) -> str | None:
    """Why the program is not the model on these inputs; ``None`` where it is."""
    graph = _attempt(lambda given: _answer(program, given), inputs)
    eager = graph if model is None else _attempt(model, inputs)
    for answer, who in ((eager, "the model itself"), (graph, "the captured graph")):
        if isinstance(answer, Exception):
            first = str(answer).strip().splitlines() or [""]
            return f"{who} raises {type(answer).__name__}: {first[0]}"
    assert isinstance(graph, Answer) and isinstance(eager, Answer)
    wanted = [*eager.outputs, *(eager.buffers[name] for name in graph.buffers)]
    found = [*graph.outputs, *graph.buffers.values()]
    same = len(wanted) == len(found) and all(map(_agree, wanted, found))
    return None if same else "the model computes something else than the captured graph"


def _agree(wanted: Any, found: Any) -> bool:
    tolerance = kernel_tolerance(wanted)
    return compare(wanted, found, wanted, Numeric.LOSSY, tolerance=tolerance).ok


def _attempt(run: Run, inputs: Sequence[Any]) -> Answer | Exception:
    copies = pytree.tree_map_only(Tensor, torch.clone, list(inputs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        try:
            return run(copies)
        except Exception as error:
            return error


def _answer(program: Program, inputs: Sequence[Any]) -> Answer:
    pairs = list(zip(program.outputs, program.run(inputs), strict=True))
    outputs = [value for spec, value in pairs if spec.kind is OutputKind.USER]
    buffers = {
        str(spec.target): value for spec, value in pairs if spec.kind is OutputKind.BUFFER_MUTATION
    }
    return Answer(outputs, buffers)


def eager(example: Example) -> Run:
    """The example's model on flat inputs of its call; every run leaves it as it was."""
    spec = pytree.tree_structure(example.call)

    def run(inputs: Sequence[Any]) -> Answer:
        args, kwargs = pytree.tree_unflatten(list(inputs), spec)
        with left_as_it_is(example.model):
            outputs = pytree.tree_leaves(example.model(*args, **kwargs, **example.flags))
            named = example.model.named_buffers(remove_duplicate=False)
            return Answer(outputs, {name: buffer.clone() for name, buffer in named})

    return run


def _assumption(program: Program, short: Sequence[sympy.Symbol], why: str) -> Assumption:
    """The condition that not all of the given sizes are 1, and the reason in the user's words."""
    axes = [_axis(program, symbol) for symbol in short]
    if len(axes) == 1:
        return Assumption(f"{short[0]} >= 2", None, f"{axes[0]} must be at least 2; at 1 {why}")
    text = f"max({', '.join(map(str, short))}) >= 2"
    return Assumption(text, None, f"{' and '.join(axes)} must not all be 1; there {why}")


def _axis(program: Program, symbol: sympy.Symbol) -> str:
    """Where a symbol stands first: ``axis 0 of ids (`batch`)``."""
    name = f" (`{program.axis_names[symbol]}`)" if symbol in program.axis_names else ""
    for node in program.user_inputs():
        fake = val(node)
        for axis, size in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                return f"axis {axis} of {node.name}{name}"
        if isinstance(fake, torch.SymInt) and fake.node.expr == symbol:
            return f"{node.name}{name}"
    return str(symbol)
