"""After the trace: which declared axes stayed dynamic, in which ranges, under which conditions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from graphopt.capture_axes import Axes, Axis, Path
from graphopt.capture_tables import table_limits
from graphopt.errors import CaptureError
from graphopt.program import Program, val
from graphopt.signature import Assumption
from graphopt.source import is_user_file, source_line, traced_line

_SOURCE = re.compile(r"L(?:\['[^']*'\]|\[\d+\]|\.[A-Za-z_]\w*\b(?!\())+(?:\.size\(\)\[\d+\])?")


def expression(size: Any) -> sympy.Expr:
    """The sympy expression of a size: a number for an ``int``."""
    return sympy.sympify(size.node.expr if isinstance(size, torch.SymInt) else size)


def fixed_axes(program: Program, axes: Axes, call: tuple[Any, Any]) -> list[tuple[Axis, int]]:
    """Declared axes that the model turned into a constant, with that constant."""
    sizes = (
        (axis, _size(axis, nodes)) for nodes in [_nodes(program, call)] for axis in axes.declared
    )
    return [(axis, int(e)) for axis, e in sizes if e.is_number]


def _nodes(program: Program, call: tuple[Any, Any]) -> dict[Path, fx.Node]:
    paths = [path for path, _ in pytree.tree_flatten_with_path(call)[0]]
    return dict(zip(paths, program.user_inputs(), strict=True))


def _size(axis: Axis, nodes: dict[Path, fx.Node]) -> sympy.Expr:
    return expression(axis.size(val(nodes[axis.path])))


def settle(program: Program, axes: Axes, call: tuple[Any, Any]) -> None:
    """Write names, ranges and notes of the declared axes into the program.

    torch traces with sizes of at least 2. That lower bound is not the model's, so 1 is allowed; a
    verifier has to try it (see `allowing_one`).
    """
    nodes = _nodes(program, call)
    sizes = [(axis, _size(axis, nodes)) for axis in axes.declared]
    names: dict[Any, str] = {}
    ranges = dict(program.range_constraints)
    for axis, size in sizes:
        if isinstance(size, sympy.Symbol):
            if axis.name and axis.root is None:
                names.setdefault(size, axis.name)
            ranges[size] = _narrowed(ranges.get(size), axis)
    _narrow_to_tables(program, ranges, names)
    program.range_constraints, program.axis_names = ranges, names
    program.notes += dict.fromkeys(_sentences(program, sizes))


def _narrow_to_tables(program: Program, ranges: dict[Any, Any], names: dict[Any, str]) -> None:
    for symbol, most in table_limits(program).items():
        allowed = ranges.get(symbol, ValueRanges(1, sympy.oo))
        if most < allowed.lower:
            raise CaptureError(
                f"`{names.get(symbol, symbol)}` must be at least {allowed.lower}, but the model "
                f"looks up positions in a table that ends at {most}",
                fix="declare a smaller range for this axis in dynamic_shapes",
            )
        ranges[symbol] = ValueRanges(allowed.lower, min(allowed.upper, most))


def allowing_one(traced: Any) -> Any:
    """A traced range with torch's own lower bound of 2 replaced by 1."""
    return ValueRanges(1, traced.upper) if traced.lower in (0, 2) else traced


def _narrowed(traced: Any, axis: Axis) -> Any:
    allowed = ValueRanges(1, sympy.oo) if traced is None else traced
    declared = ValueRanges(axis.low, allowed.upper if axis.high is None else axis.high)
    return allowed & declared


def _sentences(program: Program, sizes: list[tuple[Axis, sympy.Expr]]) -> Iterator[str]:
    for axis, size in sizes:
        allowed = program.range_constraints.get(size) if axis.root is None else None
        own = program.axis_names.get(size, axis.name)
        if (
            allowed is not None
            and isinstance(allowed.upper, sympy.Integer)
            and axis.high != allowed.upper
        ):
            yield f"{axis} must be at most {allowed.upper}: the model allows no more"
        if allowed is not None and allowed.lower > max(axis.low, 2):
            yield f"{axis} must be at least {allowed.lower}: the model allows no less"
        if axis.name and axis.root is None and own != axis.name:
            yield f"{axis} must equal `{own}`: the model ties them"
        if axis.root is None and not size.is_number and not isinstance(size, sympy.Symbol):
            shown = size.subs({s: sympy.Symbol(n) for s, n in program.axis_names.items()})
            yield f"{axis} must be {shown}: the model ties them"


def traced_assumptions(exported: ExportedProgram) -> tuple[Assumption, ...]:
    """Conditions that the trace branched on and that do not follow from the ranges of its axes."""
    known = _symbols(exported)
    environment = _environment(exported)
    if environment is None:
        return _assumptions_of_code(exported)
    ranges = {s: environment.var_to_range[s] for s in known if s in environment.var_to_range}
    found: dict[str, Assumption] = {}
    for guard in environment.guards:
        condition = environment.replace(guard.expr)
        if not condition.free_symbols <= known or _follows(condition, ranges):
            continue
        text = PythonPrinter().doprint(condition)
        found.setdefault(text, Assumption(text, _where(guard)))
    return tuple(found.values())


