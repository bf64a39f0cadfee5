"""How products read a weight: as which matrices, and whether those take its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.aliases import is_view
from graphopt.passes.quantize.arrange import matrix_of, without_repeats
from graphopt.passes.quantize.contraction import Axes, Contraction, contraction_of, operands_of
from graphopt.passes.quantize.views import constants, place, viewed
from graphopt.program import Program, operator_name, val
from graphopt.rewrite import Match, Refusal, arguments

aten = torch.ops.aten


@dataclass(frozen=True)
class Products:
    """Products with a weight, but for ``linear`` with one as it is.

    Attributes:
        by_weight: the products on a weight or on views of it, each with the operand that it is.
        unread: products that cannot be quantized, and why.
    """

    by_weight: dict[fx.Node, dict[fx.Node, int]]
    unread: dict[fx.Node, str]


def products(program: Program) -> Products:
    """All products of a frozen program with one constant operand."""
    known, found = constants(program), Products({}, {})
    for node in program.graph.nodes:
        operands = operands_of(node)
        if operands is None:
            _note_other(node, known, found.unread)
            continue
        owned = [i for i, x in enumerate(operands) if x in known]
        if len(owned) != 1 or _is_plain(node):
            continue
        seen = viewed(program, operands[owned[0]])
        if seen is None:
            made = f"`{operands[owned[0]].name}` computes the weight of `{node.name}`"
            found.unread[node] = f"{made} from constants, and was not folded"
        else:
            found.by_weight.setdefault(seen[0], {})[node] = owned[0]
    return found


_OTHERS = frozenset(
    {
        aten.bilinear.default,
        aten.chain_matmul.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.conv_transpose3d.input,
        aten.einsum.default,
        aten.gru.input,
        aten.linalg_multi_dot.default,
        aten.lstm.input,
        aten.rnn_relu.input,
        aten.rnn_tanh.input,
    }
)
"""Products that no quantized operator computes, or that have more factors than two."""


def _note_other(node: fx.Node, known: set[fx.Node], unread: dict[fx.Node, str]) -> None:
    if node.target not in _OTHERS or node in known:
        return
    weights = (n for n in node.all_input_nodes if n in known and val(n).dim() > 1)
    if (weight := next(weights, None)) is not None:
        name = operator_name(node.target)
        unread[node] = f"`{name}` has no quantized form: it reads `{weight.name}` as it is"


def _is_plain(node: fx.Node) -> bool:
    return node.target is aten.linear.default and arguments(node)["weight"].op == "placeholder"


def is_batched(program: Program, sides: Mapping[fx.Node, int]) -> bool:
    """Whether a product among these has many matrices, one for each part of the other operand."""
    forms = (form_of(program, node, side) for node, side in sides.items())
    return any(isinstance(form, Form) and bool(form.axes.batch) for form in forms)


@dataclass(frozen=True)
class Form:
    """A product with a weight, read.

    Attributes:
        side: which operand the weight is.
        matrix: its numbers, a view with the axes ``(batch, columns, inner)``.
    """

    read: Contraction
    side: int
    axes: Axes
    matrix: Tensor

    @property
    def numbers(self) -> Tensor:
        """``(N, K)``, or ``(E, N, K)`` for E products at once."""
        lead, columns = len(self.axes.batch), len(self.axes.columns)
        sizes = self.matrix.shape
        batch = [prod(sizes[:lead])] if lead else []
        return self.matrix.reshape(*batch, prod(sizes[lead : lead + columns]), -1)


def form_of(program: Program, node: fx.Node, side: int) -> Form | Refusal:
    """How a product reads a weight."""
    read, operands = contraction_of(node), operands_of(node)
    found = viewed(program, operands[side]) if operands is not None else None
    if isinstance(read, Refusal):
        return read
    assert found is not None  # `find` has seen it
    read = without_repeats(read, side, found[1])
    axes = read.axes(side)
    if not axes.columns:
        return Refusal("the weight is a vector", node)
    return Form(read, side, axes, matrix_of(found[1], read.labels[side], axes))


def held(match: Match, matrices: Mapping[Any, Tensor], *, shared: bool = True) -> int:
    """Numbers that are held after a rewrite: of the matrices, and of a weight that others read.

    Args:
        shared: a matrix that is the weight itself is one with what others read quantized.
    """
    weight = match["weight"]
    whole = match.program.state[match.program.target_of(weight) or ""]
    total = sum(matrix.numel() for matrix in matrices.values())
    others = list(_other_readers(match))
    shares = shared and all(
        u.target in _SHARING and arguments(u)["weight"] is weight for u in others
    )
    if not others or (place(whole) in matrices and shares):
        return total
    return total + whole.numel()


_SHARING = (aten.linear.default, aten.embedding.default)


def _other_readers(match: Match) -> Iterator[fx.Node]:
    """What reads the weight, or views of it, and is not in the match."""
    queue, inside = [match["weight"]], set(match.nodes)
    while queue:
        for user in queue.pop().users:
            if user in inside:
                continue
            if is_view(user):
                queue.append(user)
            else:
                yield user
