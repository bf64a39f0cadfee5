"""``chunked_rows`` and ``deferred`` in what they stand for, for targets that have neither."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from graphopt.kernels.chunked_rows import chunked_rows, filled, parse
from graphopt.kernels.deferred import deferred
from graphopt.program import Program, val
from graphopt.rewrite import Builder

aten = torch.ops.aten


def unchunked(program: Program) -> Program:
    """The same program with products held whole; itself where it has no such operator."""
    if not _calls(program):
        return program
    twin = program.copy()
    for node in _calls(twin):
        _spell(twin, node)
    twin.graph.eliminate_dead_code()
    twin.lint()
    twin.recompile()
    return twin


def _calls(program: Program) -> list[fx.Node]:
    nodes = program.graph.find_nodes
    return [n for t in (chunked_rows, deferred) for n in nodes(op="call_function", target=t)]


def _product(build: Builder, hidden: fx.Node, weight: fx.Node) -> fx.Node:
    """The rows of a body; several matrices of a weight have each its own."""
    shape = val(weight).shape
    if len(shape) == 3:
        weight = build(aten.reshape.default, weight, [-1, shape[-1]])
    made: fx.Node = build(aten.linear.default, hidden, weight)
    return build(aten.reshape.default, made, [-1, shape[1]]) if len(shape) == 3 else made


def _spell(program: Program, node: fx.Node) -> None:
    args: Any = node.args
    hidden, weight, rows, whole, text = args[:5]
    body = parse(text)
    build = Builder(program, node, "unchunked", folds=False)
    products = [_product(build, *pair) for pair in zip(hidden, weight, strict=True)]
    values = dict(zip(body.parameters, [*products, *rows, *whole], strict=True))
    for step in body.steps:
        given, kwargs = filled((step.args, step.kwargs), values)
        values[step.name] = build(step.target, *given, **kwargs)
    results = [values[name] for name in (*body.rows, *body.sums)]
    for name in body.columns:
        wide = torch.promote_types(val(values[name]).dtype, torch.float32)
        matrix = build(aten._to_copy.default, values[name], dtype=wide)
        results.append(build(aten.logsumexp.default, matrix, [0]))
    if node.target is deferred:
        node.replace_all_uses_with(results[0], propagate_meta=False)
    for user in list(node.users):
        if user.target is operator.getitem:
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index], propagate_meta=False)
