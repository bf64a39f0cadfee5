"""Rules as index notation: name the dims of operands and results, say which names mix.

``linear`` is ``x[b, k], w[n, k] -> out[b, n]``: a name that no result has is contracted, a name in
``mixed`` mixes although it stays (softmax, layer norm), every other name is parallel. A dim of size
one broadcasts and carries nothing. Names are any hashables; ``None`` stands for a dim of no name.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch.fx import Node

from graphopt.analysis.axis_rules.call import Aligned, Call, Carry, Mix, MixKind, Outcome, State
from graphopt.analysis.axis_rules.fold import reshape
from graphopt.analysis.axis_rules.placement import Placement
from graphopt.analysis.axis_rules.sizes import Shape, Untrackable

Label: TypeAlias = Hashable
Labels: TypeAlias = Sequence[Label]
MAX_PLACES = 2


@dataclass(frozen=True)
class Term:
    """A tensor and the names of its dims.

    ``shape``: view it so first (``(C,) -> (groups, c)``); ``change``: then move its placement.
    ``own``: names along which its positions are not those of other operands (a piece of a cat).
    """

    node: Node | None
    labels: Labels
    shape: Shape | None = None
    change: Callable[[Placement], Placement] = lambda place: place
    own: Collection[Label] = ()


def term(node: Node | None, *labels: Label) -> Term:
    return Term(node, labels)


@dataclass(frozen=True)
class _Leaf:
    """One place of one operand, in the operand's named dims."""

    term: Term
    place: Placement

    @property
    def labels(self) -> dict[int, Label]:
        return {leg.dim: self.term.labels[leg.dim] for leg in self.place.legs}


def combine(
    call: Call,
    operands: Iterable[Term],
    results: Sequence[Term | Labels | None],
    mixed: Mapping[Label, MixKind] | None = None,
    *,
    lost: MixKind = "contract",
    fixed: Collection[Label] = (),
    random: bool = False,
) -> Outcome:
    """The outcome of an operation given in index notation.

    Args:
        operands: the tensor arguments; a term whose node is ``None`` was not given.
        results: names per output tensor; ``None`` for one that does not depend on the operands.
        mixed: names that mix, and how; a name missing from all results mixes as ``lost``.
        fixed: names along which the call's arguments state sizes or positions.
    """
    terms = [operand for operand in operands if operand.node is not None]
    leaves = [_Leaf(t, p) for t in terms for p in _places(call, t)]
    outs = [_result(r) for r in results]
    kept = {label for out in outs if out for label in out.labels}
    mix = _find_mix(leaves, kept, mixed or {}, lost)
    inputs = [state for t in terms if (state := call.state(t.node))]
    states = tuple(
        _state(inputs, leaves, out, shape, pure=mix is None)
        for out, shape in zip(outs, call.results, strict=True)
    )
    return Outcome(
        states,
        mix or _join(inputs, states),
        as_is=not any(label in fixed for leaf in leaves for label in leaf.labels.values()),
        random=random,
        aligned=tuple(dict.fromkeys(a for leaf in leaves for a in _aligned(call, leaf, terms))),
    )


def _result(result: Term | Labels | None) -> Term | None:
    return result if result is None or isinstance(result, Term) else Term(None, result)


def _places(call: Call, operand: Term) -> list[Placement]:
    state = call.state(operand.node)
    if state is None or operand.node is None:
        return []
    shape = call.shape(operand.node)
    return [operand.change(reshape(p, shape, operand.shape or shape)) for p in state.places]


def _find_mix(
    leaves: list[_Leaf], kept: set[Label], mixed: Mapping[Label, MixKind], lost: MixKind
) -> Mix | None:
    for leaf in leaves:
        for dim, label in leaf.labels.items():
            kind = mixed.get(label, None if label in kept and label is not None else lost)
            if kind is not None:
                return Mix(kind, f"{kind} over dim {dim} of {leaf.term.node}, where the axis lives")
    return None


def _state(
    inputs: list[Carry], leaves: list[_Leaf], out: Term | None, shape: Shape, *, pure: bool
) -> State:
    if out is None or not inputs:
        return None
    moved = (_moved(leaf, {label: dim for dim, label in enumerate(out.labels)}) for leaf in leaves)
    places = tuple(dict.fromkeys(reshape(p, out.shape or shape, shape) for p in moved if p))
    if len(places) > MAX_PLACES:
        places = ()
    return Carry(places, pure and len(places) == 1 and all(state.pure for state in inputs))


def _moved(leaf: _Leaf, dims: Mapping[Label, int]) -> Placement | None:
    targets = {dim: dims[label] for dim, label in leaf.labels.items() if label in dims}
    if len(targets) < len(leaf.labels):
        return None
    if len(set(targets.values())) < len(targets):
        raise Untrackable("two dims of the axis meet on one diagonal")
    return leaf.place.moved(targets)


def _join(inputs: list[Carry], states: tuple[State, ...]) -> Mix | None:
    most = max((len(state.places) for state in inputs), default=0)
    for state in states:
        if state and not state.pure and (len(state.places) > most or _crowded(state, inputs)):
            return Mix("join", "positions of different indices of the axis meet")
    return None


def _crowded(state: Carry, inputs: list[Carry]) -> bool:
    return not state.places and sum(len(other.places) for other in inputs) > MAX_PLACES


def _aligned(call: Call, leaf: _Leaf, terms: list[Term]) -> Iterable[Aligned]:
    for other in terms:
        if other is leaf.term or other.node is None:
            continue
        real = call.shape(other.node)
        shape = other.shape or real
        spots = {
            label: k
            for k, label in enumerate(other.labels)
            if shape[k] != 1 and label not in other.own
        }
        dims = {dim: spots[label] for dim, label in leaf.labels.items() if label in spots}
        carried = {dim for place in _places(call, other) for dim in place.dims}
        if dims and not carried & set(dims.values()):
            place = reshape(_fitted(leaf.place.moved(dims), shape), shape, real)
            yield Aligned(other.node, place, partial=len(dims) < len(leaf.labels))


def _fitted(place: Placement, shape: Shape) -> Placement:
    """For an operand that is read only in part, or not to the end: its dims as long as they are."""
    legs = (replace(leg, size=shape[leg.dim]) if leg.whole else leg for leg in place.legs)
    return replace(place, legs=tuple(legs))
