"""The target ``"onnxruntime"``: regions where they are faster, kept where the whole verifies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from graphopt.analysis.splice import replace_region
from graphopt.emit.held import fault
from graphopt.emit.module import OptimizedModule
from graphopt.emit.onnx_quantized.calls import quantized_nodes, unrounded
from graphopt.emit.ort.nodes import return_views_apart
from graphopt.emit.ort.programs import root_sizes
from graphopt.emit.ort.providers import resolve_providers
from graphopt.emit.ort.regions import Piece, Placement, Placer
from graphopt.emit.ort.sessions import Settings
from graphopt.errors import GraphoptError, VerificationError
from graphopt.program import Program
from graphopt.room import WITH_GRADIENTS, crowded
from graphopt.verify.timing import Pace, interleaved

if TYPE_CHECKING:
    from graphopt.recipe import Options

SHARED = 1.1
"""Times as long as with copies of weights a region may take without them: memory comes first."""
SECONDS = 0.5
"""Of timing for each pair of versions."""


def refuse_training(program: Program) -> None:
    """Refuse a model in training mode.

    Raises:
        GraphoptError: it was captured in training mode.
    """
    if program.training:
        raise GraphoptError(
            f"{program.name} is in training mode, and ONNX Runtime computes no gradients",
            where="option target",
            fix="call model.eval() first, or take target='torch' or 'inductor'",
        )


def to_onnxruntime(module: OptimizedModule, original: Program, options: Options) -> None:
    """Let regions of the module's graph run in ONNX Runtime; keep that only if the whole verifies.

    Args:
        original: the program before it was rewritten.

    Raises:
        VerificationError: with ``strict``, where the outputs are wrong.
    """
    refuse_training(module.program)
    placement = placed(module.program, options)
    if options.measure:
        options.progress("onnxruntime: time regions")
        _keep_faster(placement)
    plain, quick = module._graph.code, module._graph.fast
    module._graph.code, module._graph.fast = _assembled(placement), None
    options.progress("onnxruntime: verify")
    why = _fault(module, original, placement)
    if why is None:
        providers = list(placement.settings.providers)
        module._lowered = {"target": "onnxruntime", "providers": providers}
        module._lowered["measure"] = options.measure
        return
    module._graph.code, module._graph.fast = plain, quick
    message = f"{original.name} in ONNX Runtime {why}"
    if options.strict:
        raise VerificationError(message, fix="use target='torch'")
    module.report.notes.append(f"{message}; the torch target was kept")


def placed(program: Program, options: Options) -> Placement:
    """Which nodes of a program ONNX Runtime takes, in regions."""
    twin = program.copy()
    root_sizes(twin)
    return_views_apart(twin)
    options.progress("onnxruntime: translate")
    providers = options.providers or resolve_providers(None, _device(program))
    settings = Settings(tuple(providers))
    return Placer(twin, settings, measure=options.measure).place()


def _device(program: Program) -> str:
    tensors = (t for t in (*program.state.values(), *program.example_inputs))
    return next((t.device.type for t in tensors if isinstance(t, Tensor)), "cpu")


def _assembled(placement: Placement) -> fx.GraphModule:
    """The graph with each region as one call."""
    twin = placement.program
    for index, piece in enumerate(placement.pieces):
        name = f"onnxruntime_{index}"
        made = replace_region(twin.graph, piece.region, piece.module, inline=False, name=name)
        call: Any = made[0].args[0]
        call.args = (*call.args, *piece.extra)
    twin.recompile()
    return twin.graph_module


def _fault(module: OptimizedModule, original: Program, placement: Placement) -> str | None:
    program, code = module.program, module._graph.code
    tolerance = math.sqrt(sum(p.model.tolerance**2 for p in placement.pieces))
    reference = original
    if module.report.losses or crowded(original, WITH_GRADIENTS):
        reference = unrounded(program) if quantized_nodes(program) else program
    failures = (GraphoptError, RuntimeError)
    return fault(
        reference, program, lambda _: code, tolerance=tolerance, ones=True, failures=failures
    )


def _keep_faster(placement: Placement) -> None:
    """Leave regions to torch that are not faster in ONNX Runtime, here, on the captured inputs."""
    for piece in list(placement.pieces):
        pace = _pace(piece.module.plain, piece.module, piece)
        if pace.new >= pace.old:
            placement.leave(piece, _slower(pace))


def _pace(old: Callable[..., Any], new: Callable[..., Any], piece: Piece) -> Pace:
    given, taken = piece.values, piece.module.layout.plain
    with torch.no_grad():
        return interleaved(lambda: old(*given[:taken]), lambda: new(*given), SECONDS)


def _slower(pace: Pace) -> str:
    return f"not faster in ONNX Runtime: {pace.new * 1e6:.0f} us, {pace.old * 1e6:.0f} us in torch"