def attention_assumptions(exported: ExportedProgram) -> tuple[Assumption, ...]:
    """That there are as many keys as values: torch's kernels on CPUs do not ask. They count values,
    and read and write beyond keys that are fewer."""
    known, found = _symbols(exported), dict[str, Assumption]()
    target = torch.ops.aten.scaled_dot_product_attention.default
    for node in exported.graph.find_nodes(op="call_function", target=target):
        keys, values = (expression(val(operand).shape[-2]) for operand in node.args[1:3])
        if keys != values and (keys - values).free_symbols <= known:
            text = PythonPrinter().doprint(sympy.Eq(keys, values))
            found.setdefault(text, Assumption(text, source_line(node), _UNEQUAL))
    return tuple(found.values())


_UNEQUAL = "attention has as many keys as values"


def _symbols(exported: ExportedProgram) -> set[sympy.Symbol]:
    return set().union(*(e.free_symbols for e, _ in _sources(exported)), set())


def _environment(exported: ExportedProgram) -> Any:
    """The shape environment of the trace; a program read from a file has an empty one."""
    for node in exported.graph.find_nodes(op="placeholder"):
        fake = val(node)
        for size in getattr(fake, "shape", (fake,)):
            if isinstance(size, torch.SymInt) and size.node.shape_env.guards:
                return size.node.shape_env
    return None


def _follows(condition: sympy.Basic, ranges: dict[sympy.Symbol, Any]) -> bool:
    if not condition.free_symbols:
        return True
    bound = bound_sympy(condition, ranges)
    return bool(bound.is_singleton() and bound.lower)


def _where(guard: Any) -> str | None:
    frame = getattr(guard.sloc, "framework_loc", None)
    if frame is None or not is_user_file(getattr(frame, "filename", "<")):
        return None
    return f"{frame.filename}:{frame.lineno}"


def _sources(exported: ExportedProgram) -> Iterator[tuple[sympy.Expr, str]]:
    """Size of every axis of every user input, and torch's name for it."""
    signature = exported.module_call_graph[0].signature
    names = list(signature.forward_arg_names or ()) if signature else []
    users = set(exported.graph_signature.user_inputs)
    nodes = [n for n in exported.graph.find_nodes(op="placeholder") if n.name in users]
    paths = _input_paths(exported)
    for node, path in zip(nodes, paths, strict=False):
        source = _source(path, names)
        fake = val(node)
        if isinstance(fake, torch.Tensor):
            for axis, size in enumerate(fake.shape):
                yield expression(size), f"{source}.size()[{axis}]"
        elif isinstance(fake, torch.SymInt):
            yield expression(fake), source


def _input_paths(exported: ExportedProgram) -> list[Path]:
    spec = exported.call_spec.in_spec
    assert spec is not None
    dummy = pytree.tree_unflatten([0] * spec.num_leaves, spec)
    return [path for path, _ in pytree.tree_flatten_with_path(dummy)[0]]


def _source(path: Path, names: list[str]) -> str:
    head = names[path[1].idx] if hasattr(path[1], "idx") and path[1].idx < len(names) else path[1]
    first = f"['{head}']" if isinstance(head, str) else pytree.keystr((head,))
    return f"L{first}{pytree.keystr(path[2:])}"


def _assumptions_of_code(exported: ExportedProgram) -> tuple[Assumption, ...]:
    """The conditions that a file carries as code over its inputs' sizes."""
    known = {source: f"({PythonPrinter().doprint(e)})" for e, source in _sources(exported)}
    texts = (_translated(code, known) for code in getattr(exported, "_guards_code", None) or ())
    return tuple(Assumption(t) for t in dict.fromkeys(texts) if t)


def _translated(code: str, known: dict[str, str]) -> str | None:
    sources: Iterable[str] = set(_SOURCE.findall(code))
    if not all(s in known for s in sources):
        return None
    text = _SOURCE.sub(lambda m: known[m.group(0)], code)
    return text if re.search(r"[A-Za-z]", text) else None


@contextmanager
def watching_constants(size: int) -> Iterator[list[str]]:
    """Lines of the user's code at which a traced size becomes the constant ``size``."""
    lines: list[str] = []
    fix = ShapeEnv._set_replacement

    def seen(self: ShapeEnv, symbol: Any, target: Any, *rest: Any) -> None:
        if getattr(target, "is_number", False) and int(target) == size:
            line = traced_line()
            lines.extend([line] if line else [])
        fix(self, symbol, target, *rest)

    with mock.patch.object(ShapeEnv, "_set_replacement", seen):
        yield lines
