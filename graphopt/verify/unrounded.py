"""Activations that operators round to eight bits: the same program with them as they are.

A number that lies between two codes may take either, so a program that rounds activations
magnifies the least difference before it. Where it is held to itself, what it loses by rounding is
the measure.
"""

from __future__ import annotations

from torch import fx

from graphopt.program import Program
from graphopt.rewrite.match import arguments

ARGUMENT, AS_THEY_ARE = "activations", "none"


def rounds(graph: fx.Graph) -> bool:
    """Whether some operator rounds its activations."""
    return any(map(_rounds, graph.nodes))


def unrounded(program: Program) -> Program:
    """A copy that computes on the same weights with activations as they are; itself if it does."""
    if not rounds(program.graph):
        return program
    twin = program.copy()
    for node in filter(_rounds, twin.graph.nodes):
        given = arguments(node) | {ARGUMENT: AS_THEY_ARE}
        if "input_scale" in given:
            given["input_scale"] = None  # of static activations
        node.args, node.kwargs = tuple(given.values()), {}
    return twin.recompile()


def rounded(program: Program) -> Program:
    """A copy whose quantized products round the rows that they read to eight bits, those too that
    read them as they are: what a runtime may do that has no other product of such weights."""
    twin = program.copy()
    for node in twin.graph.nodes:
        if _activations(node) == AS_THEY_ARE:
            given = arguments(node) | {ARGUMENT: "dynamic"}
            node.args, node.kwargs = tuple(given.values()), {}
    return twin.recompile()


def _rounds(node: fx.Node) -> bool:
    return _activations(node) not in (None, AS_THEY_ARE)


def _activations(node: fx.Node) -> str | None:
    """How an operator of graphopt takes activations; None where it has no such choice."""
    if node.op != "call_function" or getattr(node.target, "namespace", "") != "graphopt":
        return None
    found: str | None = arguments(node).get(ARGUMENT)
    return found
