"""A region as a program of its own: what the ONNX exporter takes, and what torch would run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import getitem
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter

from graphopt.analysis.regions import Region
from graphopt.conditions import compiled
from graphopt.errors import ExportError
from graphopt.program import Program, val
from graphopt.room import extent
from graphopt.signature import CallSpec, InputKind, OutputKind, ProgramInput, ProgramOutput

aten = torch.ops.aten
Place = tuple[fx.Node, int]
"""A tensor, and the dimension of it that a symbol is the size of."""


def symbols_in(value: Any) -> set[sympy.Symbol]:
    """Symbols in a fake value's sizes, or in a size itself."""
    if isinstance(value, Tensor):
        return {s for size in value.shape for s in symbols_in(size)}
    if isinstance(value, list | tuple):
        return {s for item in value for s in symbols_in(item)}
    expression = getattr(getattr(value, "node", None), "expr", None)
    return set(expression.free_symbols) if expression is not None else set()


def places(nodes: Iterable[fx.Node]) -> dict[sympy.Symbol, Place]:
    """Where each symbol can be read off: the first dimension that is one."""
    found: dict[sympy.Symbol, Place] = {}
    for node in nodes:
        fake = val(node)
        for dim, size in enumerate(fake.shape if isinstance(fake, Tensor) else ()):
            expression = getattr(getattr(size, "node", None), "expr", None)
            if isinstance(expression, sympy.Symbol):
                found.setdefault(expression, (node, dim))
    return found


def root_sizes(program: Program) -> None:
    """Let sizes be read off the program's inputs, not off what is computed, in place.

    A size that is read off a value in the middle would part what comes before it from what comes
    after. Sizes that values decide stay where they are.
    """
    known = places(program.user_inputs())
    graph = program.graph
    for node in list(graph.nodes):
        if not _reads_size(node, known):
            continue
        with graph.inserting_before(_first_call(graph)):
            made = _computed(val(node), known, graph)
        if made is not None:
            node.replace_all_uses_with(made, propagate_meta=False)
            graph.erase_node(node)
    program.recompile()


def _reads_size(node: fx.Node, known: Mapping[sympy.Symbol, Place]) -> bool:
    """Whether it reads a size off a computed tensor that inputs have too."""
    if node.op != "call_function" or not isinstance(val(node), torch.SymInt):
        return False
    source = node.args[0] if node.args else None
    computed = isinstance(source, fx.Node) and source.op != "placeholder"
    return computed and isinstance(val(source), Tensor) and symbols_in(val(node)) <= known.keys()


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(n for n in graph.nodes if n.op != "placeholder")


def _computed(size: Any, known: Mapping[sympy.Symbol, Place], graph: fx.Graph) -> fx.Node | None:
    """Nodes for a symbolic size, from those of inputs; None where it is more than arithmetic."""
    expression = size.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    read = {str(s): _read(graph, *known[s]) for s in symbols}
    if isinstance(expression, sympy.Symbol):
        return read[str(expression)]
    tracer = fx.proxy.GraphAppendingTracer(graph)
    given = {name: fx.Proxy(node, tracer) for name, node in read.items()}
    try:
        made = compiled(PythonPrinter().doprint(expression), list(given))(**given)
    except (TypeError, fx.proxy.TraceError):  # a maximum asks which of two is larger
        return None
    if not isinstance(made, fx.Proxy):
        return None
    _evaluate(made.node)
    made.node.meta["val"] = size
    return made.node


