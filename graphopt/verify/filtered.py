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
            node.args = node.args[: _place(node)]
            node.kwargs = {k: v for k, v in node.kwargs.items() if k != ARGUMENT}


def _given(node: fx.Node) -> Any:
    """The argument, by name or in its place, where files put it."""
    place = _place(node)
    return place is not None and (node.kwargs.get(ARGUMENT) or any(node.args[place:]))


def _place(node: fx.Node) -> int | None:
    """Of the argument, which is the last."""
    if getattr(node.target, "namespace", "") != "graphopt":
        return None
    names = [a.name for a in node.target._schema.arguments if not a.kwarg_only]
    return len(names) - 1 if names[-1:] == [ARGUMENT] else None
