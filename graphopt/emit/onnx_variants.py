"""What is fast in torch need not be in ONNX Runtime: another form of a program, for its fusions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

import torch
from torch import fx

from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Match, Profit, Rule, arguments
from graphopt.rewrite.driver import apply_rules

aten = torch.ops.aten

_ATTENTION = aten.scaled_dot_product_attention.default
_SAME_VALUES = frozenset(
    {
        *(aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default),
        *(aten.contiguous.default, aten.clone.default, aten.unsqueeze.default),
    }
)


class SeparateProjections(Rule):
    """``split(x [W1; W2; W3]^T) = x W1^T, x W2^T, x W3^T`` for query, key and value.

    ONNX Runtime's ``Attention`` operator packs the three weights itself; onnxscript's fusions find
    it only where the products stand apart.
    """

    profit = Profit.ALWAYS

    def find(self, program: Program) -> Iterator[Candidate]:
        for split in program.graph.find_nodes(
            op="call_function", target=aten.split_with_sizes.default
        ):
            items = _items(split)
            if items is not None and _is_constant_linear(program, split) and _attend(items):
                linear = split.args[0]
                yield Candidate(Match(program, items, (linear, split, *items), {"linear": linear}))

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        given = arguments(match["linear"])
        widths = [val(item).shape[-1] for item in match.roots]
        made = []
        for end, width in zip(accumulate(widths), widths, strict=True):
            rows = (
                None if t is None else build(aten.slice.Tensor, t, 0, end - width, end)
                for t in (given["weight"], given["bias"])
            )
            made.append(build(aten.linear.default, given["input"], *rows))
        return tuple(made)


def separate_projections(program: Program) -> Program | None:
    """A copy with query, key and value as products of their own; ``None`` where none is merged."""
    work = program.copy()
    return work if apply_rules(work, [SeparateProjections()]).rewrites else None


def _items(split: fx.Node) -> tuple[fx.Node, ...] | None:
    """The three pieces in order, if all of them are read."""
    found = sorted(split.users, key=lambda user: int(user.args[1]))  # type: ignore[arg-type]
    whole = [user.args[1] for user in found] == [0, 1, 2] and len(val(split)) == 3
    return tuple(found) if whole else None


def _is_constant_linear(program: Program, split: fx.Node) -> bool:
    linear, rank = split.args[0], val(split.args[0]).dim()
    if not isinstance(linear, fx.Node) or linear.target is not aten.linear.default:
        return False
    given = arguments(linear)
    weights = [w for w in (given["weight"], given["bias"]) if w is not None]
    last = arguments(split)["dim"] % rank == rank - 1
    return last and len(linear.users) == 1 and all(map(program.is_constant, weights))


def _attend(items: tuple[fx.Node, ...]) -> bool:
    """Whether the pieces become query, key and value of one attention, through views alone."""
    ends = [_reader(item) for item in items]
    attention = ends[0][0]
    if attention is None or attention.target is not _ATTENTION:
        return False
    return [end == (attention, position) for position, end in enumerate(ends)] == [True] * 3


def _reader(node: fx.Node) -> tuple[fx.Node | None, int]:
    """What reads a value after views, and as which argument; ``None`` where several do."""
    source = node
    while len(source.users) == 1:
        user = next(iter(source.users))
        if user.target not in _SAME_VALUES:
            return user, user.args.index(source) if source in user.args else -1
        source = user
    return None, -1
