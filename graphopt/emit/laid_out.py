"""Weights in four bits in the order that this machine's kernel reads, in place of the plain ones.

The program stays as it is, and files hold plain weights: what runs is a twin of it whose products
read codes in the layout ``"int4pack"``, which takes the place of the plain codes in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from graphopt.emit.module import OptimizedModule
from graphopt.kernels.quantized import int4pack
from graphopt.kernels.quantized.choice import choose_layout
from graphopt.kernels.quantized.operator import quantized_embedding, quantized_linear
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.weight import QuantizedWeight
from graphopt.program import Program, copy_graph, val
from graphopt.rewrite import Builder, arguments
from graphopt.rewrite.rule import Numeric
from graphopt.verify.trials import hold

if TYPE_CHECKING:
    from graphopt.recipe import Options

NOTE = (
    "of 4 bits are held as this machine's kernel reads them, which multiplies in bfloat16 (in this "
    "process; a file holds them plain)"
)
TOLERANCE = 0.05
"""Relative RMS that outputs may be off by from those of the plain layout: activations and scales
are rounded to bfloat16 on the way, which costs each product 2**-9."""


def lay_out(module: OptimizedModule, options: Options | None = None) -> Program | None:
    """Let a module hold its weights as this CPU reads them, where that is faster here.

    Args:
        options: of the compilation; without them (a file was loaded) it is done where it was done
            before the file was written, and what it gives is not compared with the plain layout.

    Returns:
        the program that runs from now on, or None where nothing was changed.
    """
    noted = any(NOTE in note for note in module.report.notes)
    if not (noted if options is None else options.measure):
        return None
    twin, laid = laid_out(module.program)
    if not laid:
        return None
    if options is not None:
        options.progress("lay out weights")
        inputs = module.program.example_inputs
        found, _ = hold(module.program, twin, inputs, Numeric.LOSSY, TOLERANCE, lower=quick)
        if not found.ok:
            note = f"weights keep the plain layout: {found.note}, error {found.rms:.2g}"
            module.report.notes.append(note)
            return None
    module.lay_out(twin, laid)
    module.add_fast_path(quick(fx.GraphModule(twin.graph_module, twin.graph)))
    if not noted:
        module.report.notes.append(f"{len(laid)} weights {NOTE}")
    return twin


def laid_out(program: Program) -> tuple[Program, set[str]]:
    """A twin that reads weights in the layout of the machine where it is the faster one."""
    twin, laid = program.copy(), set[str]()
    for node, name in twin.state_nodes().items():
        if (fields := _fields(twin, node)) is None:
            continue
        first = next(user for user in node.users if user.target is quantized_linear)
        width = val(first.args[0]).shape[-1]
        build = Builder(twin, first, "laid out", folds=False)
        tensors = int4pack.prepare(_weight(twin, node, _scheme(first), int(width), *fields))
        pairs = build.state(f"{name}_pairs", tensors["scales"], (node,))
        twin.state[name] = tensors["codes"]
        laid.add(name)
        for user in list(node.users):
            _spell(user, pairs, build)
    twin.recompile()
    return twin, laid


def _weight(
    program: Program,
    codes: fx.Node,
    scheme: Scheme,
    width: int,
    scales: fx.Node,
    zeros: fx.Node | None,
) -> QuantizedWeight:
    held = None if zeros is None else program.tensor(zeros)
    return QuantizedWeight(scheme, width, program.tensor(codes), program.tensor(scales), held)


def _fields(program: Program, codes: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """Scales and zeros of a weight that its readers let be laid out, and for which it pays."""
    calls = [user for user in codes.users if user.target is quantized_linear]
    if not calls or any(not _reads(user, codes) for user in codes.users):
        return None
    given = [arguments(user) for user in codes.users]
    scales, zeros = given[0]["scales"], given[0]["zeros"]
    if any(g["scales"] is not scales or g["zeros"] is not zeros for g in given):
        return None
    outputs, scheme, width = val(codes).shape[0], _scheme(calls[0]), val(calls[0].args[0]).shape[-1]
    device = val(codes).device.type
    if int4pack.refusal(scheme, outputs, device) or not int4pack.restorable(outputs):
        return None
    if scales.op != "placeholder" or codes in program.results():
        return None
    rows = min(_rows(val(call.args[0]).shape[:-1]) for call in calls)
    fastest = _layout(scheme, int(outputs), int(width), rows, torch.get_num_threads())
    return (scales, zeros) if fastest == "int4pack" else None


def _reads(user: fx.Node, codes: fx.Node) -> bool:
    given = arguments(user)
    if user.target is quantized_embedding:
        return given["codes"] is codes
    if user.target is not quantized_linear or given["codes"] is not codes:
        return False
    plain = given["layout"] == "plain" and given["activations"] == "none"
    return plain and val(given["input"]).dtype in (torch.float32, torch.bfloat16)


def _scheme(call: fx.Node) -> Scheme:
    given = arguments(call)
    return Scheme(*(given[name] for name in ("bits", "dtype", "group_size", "symmetric")))


def _rows(sizes: Any) -> int:
    """The fewest rows that a call may have, as far as sizes are fixed."""
    rows = 1
    for size in sizes:
        rows *= size if isinstance(size, int) else 1
    return rows


@cache
def _layout(scheme: Scheme, outputs: int, inputs: int, rows: int, threads: int) -> str:  # noqa: ARG001
    return choose_layout(scheme, outputs, inputs, torch.bfloat16, rows)


def _spell(user: fx.Node, pairs: fx.Node, build: Builder) -> None:
    given = arguments(user)
    if user.target is quantized_embedding:
        tables = zip(("places", "shifts"), int4pack.places(given["width"]), strict=True)
        held = [build.state(name, table, (pairs,)) for name, table in tables]
        names = ("indices", "codes", "scales", "zeros")
        user.args = (*(given[name] for name in names), *held, given["out_dtype"])
        user.target, user.kwargs = looked_up, {}
        return
    given |= {"scales": pairs, "zeros": None, "layout": "int4pack"}
    user.args, user.kwargs = tuple(given.values()), {}


def looked_up(indices: Tensor, *rest: Any) -> Tensor:
    """What ``quantized_embedding`` gives, of codes that are laid out; see `int4pack.rows`."""
    *held, dtype = rest
    return int4pack.rows(indices, *held).to(dtype)


def quick(plain: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that calls the kernel itself: without gradients, and in bfloat16."""
    graph = copy_graph(plain.graph)
    for node in _products(graph):
        given = arguments(node)
        names = ("input", "codes", "scales", "bias")
        node.target, node.kwargs = int4pack.linear, {}
        node.args = tuple(given[name] for name in names)
    return fx.GraphModule(plain, graph)


def _products(graph: fx.Graph) -> Iterator[fx.Node]:
    for node in graph.find_nodes(op="call_function", target=quantized_linear):
        if arguments(node)["layout"] == "int4pack":
            yield node
