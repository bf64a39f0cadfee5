"""The target ``"onnxruntime"``: regions where they are faster, kept where the whole verifies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from graphopt.analysis.regions import Region
from graphopt.analysis.splice import replace_region
from graphopt.emit.held import fault
from graphopt.emit.module import OptimizedModule
from graphopt.emit.onednn import fits, fused
from graphopt.emit.ort.account import partition_of, region_name
from graphopt.emit.ort.call import OrtRegion
from graphopt.emit.ort.nodes import return_views_apart
from graphopt.emit.ort.programs import root_sizes
from graphopt.emit.ort.providers import memory_of, resolve_providers
from graphopt.emit.ort.regions import Piece, Placement, Placer
from graphopt.emit.ort.sessions import Settings
from graphopt.errors import GraphoptError, VerificationError
from graphopt.program import Program
from graphopt.report.text import seconds_text
from graphopt.room import WITH_GRADIENTS, crowded
from graphopt.verify.timing import Pace, interleaved
from graphopt.verify.unrounded import unrounded

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


def to_onnxruntime(module: OptimizedModule, original: Program, options: Options) -> bool:
    """Let regions of the module's graph run in ONNX Runtime; keep that only if the whole verifies.

    Args:
        original: the program before it was rewritten.

    Returns:
        whether any does; else the module is as it was.

    Raises:
        VerificationError: with ``strict``, where the outputs are wrong.
    """
    refuse_training(module.program)
    placement = placed(module.program, options)
    if options.measure:
        options.progress("onnxruntime: time regions")
        keep_faster(placement)
    partition = partition_of(placement)
    if not placement.pieces:
        module.report.partition = partition
        return False
    plain, quick = module._graph.code, module._graph.fast
    module._graph.code, module._graph.fast = _assembled(placement), None
    options.progress("onnxruntime: verify")
    why = _fault(module, original, placement)
    if why is None:
        module.report.partition = partition
        providers = list(placement.settings.providers)
        module._lowered = {"target": "onnxruntime", "providers": providers}
        module._lowered["measure"] = options.measure
        return True
    module._graph.code, module._graph.fast = plain, quick
    message = f"{original.name} in ONNX Runtime {why}"
    if options.strict:
        raise VerificationError(message, fix="use target='torch'")
    module.report.notes.append(f"{message}; the torch target was kept")
    return False


def placed(program: Program, options: Options) -> Placement:
    """Which nodes of a program ONNX Runtime takes, in regions."""
    twin = program.copy()
    root_sizes(twin)
    return_views_apart(twin)
    options.progress("onnxruntime: translate")
    device = _device(program)
    providers = options.providers or resolve_providers(None, device.type)
    settings = Settings(tuple(providers), memory_of(providers, device))
    return Placer(twin, settings, measure=options.measure).place()


def _device(program: Program) -> torch.device:
    tensors = (t for t in (*program.state.values(), *program.example_inputs))
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def _assembled(placement: Placement) -> fx.GraphModule:
    """The graph with each region as one call."""
    twin = placement.program
    for index, piece in enumerate(placement.pieces):
        region = Region(piece.region.nodes)  # which reads what took the place of those before
        name, graph = region_name(index), twin.graph
        made = replace_region(graph, region, piece.module, inline=False, name=name)
        call: Any = made[0].args[0]
        call.args = (*call.args, *piece.extra)
    twin.recompile()
    return twin.graph_module


def _fault(module: OptimizedModule, original: Program, placement: Placement) -> str | None:
    program, code = module.program, module._graph.code
    tolerance = math.sqrt(sum(p.model.tolerance**2 for p in placement.pieces))
    reference = original
    if module.report.losses or crowded(original, WITH_GRADIENTS):
        reference = unrounded(program)
    made, failures = (lambda _: code), (Exception,)  # ONNX Runtime's own are of no family
    return fault(reference, program, made, tolerance=tolerance, ones=True, failures=failures)


def keep_faster(placement: Placement) -> None:
    """Leave regions to torch that are not faster in ONNX Runtime, here, on the captured inputs.

    Of the others, let those pack copies of their weights that are much faster so.
    """
    for piece in list(placement.pieces):
        if piece.model.weights and (packed := _packed(piece)) is not None:
            piece.module = packed
        pace = _pace(_in_torch(piece, placement.program), piece.module, piece)
        piece.torch_seconds, piece.seconds = pace
        if pace.new >= pace.old:
            placement.leave(piece, _slower(pace))


def _in_torch(piece: Piece, program: Program) -> nn.Module:
    """What torch would run in place of a region: the faster of its two ways on a CPU."""
    plain = piece.module.plain
    if not fits(program):
        return plain
    quick = fused(plain)
    pace = _pace(plain, quick, piece)
    return plain if pace.old < pace.new else quick


def _packed(piece: Piece) -> OrtRegion | None:
    """The region with copies of weights; None where it is not worth them."""
    shared = piece.module
    settings = replace(shared.settings, packed=True)
    packed = OrtRegion(shared.plain, shared.model, settings, shared.layout, shared.weights)
    pace = _pace(shared, packed, piece)
    return packed if pace.old > SHARED * pace.new else None


def _pace(old: nn.Module, new: nn.Module, piece: Piece) -> Pace:
    """Seconds of two versions of a piece; torch's takes no inputs that are read for sizes alone."""
    values, few = piece.values, piece.values[: piece.module.layout.plain]
    first, second = (values if isinstance(m, OrtRegion) else few for m in (old, new))
    with torch.no_grad():
        return interleaved(lambda: old(*first), lambda: new(*second), SECONDS)


def _slower(pace: Pace) -> str:
    return (
        f"not faster in ONNX Runtime: {seconds_text(pace.new)}, {seconds_text(pace.old)} in torch"
    )
