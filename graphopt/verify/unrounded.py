"""Activations that operators round to eight bits: the same program with them as they are.

A number that lies between two codes may take either, so a program that rounds activations
magnifies the least difference before it. Where it is held to itself, what it loses by rounding is
the measure.
"""

from __future__ import annotations

from torch import fx

from graphopt.kernels.quantized.operator import quantized_linear
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
    """A copy whose quantized products round the rows that they read as they are: what a runtime may
    do that has no other product of such weights. Itself if there are none."""
    twin = program.copy()
    products = twin.graph.find_nodes(op="call_function", target=quantized_linear)
    given = {node: arguments(node) for node in products}
    plain = [node for node in products if given[node][ARGUMENT] == AS_THEY_ARE]
    for node in plain:
        node.args, node.kwargs = tuple((given[node] | {ARGUMENT: "dynamic"}).values()), {}
    return twin.recompile() if plain else program


def _rounds(node: fx.Node) -> bool:
    if node.op != "call_function" or getattr(node.target, "namespace", "") != "graphopt":
        return False
    return arguments(node).get(ARGUMENT, AS_THEY_ARE) != AS_THEY_ARE
