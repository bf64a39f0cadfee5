"""Copies that nothing can tell from what they copy."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.aliases import is_returned, is_view
from graphopt.errors import IllegalRewriteError
from graphopt.passes.canonicalize.identity import (
    RESHAPES,
    CopyFree,
    case,
    same_shape,
    same_value,
)
from graphopt.program import val
from graphopt.rewrite import Builder, Example, Match, Refusal, arguments, either, op
from graphopt.rewrite.builder import infer, program_fake_mode
from graphopt.rewrite.match import same_literal
from graphopt.rewrite.stride import same_layout

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default)
_INNER: Any = {"name": "inner", "escapes": True}
_LAYOUT_BOUND = frozenset(
    {aten.as_strided.default, aten.view.default, aten.view.dtype, aten.view_as_complex.default}
)


class PlainCopy(CopyFree):
    """``clone(x) = x`` and ``x.to(its own dtype, copy=True) = x``, where the layout stays.

    Evaluated dropout, ``contiguous()`` and lifted constants leave such copies behind.
    """

    pattern = op(_COPIES, "x", ...)

    def applies(self, match: Match) -> bool:
        return same_value(match.root, match["x"]) and not _promises_layout(match.root)

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("clone", lambda x: x.clone() + 1)
        yield case(
            "contiguous", lambda x: x.sin().clone(memory_format=torch.contiguous_format).exp()
        )
        yield case("constant", lambda x: x + torch.tensor([1.0, 2.0]), (3, 2))
        yield case("forced copy", lambda x: x.to(torch.float32, copy=True).sin())
        yield case("of what else is used", lambda x: x.sin().clone() * x.sin())
        yield case("written in place", lambda x: x.clone().add_(1))

    def near_misses(self) -> Iterable[Example]:
        yield case("copy of an input returned", lambda x: x.clone(), reason="model's own")
        yield case("view of it", lambda x: x.clone()[0], reason="model's own")
        yield case("beside its source", lambda x: (y := x + 1, y.clone()), reason="stay two")
        yield case("other layout", lambda x: x.mT.contiguous() + 1)
        yield case("other dtype", lambda x: x.double() + 1)
        yield case("as complex", lambda x: torch.view_as_complex((x + 1).contiguous()), (3, 2))


class CopyBeforeReshape(CopyFree):
    """``reshape(clone(x)) = reshape(x)``, where both lie alike in memory."""

    pattern = op(RESHAPES, op(aten.clone.default, "x", ..., name="copy"), "shape")

    def applies(self, match: Match) -> bool:
        mode = program_fake_mode(match.program)
        shape = fx.node.map_arg(match["shape"], val)
        try:
            fake = infer(mode, aten.reshape.default, (match.val("x"), shape), {})
        except IllegalRewriteError:
            return False
        return same_shape(fake, val(match.root)) and same_layout(fake, val(match.root))

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build(aten.reshape.default, match["x"], match["shape"])

    def examples(self) -> Iterable[Example]:
        yield case("contiguous view", lambda x: x.mT.contiguous().view(4, 48) + 1)
        yield case("heads", lambda x: x.view(4, 6, 2, 4).transpose(1, 2).reshape(4, 2, 24) + 1)
        yield case(
            "repeated heads", lambda x: x[:, :, None].expand(4, 6, 3, 8).reshape(4, 18, 8) + 1
        )

    def near_misses(self) -> Iterable[Example]:
        yield case("copy used twice", _copied_twice, reason="also used by")
        yield case("view of a copy returned", lambda x: x.clone().view(-1), reason="model's own")
        yield case("a view would do", lambda x: x.mT.contiguous().view(4, 8, 2, 3) + 1)


class WholeWrite(CopyFree):
    """``copy(old, x) = x`` and ``slice_scatter(old, x, everything) = x``: nothing old is left.

    ``y[:] = x`` becomes these once in-place writes are gone.
    """

    pattern = either(
        op(aten.copy.default, "old", "x", ...), op(aten.slice_scatter.default, "old", "x", ...)
    )

    def applies(self, match: Match) -> bool:
        return same_value(match.root, match["x"])

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("assign everything", lambda x: _assigned(x, slice(None)) + 1)
        yield case("scatter everything", lambda x: x.sin().slice_scatter(x + 1, 1))

    def near_misses(self) -> Iterable[Example]:
        yield case("a part", lambda x: x.sin().slice_scatter(x[:, :2] + 1, 1, 2, 4))
        yield case("other dtype", lambda x: x.double().copy_(x))
        yield case("broadcast", lambda x: x.sin().copy_(x[0, 0, 0]))
        yield case("input returned", lambda x: x.sin().copy_(x), reason="model's own")


class WriteOfItself(CopyFree):
    """``slice_scatter(x, x[a:b], a, b) = x``, as for ``select``: writing back what was read."""

    pattern = either(
        op(aten.slice_scatter.default, "x", op(aten.slice.Tensor, "x", ..., **_INNER), ...),
        op(aten.select_scatter.default, "x", op(aten.select.int, "x", ..., **_INNER), ...),
    )

    def applies(self, match: Match) -> bool:
        return _same_place(match.root, match["inner"]) and same_value(match.root, match["x"])

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("slice", lambda x: (y := x.sin()).slice_scatter(y[:, 1:3], 1, 1, 3) + 1)
        yield case("select", lambda x: (y := x.sin()).select_scatter(y[:, 2], 1, 2) + 1)

    def near_misses(self) -> Iterable[Example]:
        yield case("another place", lambda x: (y := x.sin()).slice_scatter(y[:, 1:3], 1, 2, 4) + 1)
        yield case("another index", lambda x: (y := x.sin()).select_scatter(y[:, 2], 1, 3) + 1)
        yield case(
            "beside its source",
            lambda x: ((y := x.sin()).select_scatter(y[:, 2], 1, 2), y),
            reason="stay two",
        )


class ReadOfWrite(CopyFree):
    """``slice_scatter(old, x, a, b)[a:b] = x``, as for ``select``: reading what was written."""

    pattern = either(
        op(aten.slice.Tensor, op(aten.slice_scatter.default, "old", "x", ..., **_INNER), ...),
        op(aten.select.int, op(aten.select_scatter.default, "old", "x", ..., **_INNER), ...),
    )

    def applies(self, match: Match) -> bool:
        return _same_place(match.root, match["inner"])

    def check(self, match: Match) -> Refusal | None:
        if is_returned(match.root) and is_returned(match["inner"]):
            reason = "the part is returned as a view of the whole, which is returned too"
            return Refusal(reason, match.root)
        return super().check(match)

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("slice", lambda x: _written(x, slice(1, 3))[:, 1:3] + 1)
        yield case("select", lambda x: _written(x, 2)[:, 2] + 1)

    def near_misses(self) -> Iterable[Example]:
        yield case("another place", lambda x: _written(x, slice(1, 3))[:, 2:4] + 1)
        yield case("another index", lambda x: _written(x, 2)[:, 3] + 1)
        yield case(
            "returned beside the whole",
            lambda x: (y := _written(x, 2), y[:, 2]),
            reason="as a view of the whole",
        )


def _promises_layout(copy: fx.Node) -> bool:
    """Whether a copy was asked for one memory format and an operator downstream stands on that.

    Strides that capture saw may differ at run time: attention kernels choose their own.
    """
    wanted = arguments(copy).get("memory_format")
    if wanted in (None, torch.preserve_format):
        return False
    return any(_bound_to_layout(user) for user in _users_through_views(copy))


def _bound_to_layout(user: fx.Node) -> bool:
    known = isinstance(user.target, torch._ops.OpOverload) and user.target.namespace == "aten"
    return user.op != "output" and (not known or user.target in _LAYOUT_BOUND)


def _users_through_views(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield user
        if is_view(user):
            yield from _users_through_views(user)


def _same_place(write: fx.Node, read: fx.Node) -> bool:
    """Whether a scatter and a read name the same dimension and range."""
    return same_literal(_place(write), _place(read))


def _place(node: fx.Node) -> list[Any]:
    given = arguments(node)
    dim = given["dim"] % val(node.args[0]).dim()
    end = sys.maxsize if given.get("end") is None else given["end"]
    return [dim, given.get("index"), given.get("start") or 0, end, given.get("step")]


def _written(x: Tensor, where: Any) -> Tensor:
    y = x.sin()
    y[:, where] = x[:, where] * 2
    return y


def _assigned(x: Tensor, where: Any) -> Tensor:
    y = x.sin()
    y[where] = x
    return y


def _copied_twice(x: Tensor) -> tuple[Tensor, ...]:
    y = x.mT.contiguous()
    return y.view(4, 48) + 1, y + 1
