"""What canonicalization rules share: exact identities on a node or two, and when copies count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.aliases import is_returned, memory_of
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Numeric, Profit, Refusal, Rule
from graphopt.rewrite.stride import same_layout

aten = torch.ops.aten

RESHAPES = (aten.reshape.default, aten.view.default, aten._unsafe_view.default)


class Identity(Rule):
    """A rule that keeps every bit and always pays; it stays silent where `applies` is false.

    Views of weights stay views: another spelling must not become a second copy.
    """

    numeric = Numeric.BITWISE
    profit = Profit.ALWAYS
    folds = False

    def applies(self, match: Match) -> bool:  # noqa: ARG002
        """Whether the identity holds for this match."""
        return True

    def find(self, program: Program) -> Iterator[Candidate]:
        found = (c for c in super().find(program) if c.match is not None)
        return (c for c in found if c.match is not None and self.applies(c.match))


class CopyFree(Identity):
    """An identity that hands out ``x`` itself where the original made a copy of it."""

    def check(self, match: Match) -> Refusal | None:
        return copy_refusal(match.root, match["x"])


def copy_refusal(copy: fx.Node, source: fx.Node) -> Refusal | None:
    """A copy must stay where the caller could tell: returned, while its source is reachable too."""
    if not is_returned(copy):
        return None
    memory = memory_of(source)
    if memory.op == "placeholder":
        return Refusal(f"the copy is returned, and `{memory.name}` must stay the model's own", copy)
    if is_returned(memory):
        return Refusal(f"the copy is returned beside `{memory.name}`: they must stay two", copy)
    return None


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two rows of extents are equal for every input."""
    if len(a) != len(b):
        return False
    return all(statically_known_true(m == n) for m, n in zip(a, b, strict=True))


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Whether two shapes are equal for every input."""
    return same_sizes(a.shape, b.shape)


def same_value(a: fx.Node, b: Any) -> bool:
    """Whether two nodes agree in shape, dtype, device and strides."""
    x, y = val(a), val(b)
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return False
    return (x.dtype, x.device) == (y.dtype, y.device) and same_shape(x, y) and same_layout(x, y)


def is_floating(node: Any) -> bool:
    """Whether a node is a tensor of real floating numbers."""
    fake = val(node)
    return isinstance(fake, Tensor) and fake.dtype.is_floating_point


def rebuilt(build: Builder, node: fx.Node, name: str, value: Any) -> Any:
    """The same call with one argument replaced, at the place where it stands."""
    target: Any = node.target
    place = [a.name for a in target._schema.arguments].index(name)
    args, kwargs = list(node.args), dict(node.kwargs)
    if place < len(args):
        args[place] = value
    else:
        kwargs[name] = value
    return build(target, *args, **kwargs)


class Call(nn.Module):
    """A function as a module, for examples."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def case(
    name: str, function: Callable[..., Any], *inputs: tuple[int, ...] | Tensor, **options: Any
) -> Example:
    """An example around one function; a tuple of sizes stands for a normal float32 tensor."""
    sizes = inputs or ((4, 6, 8),)

    def make() -> tuple[Tensor, ...]:
        return tuple(s if isinstance(s, Tensor) else torch.randn(s) for s in sizes)

    return Example(name, lambda: Call(function), make, **options)
