"""Handing the rewritten graph on to Inductor, and checking what comes back."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.emit.chunk_bodies import compile_bodies
from graphopt.emit.deferring import apart
from graphopt.emit.held import fault
from graphopt.emit.laid_out import TOLERANCE
from graphopt.emit.module import OptimizedModule
from graphopt.emit.spelled import spelled
from graphopt.errors import VerificationError
from graphopt.program import Program, is_random
from graphopt.room import WITH_GRADIENTS, crowded
from graphopt.verify.filtered import full_program, is_filtered
from graphopt.verify.trials import Lower

if TYPE_CHECKING:
    from graphopt.recipe import Options

OPTIONS: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
"""On a CPU: a product and the sum after it as one instruction, rounded once. Inductor keeps them
apart, for the bits of eager mode, which float64 does not ask for. all-MiniLM-L6-v2 in int8 takes
64.0 ms instead of 67.3 on one core."""


def to_inductor(
    module: OptimizedModule, original: Program, options: Options, executed: Program | None = None
) -> None:
    """Compile the module's graph with Inductor; keep it only if it holds to float64.

    Outputs are checked on the captured and on unseen sizes, with gradients where the model trains.
    Inductor draws dropout masks in its own order, so a graph with dropout is compiled once more
    with the probability at 0, and that is what is checked; so is one whose gradients are filtered,
    with the gradients in full. Where the original does not fit in
    memory, or was approximated, what is compiled is compared with the rewritten graph.

    Args:
        executed: what the module runs, where that is a twin of its program.

    Raises:
        VerificationError: with ``strict``, where Inductor's code is wrong or cannot be made.
    """
    plain, quick = module._graph.code, module._graph.fast
    options.progress("inductor")
    dynamic = True if original.range_constraints else None
    notes = dict[str, None]()
    by_inductor = partial(_compiled, dynamic=dynamic, notes=notes, measure=options.measure)
    compile_graph = partial(apart, lower=by_inductor)
    module._graph.code, module._graph.fast = compile_graph(plain), None
    graph = (executed or module.program).graph
    apart_from_it = any(map(is_random, graph.nodes)) or is_filtered(graph)
    lower = compile_graph if apart_from_it else lambda _graph: module._graph.code
    why = _fault(module, original, lower, executed or module.program)
    if why is None:
        module.report.notes += notes
        return
    module._graph.code, module._graph.fast = plain, quick
    message = f"Inductor's code for {original.name} {why}"
    if options.strict:
        raise VerificationError(message, fix="use target='torch'")
    module.report.notes.append(f"{message}; the torch target was kept")


def _compiled(
    graph_module: fx.GraphModule,
    dynamic: bool | None,
    notes: dict[str, None],
    *,
    measure: bool,
) -> Callable[..., Any]:
    made = spelled(graph_module)
    if measure:
        notes |= dict.fromkeys(compile_bodies(made.graph))
        made.recompile()
    return torch.compile(made, dynamic=dynamic, fullgraph=True, options=OPTIONS)


def _fault(
    module: OptimizedModule, original: Program, lower: Lower, executed: Program
) -> str | None:
    """What is wrong with the compiled graph, in words; ``None`` where nothing is."""
    program = full_program(executed)
    tolerance = 0.0 if program.state.keys() <= module.program.state.keys() else TOLERANCE
    alone = module.report.losses or crowded(original, WITH_GRADIENTS)
    reference = program if alone else original
    failures = (torch._dynamo.exc.TorchDynamoException,)
    return fault(reference, program, lower, tolerance=tolerance, failures=failures)
