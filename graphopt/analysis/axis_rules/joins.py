"""Tensors put together along a dim: cat and stack.

A piece that carries the axis along that dim keeps it, shifted to where the piece begins; the other
pieces are positions of no index. Pieces that were cut from one tensor meet again as one placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch.fx import Node

from graphopt.analysis.axis_rules.call import Call, Outcome, rule
from graphopt.analysis.axis_rules.cut import narrow, repeat, select
from graphopt.analysis.axis_rules.fold import reshape
from graphopt.analysis.axis_rules.labels import Term, combine
from graphopt.analysis.axis_rules.placement import Leg, Placement
from graphopt.analysis.axis_rules.sizes import Shape, Size, quotient, tidy
from graphopt.analysis.axis_rules.views import Change


@dataclass(frozen=True)
class _Piece:
    """One tensor of a join, viewed as ``shape``, from position ``begin`` of the joined dim on."""

    node: Node
    shape: Shape
    begin: Size
    places: tuple[Placement, ...]


@rule("cat", "concat", "concatenate", "hstack")
def cat(call: Call) -> Outcome:
    rank = len(call.results[0])
    dim = call.get("dim", "axis", default=min(rank - 1, 1)) % rank
    nodes = [node for node in call["tensors"] if call.rank(node) == rank]  # else: empty, skipped
    return _join(call, nodes, [call.shape(node) for node in nodes], dim)


@rule("vstack", "dstack")
def stack_rows(call: Call) -> Outcome:
    """``vstack`` joins dim 0 of matrices, ``dstack`` dim 2 of ``(M, N, 1)`` tensors."""
    nodes, rank = call["tensors"], len(call.results[0])
    dim = 0 if "vstack" in call.op else 2
    shapes = []
    for node in nodes:
        shape = (1,) * (call.rank(node) < 2) + call.shape(node)
        shapes.append(shape + (1,) * (dim == 2 and len(shape) < rank))
    return _join(call, nodes, shapes, dim)


@rule("stack")
def stack(call: Call) -> Outcome:
    nodes, dim = call["tensors"], call["dim"] % len(call.results[0])
    shapes = [call.shape(node) for node in nodes]
    return _join(call, nodes, [(*shape[:dim], 1, *shape[dim:]) for shape in shapes], dim)


def _join(call: Call, nodes: Sequence[Node], shapes: Sequence[Shape], dim: int) -> Outcome:
    pieces = _pieces(call, nodes, shapes, dim)
    changes = _copies(pieces, dim) or _shifts(pieces, dim, call.results[0][dim])
    names = [*range(len(call.results[0]))]
    terms = [
        Term(p.node, names, p.shape, c, own=[dim]) for p, c in zip(pieces, changes, strict=True)
    ]
    return combine(call, terms, [names], fixed=[dim])


def _pieces(call: Call, nodes: Sequence[Node], shapes: Sequence[Shape], dim: int) -> list[_Piece]:
    begins = accumulate((shape[dim] for shape in shapes), lambda a, b: tidy(a + b), initial=0)
    out = []
    for node, shape, begin in zip(nodes, shapes, begins, strict=False):
        state = call.state(node)
        places = tuple(reshape(p, call.shape(node), shape) for p in (state.places if state else ()))
        out.append(_Piece(node, shape, begin, places))
    return out


def _copies(pieces: list[_Piece], dim: int) -> list[Change] | None:
    """The same positions joined to themselves along the axis repeat it."""
    first = pieces[0]
    alike = all(p.places == first.places and p.shape == first.shape for p in pieces)
    if len(pieces) == 1 or not alike or not any(place.on(dim) for place in first.places):
        return None
    return [lambda old: repeat(old, first.shape, dim, len(pieces), inside=False)] * len(pieces)


def _shifts(pieces: list[_Piece], dim: int, total: Size) -> list[Change]:
    """Each piece at its place in the whole, the positions of no index around it."""
    shifted = [
        narrow(place, dim, tidy(-p.begin), total)
        for p in pieces
        for place in p.places
        if place.on(dim)
    ]
    wholes = [*shifted, *_progression(pieces, dim, total)]
    return [shift(p.begin, dim, total, wholes) for p in pieces]


def shift(begin: Size, dim: int, total: Size, wholes: list[Placement]) -> Change:
    """What happens to a piece at ``begin`` of a joined ``dim`` of size ``total``.

    ``wholes``: placements of the result; a piece of one position may be a position of one of them.
    """

    def change(old: Placement) -> Placement:
        if old.on(dim):
            return narrow(old, dim, tidy(-begin), total)
        same = (w for w in wholes if w.dim == dim and select(w, dim, begin) == old)
        return next(same, old)

    return change


def _progression(pieces: list[_Piece], dim: int, total: Size) -> list[Placement]:
    """The placement in which single positions, one after another, would lie (``unbind`` undone)."""
    slots = [(p.begin, p.places[0]) for p in pieces if p.places and p.shape[dim] == 1]
    if len(slots) < 2:
        return []
    (begin, first), (end, second) = slots[:2]
    step = quotient(tidy(second.start - first.start), tidy(end - begin))
    if step in (None, 0) or not first.pinned or not second.pinned:
        return []
    return [Placement((Leg(dim, total, step),), tidy(first.start - step * begin))]
