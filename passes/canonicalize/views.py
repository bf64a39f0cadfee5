"""Views that change nothing, chains of views, and one spelling for each kind of view."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from graphopt.passes.canonicalize.identity import (
    RESHAPES,
    CopyFree,
    Identity,
    case,
    same_shape,
    same_value,
)
from graphopt.program import val
from graphopt.rewrite import Builder, Example, Match, arguments, op
from graphopt.rewrite.match import same_literal

aten = torch.ops.aten

_SQUEEZES = (aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
ROW_MAJOR = (*RESHAPES, aten.unsqueeze.default, *_SQUEEZES)
"""Views that keep the order of elements: equal shapes before and after mean equal tensors."""

PERMUTES = (
    *(aten.permute.default, aten.transpose.int),
    *(aten.t.default, aten.mT.default, aten.numpy_T.default),
)
_INNER: Any = {"name": "inner", "escapes": True}
_DYNAMIC = {"dynamic_shapes": (({0: Dim.DYNAMIC},),)}


class SameShape(Identity):
    """``view(x, x.shape) = expand(x, x.shape) = x[:] = alias(x) = x``, whatever the shape is."""

    pattern = op((*ROW_MAJOR, aten.expand.default, aten.slice.Tensor, aten.alias.default), "x", ...)

    def applies(self, match: Match) -> bool:
        return same_shape(val(match.root), match.val("x")) and not _may_drop(match.root)

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("view", lambda x: x.sin().view(4, 6, 8) + 1)
        yield case("slice", lambda x: x.sin()[:, 0:] + 1)
        yield case("expand", lambda x: x.sin().expand(-1, 6, -1) + 1)
        yield case("alias", lambda x: torch.ops.aten.alias(x) + 1)
        yield case("dynamic", lambda x: x.sin().view(x.shape[0], 6, 8) + 1, **_DYNAMIC)
        yield case("not contiguous", lambda x: x.mT.reshape(4, 8, 6) + 1)
        yield case("returned", lambda x: x.sin().view(4, 6, 8))
        yield case("written in place", lambda x: x.sin()[:].mul_(2))
        yield case("integers", lambda x: x.view(3) + 1, torch.arange(3))

    def near_misses(self) -> Iterable[Example]:
        yield case("other shape", lambda x: x.view(24, 8) + 1)
        yield case("a part", lambda x: x[:, 1:] + 1)
        yield case("equal at the captured size", lambda x: x.view(-1, 4, 12) + 1, **_DYNAMIC)
        yield case("other dtype", lambda x: x.view(torch.int32) + 1)
        yield case("squeeze of an axis that may be 1", lambda x: x.squeeze(0) + 1, **_DYNAMIC)


def _may_drop(node: fx.Node) -> bool:
    """Whether a squeeze meets an axis of symbolic size: at 1 it would go."""
    given = arguments(node)
    if node.target not in _SQUEEZES:
        return False
    shape = val(given["self"]).shape
    dims = given.get("dim", range(len(shape)))
    dims = [dims] if isinstance(dims, int) else dims
    return any(not isinstance(shape[dim], int) for dim in dims)


class RowMajorRoundTrip(Identity):
    """``squeeze(unsqueeze(x, d), d) = view(view(x, s), x.shape) = x``."""

    pattern = op(ROW_MAJOR, op(ROW_MAJOR, "x", ..., **_INNER), ...)

    def applies(self, match: Match) -> bool:
        return same_shape(val(match.root), match.val("x"))

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("squeeze", lambda x: x.unsqueeze(1).squeeze(1) + 1)
        yield case("view", lambda x: x.view(24, 8).view(4, 6, 8) + 1)
        yield case("kept for another", lambda x: ((y := x.view(24, 8)).view(4, 6, 8) + 1, y + 1))
        yield case("dynamic", lambda x: x.flatten(1).view(x.shape[0], 6, 8) + 1, **_DYNAMIC)

    def near_misses(self) -> Iterable[Example]:
        yield case("elsewhere", lambda x: x.unsqueeze(1).view(6, 4, 8) + 1)
        yield case("a permutation inside", lambda x: x.mT.reshape(4, 6, 8) + 1)


class ReshapeOfReshape(Identity):
    """``reshape(reshape(x, a), b) = reshape(x, b)``: only the last shape counts."""

    pattern = op(RESHAPES, op(ROW_MAJOR, "x", ..., **_INNER), "shape")

    def applies(self, match: Match) -> bool:
        return len(match["inner"].users) == 1 or match.val("x").is_contiguous()

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build(aten.reshape.default, match["x"], match["shape"])

    def examples(self) -> Iterable[Example]:
        yield case("two views", lambda x: x.view(24, 8).view(4, 48) + 1)
        yield case("of unsqueeze", lambda x: x.unsqueeze(0).view(24, 8) + 1)
        yield case("rest inferred", lambda x: x.view(24, 8).view(-1, 2) + 1)
        yield case("dynamic", lambda x: x.flatten(0, 1).view(-1, 2, 4) + 1, **_DYNAMIC)
        yield case("kept for another", lambda x: ((y := x.view(24, 8)).view(4, 48) + 1, y + 1))

    def near_misses(self) -> Iterable[Example]:
        yield case("a permutation inside", lambda x: x.view(24, 8).t().reshape(4, 48) + 1)


class PermuteForm(Identity):
    """``t``, ``.T``, ``permute`` and ``transpose`` become the plainest of them, from dim 0 up.

    Nothing moves: ``x``. Two dims swap: ``transpose(x, a, b)`` with ``a < b``. Else ``permute``.
    """

    pattern = op(PERMUTES, "x", ...)

    def applies(self, match: Match) -> bool:
        target, args = permute_form(permutation(match.root))
        return target is None or (match.root.target, match.root.args[1:]) != (target, args)

    def rewrite(self, match: Match, build: Builder) -> Any:
        target, args = permute_form(permutation(match.root))
        return match["x"] if target is None else build(target, match["x"], *args)

    def examples(self) -> Iterable[Example]:
        yield case("t", lambda x: x.t() + 1, (3, 4))
        yield case("T", lambda x: x.T + 1, (3, 4))
        yield case("mT", lambda x: x.mT + 1)
        yield case("permute that swaps", lambda x: x.permute(0, 2, 1) + 1)
        yield case("negative", lambda x: x.permute(-1, 0, 1) + 1)
        yield case("nothing moves", lambda x: x.permute(0, 1, 2) + 1)
        yield case("vector", lambda x: x.t() + 1, (3,))
        yield case("no axes", lambda x: x.transpose(0, -1) + 1, ())

    def near_misses(self) -> Iterable[Example]:
        yield case("swap", lambda x: x.transpose(1, 2) + 1)
        yield case("rotation", lambda x: x.permute(2, 0, 1) + 1)


class PermuteOfPermute(Identity):
    """``permute(permute(x, p), q) = permute(x, p[q])``: transposing twice gives ``x`` back."""

    pattern = op(PERMUTES, op(PERMUTES, "x", ..., **_INNER), ...)

    def rewrite(self, match: Match, build: Builder) -> Any:
        inner = permutation(match["inner"])
        target, args = permute_form([inner[i] for i in permutation(match.root)])
        return match["x"] if target is None else build(target, match["x"], *args)

    def examples(self) -> Iterable[Example]:
        yield case("there and back", lambda x: x.mT.mT + 1)
        yield case("rotations", lambda x: x.permute(1, 2, 0).permute(1, 2, 0) + 1)
        yield case("kept for another", lambda x: ((y := x.mT).permute(2, 0, 1) + 1, y + 1))
        yield case("dynamic", lambda x: x.permute(1, 0, 2).transpose(1, 2) + 1, **_DYNAMIC)

    def near_misses(self) -> Iterable[Example]:
        yield case("something between", lambda x: x.mT.sin().mT + 1)


class ExpandOfExpand(Identity):
    """``expand(expand(x, a), b) = expand(x, b)``; -1 in ``b`` stands for what ``a`` says there."""

    pattern = op(
        aten.expand.default,
        op(aten.expand.default, "x", "between", ..., **_INNER),
        "sizes",
        ...,
    )

    def rewrite(self, match: Match, build: Builder) -> Any:
        sizes = list(match["sizes"])
        new = len(sizes) - len(match["between"])
        for i, size in enumerate(match["between"], start=new):
            sizes[i] = size if same_literal(sizes[i], -1) else sizes[i]
        return build(aten.expand.default, match["x"], sizes)

    def examples(self) -> Iterable[Example]:
        yield case("twice", lambda x: x.expand(3, 8).expand(2, 3, 8) + 1, (1, 8))
        yield case("relative", lambda x: x.expand(3, -1).expand(2, -1, 8) + 1, (1, 8))
        yield case(
            "kept for another", lambda x: ((y := x.expand(3, 8)).expand(2, 3, 8), y + 1), (8,)
        )

    def near_misses(self) -> Iterable[Example]:
        yield case("something between", lambda x: x.expand(3, 8).mT.expand(2, 8, 3) + 1, (1, 8))


class SplitForm(Identity):
    """``chunk`` and equal ``split`` become ``split_with_sizes``, where the sizes are known."""

    pattern = op(aten.split.Tensor, "x", "size", ...)

    def applies(self, match: Match) -> bool:
        parts = val(match.root)
        return all(isinstance(n, int) for p in parts for n in p.shape[self._dim(match) :][:1])

    def rewrite(self, match: Match, build: Builder) -> Any:
        dim = self._dim(match)
        sizes = [p.shape[dim] for p in val(match.root)]
        return build(aten.split_with_sizes.default, match["x"], sizes, dim)

    def _dim(self, match: Match) -> int:
        return int(arguments(match.root)["dim"] % match.val("x").dim())

    def examples(self) -> Iterable[Example]:
        yield case("chunk", lambda x: x.chunk(2, -1)[0] + x.chunk(2, -1)[1])
        yield case("uneven", lambda x: x.split(3, 2)[2] + 1)

    def near_misses(self) -> Iterable[Example]:
        yield case("sizes given", lambda x: x.split([3, 5], 2)[0] + 1)
        yield case("dynamic", lambda x: x.chunk(2, 0)[0] + 1, **_DYNAMIC)


class NothingAdded(CopyFree):
    """``pad(x, 0) = repeat(x, 1) = roll(x, 0) = x``."""

    pattern = op(
        (aten.pad.default, aten.constant_pad_nd.default, aten.repeat.default, aten.roll.default),
        "x",
        "amounts",
        ...,
    )

    def applies(self, match: Match) -> bool:
        nothing = 1 if match.root.target is aten.repeat.default else 0
        return set(match["amounts"]) == {nothing} and same_value(match.root, match["x"])

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("pad", lambda x: torch.nn.functional.pad(x, (0, 0, 0, 0)) + 1)
        yield case("repeat", lambda x: x.repeat(1, 1, 1) + 1)
        yield case("roll", lambda x: x.roll((0, 0), (1, 2)) + 1)

    def near_misses(self) -> Iterable[Example]:
        yield case("shifted", lambda x: torch.nn.functional.pad(x, (1, -1)) + 1)
        yield case("new axis", lambda x: x.repeat(1, 1, 1, 1) + 1)
        yield case("returned", lambda x: x.repeat(1, 1, 1), reason="model's own")


def permutation(node: fx.Node) -> list[int]:
    """Where each dimension of the result comes from, for any operator of `PERMUTES`."""
    source: Tensor = val(node.args[0])
    order = list(range(source.dim()))
    if not order:
        return order
    given = arguments(node)
    if node.target is aten.permute.default:
        return [int(d) % len(order) for d in given["dims"]]
    if node.target in (aten.transpose.int, aten.mT.default):
        a, b = given.get("dim0", -2), given.get("dim1", -1)
        order[a], order[b] = order[b], order[a]
        return order
    return order[::-1]


def permute_form(order: list[int]) -> tuple[Any, tuple[Any, ...]]:
    """The plainest operator for a permutation and its arguments; ``None`` where nothing moves."""
    moved = [i for i, source in enumerate(order) if i != source]
    if not moved:
        return None, ()
    if len(moved) == 2:
        return aten.transpose.int, (moved[0], moved[1])
    return aten.permute.default, (order,)
