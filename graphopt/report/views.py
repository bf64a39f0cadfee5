"""Programs as the rows that a report keeps of each node."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from graphopt.printer import describe
from graphopt.program import Program, operator_name, val
from graphopt.report.model import NodeView
from graphopt.signature import InputKind
from graphopt.source import module_path, source_line

_DYNAMO_ROOT = re.compile(r"^L\['\w+'\]\.?")
_SUBSCRIPT = re.compile(r"\[['\"]?([^'\"\]]+)['\"]?\]")


def node_views(program: Program) -> list[NodeView]:
    """One row per node of the graph, in graph order."""
    return [_view(program, node) for node in program.graph.nodes]


def _view(program: Program, node: fx.Node) -> NodeView:
    entry = program.input_of(node)
    target = entry.target if entry else None
    value = val(node)
    return NodeView(
        name=node.name,
        op=_operator(program, node),
        inputs=tuple(n.name for n in node.all_input_nodes),
        shape="" if value is None else describe(value),
        module=target.rpartition(".")[0] if target else _module(node),
        source=source_line(node),
        rewritten_by=tuple(node.meta.get("rewritten_by", ())),
        literals=", ".join(_literals(node)),
        target=target,
    )


def _operator(program: Program, node: fx.Node) -> str:
    entry = program.input_of(node)
    if entry is not None:
        return "input" if entry.kind is InputKind.USER else entry.kind.value
    return node.op if node.op in ("output", "placeholder") else operator_name(node.target)


def _module(node: fx.Node) -> str:
    """Dynamo spells ``L['self'].layers[0]`` what export spells ``layers.0``."""
    return _SUBSCRIPT.sub(r".\1", _DYNAMO_ROOT.sub("", module_path(node))).strip(".")


def _literals(node: fx.Node) -> Iterator[str]:
    """``name=value`` for arguments without a node in them, named by the operator's schema."""
    if node.op != "call_function":
        return
    names = _argument_names(node)
    given = [(names[i] if i < len(names) else "", v) for i, v in enumerate(node.args)]
    for name, value in [*given, *node.kwargs.items()]:
        if not _holds_node(value):
            yield f"{name}={value}" if name else str(value)


def _argument_names(node: fx.Node) -> list[str]:
    if isinstance(node.target, torch._ops.OpOverload):
        return [argument.name for argument in node.target._schema.arguments]
    return []


def _holds_node(value: Any) -> bool:
    found: list[fx.Node] = []
    fx.node.map_arg(value, found.append)
    return bool(found)
