"""Programs as readable Python: shapes at every node, and which pass made it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from graphopt.program import Program, compute_nodes, operator_name, val
from graphopt.signature import OutputKind
from graphopt.source import source_line

_DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}
_DTYPES |= {torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8"}
_DTYPES |= {torch.bool: "bool"}


def to_python(program: Program) -> str:
    """The program as one Python function, state first."""
    lines = [f"def {program.name}(", *_parameters(program), "):"]
    previous = None
    for node in compute_nodes(program.graph):
        where = source_line(node)
        if where and where != previous:
            lines.append(f"    # {where}")
        previous = where
        lines.append(f"    {_statement(node)}")
    return "\n".join([*lines, *_returns(program)]) + "\n"


def describe(value: Any) -> str:
    """``f32[2, s1, 384]`` for a tensor; the type's name otherwise."""
    if isinstance(value, Tensor):
        dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return f"({', '.join(describe(v) for v in value)})"
    return str(value) if isinstance(value, torch.SymInt) else type(value).__name__


def _parameters(program: Program) -> list[str]:
    rows = []
    for node in program.placeholders():
        entry = program.inputs[node.name]
        origin = f"  # {entry.kind.value} {entry.target}" if entry.target else ""
        rows.append(f"    {node.name}: {describe(val(node))},{origin}")
    return rows


def _statement(node: fx.Node) -> str:
    args = [_argument(a) for a in node.args]
    args += [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
    name = operator_name(node.target)
    made_by = node.meta.get("rewritten_by")
    note = f"  # {describe(val(node))}" + (f"  <- {', '.join(made_by)}" if made_by else "")
    return f"{node.name} = {name}({', '.join(args)}){note}"


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, list | tuple):
        inner = ", ".join(_argument(v) for v in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner},)"
    return repr(value)


def _returns(program: Program) -> list[str]:
    rows = []
    for value, spec in zip(program.results(), program.outputs, strict=True):
        if spec.kind is not OutputKind.USER:
            rows.append(f"    {spec.target!r} <- {_argument(value)}  # {spec.kind.value}")
    shown = ", ".join(_argument(v) for v in program.user_outputs())
    return [*rows, f"    return ({shown})"]
