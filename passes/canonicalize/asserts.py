"""Asserts that capture leaves behind and that cannot fail."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.passes.canonicalize.identity import Identity, case
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Example, Match, arguments, op

aten = torch.ops.aten


class MetadataAssert(Identity):
    """``assert x.dtype == d and x.shape == s ... = nothing``, where the program is typed so.

    ``Tensor.to`` leaves one behind at every call; it would count as a further user of ``x``.
    """

    pattern = op(aten._assert_tensor_metadata.default, "a", ...)

    def applies(self, match: Match) -> bool:
        return is_idle(match.root)

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return None

    def examples(self) -> Iterable[Example]:
        yield case("to the same dtype", lambda x: x.to(torch.float32) + 1)
        yield case("to another dtype", lambda x: x.to(torch.float64) + 1)
        yield case("on an output", lambda x: (y := x.sin(), y.float() + 1))

    def near_misses(self) -> Iterable[Example]:
        yield case("another assert", lambda x: (torch._assert_async(x.sum() < 1e9, "m"), x + 1)[1])


def is_idle(node: fx.Node) -> bool:
    """Whether a node asserts no more of a tensor than the types of the program say."""
    if node.target is not aten._assert_tensor_metadata.default:
        return False
    wanted = arguments(node)
    fake = val(wanted["a"])
    found = {"size": fake.shape, "stride": fake.stride(), "dtype": fake.dtype}
    found |= {"device": fake.device, "layout": fake.layout}
    return all(_agrees(wanted[k], found[k]) for k in found)


class TrueAssert(Identity):
    """``assert true = nothing``: a literal, or a constant of the model.

    Conditions on sizes stay, even where they hold for every size that the capture allowed: they are
    what refuses the others.
    """

    pattern = op((aten._assert_scalar.default, aten._assert_async.msg), "condition", ...)

    def applies(self, match: Match) -> bool:
        return _is_true(match.program, match["condition"])

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return None

    def examples(self) -> Iterable[Example]:
        yield Example("a constant of the model", lambda: _Checked(True), lambda: (torch.ones(3),))

    def near_misses(self) -> Iterable[Example]:
        yield Example("depends on the input", lambda: _Checked(None), lambda: (torch.ones(3),))


def _agrees(wanted: Any, found: Any) -> bool:
    if wanted is None:
        return True
    if isinstance(wanted, torch.device):
        return wanted.type == found.type and wanted.index in (None, found.index)
    if isinstance(wanted, list | tuple):
        pairs = zip(wanted, found, strict=False)
        same = all(statically_known_true(val(w) == f) for w, f in pairs)
        return same and len(wanted) == len(found)
    return bool(wanted == found)


def _is_true(program: Program, condition: Any) -> bool:
    if not isinstance(condition, fx.Node):
        return condition is True
    if not program.is_constant(condition):
        return False
    tensor = program.tensor(condition)
    return tensor.numel() == 1 and bool(tensor)


class _Checked(nn.Module):
    """Asserts a flag it owns, or a property of its input."""

    def __init__(self, flag: bool | None) -> None:
        super().__init__()
        self.flag: Tensor | None
        self.register_buffer("flag", None if flag is None else torch.tensor(flag))

    def forward(self, x: Tensor) -> Tensor:
        torch._assert_async(x.sum() > 0 if self.flag is None else self.flag, "must hold")
        return x + 1
