"""Attention masks as libraries build them from index tensors, without the index tensors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from graphopt.errors import IllegalRewriteError
from graphopt.passes.canonicalize.identity import (
    CopyFree,
    Identity,
    case,
    copy_refusal,
    rebuilt,
    same_sizes,
)
from graphopt.passes.canonicalize.ranges import always_true, counted_axis
from graphopt.passes.canonicalize.views import permute_form
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Example, Match, Numeric, Refusal, op

aten = torch.ops.aten

_ANDS = (aten.logical_and.default, aten.bitwise_and.Tensor)
_DIM = Dim("rows", min=2)
_DYNAMIC: Any = {"dynamic_shapes": (({0: _DIM},),)}


class WholeIndex(CopyFree):
    """``x[arange(B)[:, None], arange(S)[None]] = x``: each axis indexed with all of it, in order.

    The indices broadcast against each other: the result has an axis of ``x`` where an index counts
    and one element elsewhere, as ``x[:, None, None, :]`` has.
    """

    pattern = op(aten.index.Tensor, "x", "indices")

    def applies(self, match: Match) -> bool:
        axes = _axes(match)
        if len(set(axes)) < match.val("x").dim():
            return False
        return same_sizes([val(match.root).shape[a] for a in axes], match.val("x").shape)

    def rewrite(self, match: Match, build: Builder) -> Any:
        axes, value = _axes(match), match["x"]
        target, args = permute_form(sorted(range(len(axes)), key=axes.__getitem__))
        value = build(target, value, *args) if target else value
        for axis in range(val(match.root).dim()):
            value = value if axis in axes else build(aten.unsqueeze.default, value, axis)
        return value

    def examples(self) -> Iterable[Example]:
        yield case("rows and columns", lambda x: x[_count(3, 2, 0), _count(4, 1, 0)] + 1, (3, 4))
        yield case("apart", lambda x: x[_count(3, 4, 0), _count(4, 4, 3)] + 1, (3, 4))
        yield case("swapped", lambda x: x[_count(3, 2, 1), _count(4, 2, 0)].sum(0), (3, 4))
        yield case("dynamic", lambda x: x[_count(x.shape[0], 2, 0), _count(4, 2, 1)] + 1, (3, 4),
                   **_DYNAMIC)  # fmt: skip

    def near_misses(self) -> Iterable[Example]:
        yield case("a part", lambda x: x[_count(2, 2, 0), _count(4, 2, 1)] + 1, (3, 4))
        yield case("diagonal", lambda x: x[_count(4, 1, 0), _count(4, 1, 0)] + 1, (4, 4))
        yield case("shifted", lambda x: x[_count(3, 2, 0) - 1, _count(4, 2, 1)] + 1, (3, 4))
        yield case("one axis", lambda x: x[:, _count(4, 1, 0)] + 1, (3, 4))
        yield case("backwards", lambda x: x[torch.arange(2, -1, -1)] + 1, (3,))
        yield case("returned", lambda x: x[_count(3, 1, 0)], (3,), reason="model's own")


class AndTrue(Identity):
    """``and(true, x) = x``, expanded where the sizes need it.

    Libraries start a mask from ones, and compare positions with 0.
    """

    pattern = op(_ANDS, "a", "b")

    def applies(self, match: Match) -> bool:
        kept = _kept(match)
        return kept is not None and val(kept).dtype is torch.bool

    def check(self, match: Match) -> Refusal | None:
        kept = _kept(match)
        return copy_refusal(match.root, kept) if kept else None

    def rewrite(self, match: Match, build: Builder) -> Any:
        kept, wanted = _kept(match), val(match.root).shape
        extra = len(wanted) - len(val(kept).shape)
        sizes = [
            -1 if i >= extra and statically_known_true(val(kept).shape[i - extra] == n)
            else _extent(match.program, build, n)
            for i, n in enumerate(wanted)
        ]  # fmt: skip
        return kept if set(sizes) == {-1} else build(aten.expand.default, kept, sizes)

    def examples(self) -> Iterable[Example]:
        yield case("ones", lambda x: _and(_and(x > 0, x.new_ones((), dtype=torch.bool)), x < 1))
        yield case("positions", lambda x: _and(torch.arange(6)[:, None] >= 0, x > 0).float())
        yield case("grown", lambda x: _and(torch.arange(6)[:, None] >= 0, x > 0).float(), (8,))
        yield case("dynamic", lambda x: _and(torch.arange(x.shape[0]) >= 0, x[0] > 0).float(),
                   (4, 1), **_DYNAMIC)  # fmt: skip

    def near_misses(self) -> Iterable[Example]:
        yield case("some positions", lambda x: _and(torch.arange(8) >= 1, x > 0))
        yield case("shifted positions", lambda x: _and(torch.arange(8) - 1 >= 0, x > 0))
        yield case("integers", lambda x: _and(x, torch.ones(3, dtype=torch.int64)), torch.arange(3))
        yield case(
            "returned",
            lambda x: (y := x > 0, _and(y, x.new_ones((), dtype=torch.bool))),
            reason="stay two",
        )


class TrueMask(Identity):
    """``attention(q, k, v, mask=true) = attention(q, k, v)``: vision models mask nothing.

    Without a mask faster kernels apply, whose sums may round in another order.
    """

    numeric = Numeric.REASSOCIATED
    pattern = op(aten.scaled_dot_product_attention.default, "q", "k", "v", "mask", ...)

    def applies(self, match: Match) -> bool:
        return always_true(match["mask"])

    def rewrite(self, match: Match, build: Builder) -> Any:
        return rebuilt(build, match.root, "attn_mask", None)

    def examples(self) -> Iterable[Example]:
        yield case("ones", lambda x: _attend(x, x.new_ones((6, 6), dtype=torch.bool)), (2, 4, 6, 8))
        yield case("positions", lambda x: _attend(x, torch.arange(6)[None] >= 0), (2, 4, 6, 8))

    def near_misses(self) -> Iterable[Example]:
        yield case("causal", lambda x: _attend(x, x.new_ones(6, 6).tril().bool()), (2, 4, 6, 8))
        yield case("added to the scores", lambda x: _attend(x, x.new_ones(6, 6)), (2, 4, 6, 8))
        yield case("no mask", lambda x: _attend(x, None), (2, 4, 6, 8))


def _axes(match: Match) -> list[int]:
    """The axis of the result that each index counts along; empty where one does something else."""
    rank, found = val(match.root).dim(), []
    for index in match["indices"]:
        axis = counted_axis(index)
        if axis is None:
            return []
        found.append(axis + rank - val(index).dim())
    return found


def _kept(match: Match) -> fx.Node | None:
    """The operand that decides, where the other is true everywhere."""
    a, b = match["a"], match["b"]
    return b if always_true(a) else a if always_true(b) else None


def _extent(program: Program, build: Builder, extent: Any) -> Any:
    """An extent as an argument: a number, or the size of a user input that has it."""
    if isinstance(extent, int):
        return extent
    for node in program.user_inputs():
        for dim, size in enumerate(getattr(val(node), "shape", ())):
            if statically_known_true(size == extent):
                return build.size(node, dim)
    raise IllegalRewriteError(f"no input has the extent {extent}")


_and = torch.bitwise_and


def _count(size: Any, rank: int, axis: int) -> Tensor:
    return torch.arange(size).view([-1 if i == axis else 1 for i in range(rank)])


def _attend(x: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x, mask)
