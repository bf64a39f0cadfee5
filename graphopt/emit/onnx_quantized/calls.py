"""Quantized operators of a program, and slots that stand for them while the rest is translated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.emit.onnx_quantized.slots import EMBEDDING, LINEAR
from graphopt.errors import ExportError
from graphopt.kernels.quantized import QuantizedWeight, Scheme, Static
from graphopt.kernels.quantized.static import static_of
from graphopt.kernels.quantized.weight import OPERANDS
from graphopt.program import Program, val
from graphopt.rewrite import Builder, arguments
from graphopt.source import source_line

aten = torch.ops.aten
PRODUCT = torch.ops.graphopt.quantized_linear.default
_EMBEDDING = torch.ops.graphopt.quantized_embedding.default
OPERATORS = (PRODUCT, _EMBEDDING)


@dataclass(frozen=True, eq=False)
class Call:
    """One quantized operator.

    Attributes:
        name: of the weight; what belongs to it in the file is named after it.
        embedding: rows of the weight are read; else the weight is multiplied by.
        weight: as it is stored; calls on one weight share the object.
        activations: ``"none"``, ``"dynamic"`` or ``"static"``.
        dtype: of the result, and of the input of a product.
        rank: dimensions of the input.
        tied: both an embedding and a product read the weight.
        where: the user's line.
        static: what static activations are quantized by.
    """

    name: str
    embedding: bool
    weight: QuantizedWeight
    activations: str
    dtype: torch.dtype
    rank: int = 2
    tied: bool = False
    where: str | None = None
    static: Static | None = None

    @property
    def scheme(self) -> Scheme:
        return self.weight.scheme


def quantized_nodes(program: Program) -> list[fx.Node]:
    """Calls of the quantized operators, in order."""
    return [n for n in program.graph.nodes if n.target in OPERATORS]


def calls_of(program: Program) -> dict[fx.Node, Call]:
    """What each quantized operator computes on.

    Raises:
        ExportError: a weight is computed, or laid out for one machine.
    """
    nodes = quantized_nodes(program)
    weights: dict[fx.Node, QuantizedWeight] = {}
    uses: dict[fx.Node, set[Any]] = {}
    for node in nodes:
        codes = arguments(node)["codes"]
        uses.setdefault(codes, set()).add(node.target)
        if codes not in weights:
            weights[codes] = _weight(program, node)
    return {node: _call(program, node, weights, uses) for node in nodes}


def _call(
    program: Program,
    node: fx.Node,
    weights: Mapping[fx.Node, QuantizedWeight],
    uses: Mapping[fx.Node, set[Any]],
) -> Call:
    given = arguments(node)
    codes = given["codes"]
    return Call(
        (program.target_of(codes) or codes.name).removesuffix("_codes"),
        node.target is _EMBEDDING,
        weights[codes],
        given.get("activations", "none"),
        val(node).dtype,
        val(given["indices" if node.target is _EMBEDDING else "input"]).dim(),
        len(uses[codes]) == 2,
        source_line(node),
        static_of(given),
    )


def _weight(program: Program, node: fx.Node) -> QuantizedWeight:
    given = arguments(node)
    if given.get("layout", "plain") != "plain":
        raise ExportError(
            f"a weight is laid out for this machine ({given['layout']})",
            where=source_line(node),
            fix="export what graphopt.compile returned",
        )
    stored = [None if given[n] is None else _tensor(program, given[n]) for n in OPERANDS]
    width = given.get("width") or val(given["input"]).shape[-1]
    scheme = Scheme(given["bits"], given["dtype"], given["group_size"], given["symmetric"])
    codes, scales, zeros, outer = stored
    assert codes is not None and scales is not None  # by the operators' schemas
    return QuantizedWeight(scheme, width, codes, scales, zeros, outer)


def _tensor(program: Program, node: fx.Node) -> Tensor:
    if not program.is_constant(node):
        raise ExportError(
            f"`{node.name}` of a quantized weight is computed, and has no ONNX form",
            where=source_line(node),
        )
    return program.tensor(node).detach().cpu()


def with_slots(program: Program) -> Program:
    """A copy with slots for quantized operators, numbered as `quantized_nodes` has them.

    A bias is added after the slot, where runtime fusions find it.
    """
    twin = program.copy()
    for key, node in enumerate(quantized_nodes(twin)):
        given, made = arguments(node), val(node)
        build = Builder(twin, node, "quantized", folds=False)
        if node.target is _EMBEDDING:
            slot = build(EMBEDDING, given["indices"], made.shape[-1], key, made.dtype)
        else:
            slot = build(LINEAR, given["input"], made.shape[-1], key)
            if (bias := given["bias"]) is not None:
                if val(bias).dtype != made.dtype:
                    bias = build(aten._to_copy.default, bias, dtype=made.dtype)
                slot = build(aten.add.Tensor, slot, bias)
        node.replace_all_uses_with(slot, propagate_meta=False)
        twin.graph.erase_node(node)
    twin.drop_unused_state()
    twin.lint()
    return twin.recompile()