def _read(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    made = graph.call_function(aten.sym_size.int, (node, dim))
    made.meta["val"] = val(node).shape[dim]
    return made


def _evaluate(node: fx.Node) -> Any:
    """Give arithmetic its fake values, innermost first."""
    if "val" not in node.meta:
        args = fx.node.map_arg(node.args, _evaluate)
        node.meta["val"] = node.target(*args)  # type: ignore[operator]
    return node.meta["val"]


def inputs_for_sizes(program: Program, region: Region) -> list[fx.Node]:
    """Inputs of the program that a region must be given besides its own, for their sizes alone."""
    inputs = [n for n in region.inputs if program.target_of(n) is None]
    needed = {s for n in (*inputs, *region.nodes) for s in symbols_in(val(n))}
    missing = needed - places(inputs).keys()
    known = places(program.user_inputs())
    return list(dict.fromkeys(known[s][0] for s in sorted(missing, key=str) if s in known))


def region_program(
    program: Program,
    region: Region,
    values: Mapping[fx.Node, Any],
    extra: Sequence[fx.Node] = (),
) -> Program:
    """A region with its constants as a program in eval mode; sizes are read off its tensors.

    Args:
        values: of what the region reads, on the captured inputs.
        extra: further inputs, read for their sizes (`inputs_for_sizes`).
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: dict[str, ProgramInput] = {}
    state: dict[str, Tensor] = {}
    given = [n for n in (*region.inputs, *extra) if isinstance(val(n), Tensor)]
    constants = [n for n in given if program.is_constant(n)]
    users = [n for n in given if n not in set(constants)]
    for node in (*constants, *users):
        copies[node] = made = graph.placeholder(node.name)
        made.meta = dict(node.meta)
        target = program.target_of(node) if node in set(constants) else None
        kind = InputKind.USER if target is None else program.inputs[node.name].kind
        inputs[made.name] = ProgramInput(made.name, kind, target)
        if target is not None:
            state[target] = program.state[target]
    known = places(copies[n] for n in users)
    for node in region.inputs:
        _copy_size(node, known, graph, copies)
    for node in region.order:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(_returned(copies[n]) for n in region.outputs))
    outputs = [ProgramOutput(OutputKind.USER) for _ in region.outputs]
    used = {s for n in (*users, *region.nodes) for s in symbols_in(val(n))}
    return Program(
        fx.GraphModule(program.graph_module, graph),
        inputs,
        outputs,
        state,
        _call([copies[n].name for n in users], len(outputs)),
        example_inputs=tuple(values[n] for n in users),
        range_constraints={s: r for s, r in program.range_constraints.items() if s in used},
        name=program.name,
        axis_names={s: n for s, n in program.axis_names.items() if s in used},
    )


def _returned(node: fx.Node) -> fx.Node:
    """A value as an output; an item by another name, as torch's exporter numbers items anew."""
    if node.target is not getitem:
        return node
    copied = node.graph.call_function(aten.clone.default, (node,))
    copied.meta = dict(node.meta)
    return copied


def _copy_size(
    node: fx.Node,
    known: Mapping[sympy.Symbol, Place],
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
) -> None:
    """Copy what computes a size, down to sizes of tensors, which are read off those at hand.

    Raises:
        ExportError: a tensor that it is the size of is not at hand.
    """
    if node in copies:
        return
    expression = val(node).node.expr
    if isinstance(expression, sympy.Symbol) and expression in known:
        copies[node] = _read(graph, *known[expression])
        return
    if any(isinstance(val(n), Tensor) for n in node.all_input_nodes) or node.op != "call_function":
        raise ExportError(f"reads `{node.name}`, a size that its inputs do not have")
    for read in node.all_input_nodes:
        _copy_size(read, known, graph, copies)
    copies[node] = graph.node_copy(node, copies.__getitem__)


def _call(names: Sequence[str], outputs: int) -> CallSpec:
    """A call with tensors in order, which returns a tuple."""
    leaf = torch.empty(0)
    in_spec = pytree.tree_structure((tuple(leaf for _ in names), {}))
    out_spec = pytree.tree_structure(tuple(leaf for _ in range(outputs)))
    return CallSpec(in_spec, out_spec, tuple(names), tuple(names))


def boundary_values(
    program: Program, wanted: Iterable[fx.Node], inputs: Sequence[Any]
) -> dict[fx.Node, Any]:
    """What nodes give when the program runs on flat user inputs."""
    recorder = _Recorder(program.graph_module, set(wanted))
    given = iter(inputs)
    targets = (program.inputs[n.name].target for n in program.placeholders())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        recorder.run(*[next(given) if t is None else program.state[t] for t in targets])
    return recorder.found


class _Recorder(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, wanted: set[fx.Node]) -> None:
        super().__init__(module)
        self.wanted, self.found = wanted, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.found[n] = value
        return value


def stand_in(node: fx.Node) -> Any:
    """A value of a node's kind, of the sizes at capture, that nothing was computed for."""
    fake = val(node)
    if not isinstance(fake, Tensor):
        return extent(fake) if isinstance(fake, torch.SymInt) else fake
    return torch.zeros([extent(s) for s in fake.shape], dtype=fake.dtype, device=fake.device)
