"""Gradients that operators filter: the same piece or program with them in full.

An operator that leaves something out of its gradients has an argument `ARGUMENT`, zero by default.
Without it a rewrite is held to the criterion of every other; with it, to what its rule declares.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from graphopt.program import Program, copy_graph
from graphopt.rewrite.subgraph import Subgraph

ARGUMENT = "filter_threshold"


def is_filtered(graph: fx.Graph) -> bool:
    """Whether some operator leaves something out of its gradients."""
    return any(_given(node) for node in graph.nodes)


def full_piece(piece: Subgraph) -> Subgraph:
    """The piece with gradients in full; itself where they are."""
    return replace(piece, graph=_full(piece.graph)) if is_filtered(piece.graph) else piece


def full_program(program: Program) -> Program:
    """The program with gradients in full; itself where they are."""
    if not is_filtered(program.graph):
        return program
    twin = program.copy()
    _fill(twin.graph)
    return twin.recompile()


def _full(graph: fx.Graph) -> fx.Graph:
    twin = copy_graph(graph)
    _fill(twin)
    return twin


def _fill(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if _given(node):
            place = _place(node)
            args = list(node.args)
            args[place : place + 1] = [0.0] * len(args[place : place + 1])
            node.args = tuple(args)
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != ARGUMENT}


def _given(node: fx.Node) -> Any:
    """The argument, by name or in its place, where files put it."""
    place = _place(node)
    return place >= 0 and (node.kwargs.get(ARGUMENT) or any(node.args[place : place + 1]))


def _place(node: fx.Node) -> int:
    """Of the argument among those of the operator; -1 where it has none."""
    schema: Any = getattr(node.target, "_schema", None)
    if getattr(node.target, "namespace", "") != "graphopt" or schema is None:
        return -1
    names = [a.name for a in schema.arguments if not a.kwarg_only]
    return names.index(ARGUMENT) if ARGUMENT in names else -1
