"""What a rule sees (`Call`), what it answers (`Outcome`), and the table of rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Node

from graphopt.analysis.axis_rules.placement import Placement
from graphopt.analysis.axis_rules.sizes import Shape, Size, size_of

MixKind = Literal[
    "reduce", "contract", "normalise", "softmax", "convolve", "resample", "scan", "sort",
    "reindex", "join",
]  # fmt: skip


@dataclass(frozen=True)
class Carry:
    """One tensor that depends on the axis.

    ``places`` are the dims that are indexed by it: none where the axis was mixed away, two where
    positions meet (the scores ``q @ k.T`` of one sequence). ``pure``: a position depends on the
    axis only at its own index, because nothing before it mixed.
    """

    places: tuple[Placement, ...]
    pure: bool


State = Carry | None
"""``None``: does not depend on the axis."""


@dataclass(frozen=True)
class Parallel:
    """Each slice of the result depends on the same slice of the operands alone.

    ``as_is``: the same call on the sliced operands gives the sliced result; otherwise the call
    names sizes or positions along the axis (``slice``, ``view``, ``is_causal``) and needs others.
    ``random``: it draws random numbers, so a slice draws others.
    """

    as_is: bool = True
    random: bool = False


@dataclass(frozen=True)
class Mix:
    """The operation combines different indices of the axis, or moves them by data."""

    kind: MixKind
    reason: str
    where: str = ""


@dataclass(frozen=True)
class Unknown:
    """The analysis stops here: no rule, or a rule that cannot express the result."""

    reason: str
    where: str


@dataclass(frozen=True)
class Aligned:
    """An operand that does not carry the axis but is indexed by it: slice it along too.

    ``partial``: it has only some of the dims that the axis is spread over.
    """

    node: Node
    placement: Placement
    partial: bool = False


@dataclass(frozen=True)
class Outcome:
    """A rule's answer: one state per output tensor, and what the operation does along the axis."""

    states: tuple[State, ...]
    mix: Mix | None = None
    as_is: bool = True
    random: bool = False
    aligned: tuple[Aligned, ...] = field(default=())


Rule = Callable[["Call"], Outcome]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators by name: ``sum.dim_IntList``, or ``softmax`` for the default
    overload; the namespace is ``aten`` unless given (``graphopt::fused.default``).
    """

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[full_name(name)] = function
        return function

    return register


def full_name(name: str) -> str:
    space, _, op = name.rpartition("::")
    return f"{space or 'aten'}::{op if '.' in op else op + '.default'}"


def name_of(target: Any) -> str | None:
    """The key of an operator in the table of rules; ``None`` for anything else."""
    if not isinstance(target, torch._ops.OpOverload):
        return None
    return f"{target._schema.name}.{target._schema.overload_name or 'default'}"


class Call:
    """One node, its arguments by schema name, and the states of its operands."""

    def __init__(self, node: Node, states: Mapping[Node, Any], shapes: Shapes) -> None:
        self.node, self.states, self._shapes = node, states, shapes
        schema = node.target._schema  # type: ignore[union-attr]
        self.args: dict[str, Any] = {
            arg.name: node.args[k]
            if k < len(node.args)
            else node.kwargs.get(arg.name, arg.default_value)
            for k, arg in enumerate(schema.arguments)
        }

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def get(self, *names: str, default: Any = None) -> Any:
        """The first argument of these names that this overload has."""
        return next((self.args[name] for name in names if name in self.args), default)

    def beside(self, node: Node, states: Mapping[Any, Any] | None = None) -> Call:
        """Another node of the same graph, seen with other states."""
        return Call(node, states or {}, self._shapes)

    @property
    def op(self) -> str:
        """The operator's name without namespace and overload: ``max_pool2d``."""
        return str(self.node.target._schema.name).partition("::")[2]  # type: ignore[union-attr]

    @property
    def main(self) -> Node:
        """The first tensor argument."""
        found: Node = next(v for v in self.args.values() if isinstance(v, Node))
        return found

    @property
    def tensors(self) -> list[Node]:
        """The tensor arguments, lists of tensors flattened."""
        listed = [v if isinstance(v, (list, tuple)) else [v] for v in self.args.values()]
        return [v for values in listed for v in values if is_tensor(v)]

    def state(self, node: Any) -> State:
        return self.states.get(node) if isinstance(node, Node) else None

    def places(self, node: Any) -> tuple[Placement, ...]:
        state = self.state(node)
        return state.places if state else ()

    def shape(self, node: Node) -> Shape:
        return self._shapes.of(node)[0]

    def rank(self, node: Node) -> int:
        return len(self.shape(node))

    @property
    def results(self) -> tuple[Shape, ...]:
        """The shapes of the output tensors."""
        return self._shapes.of(self.node)

    def size(self, value: Any) -> Size:
        """A size argument: an integer, a ``SymInt`` or the node that computes one."""
        return size_of(value.meta["val"] if isinstance(value, Node) else value)


def is_tensor(value: Any) -> bool:
    """Whether a value is a node that holds one tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


class Shapes:
    """Shapes of the tensors that nodes hold, from ``meta["val"]``, each read once."""

    def __init__(self) -> None:
        self._known: dict[Node, tuple[Shape, ...]] = {}

    def of(self, node: Node) -> tuple[Shape, ...]:
        if node not in self._known:
            value = node.meta.get("val")
            values = value if isinstance(value, (tuple, list)) else (value,)
            self._known[node] = tuple(_shape(item) for item in values)
        return self._known[node]


def _shape(value: Any) -> Shape:
    return tuple(map(size_of, value.shape)) if isinstance(value, torch.Tensor) else ()
