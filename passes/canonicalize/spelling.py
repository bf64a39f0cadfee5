"""One spelling per operation, where the bits are the same; products with 1, sums with nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from graphopt.passes.canonicalize.identity import (
    CopyFree,
    Identity,
    case,
    is_floating,
    same_value,
)
from graphopt.rewrite import Builder, Example, Match, Refusal, arguments, either, num, op, var

aten = torch.ops.aten

_TENSOR_OVERLOAD: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
}


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


_FLOAT = var("x", is_floating)
_ZERO = var("c", lambda c: _is_number(c) and c == 0)
_NONZERO = var("c", lambda c: _is_number(c) and c != 0)


class ScalarOverload(Identity):
    """``add.Scalar(x, c) = add.Tensor(x, c)``; the same for sub, mul and div."""

    pattern = op(tuple(_TENSOR_OVERLOAD), "x", ...)

    def rewrite(self, match: Match, build: Builder) -> Any:
        given = arguments(match.root)
        alpha = {k: v for k, v in given.items() if k == "alpha" and v != 1}
        return build(_TENSOR_OVERLOAD[match.root.target], match["x"], given["other"], **alpha)

    def examples(self) -> Iterable[Example]:
        yield case("add", lambda x: aten.add.Scalar(x, 2, 3))
        yield case("integers", lambda x: aten.div.Scalar(x, 2), torch.arange(3))
        yield case("half", lambda x: aten.mul.Scalar(x, 0.1), torch.randn(3).half())

    def near_misses(self) -> Iterable[Example]:
        yield case("plain", lambda x: x + 2)
        yield case("reversed", lambda x: 2 - x)


_BITWISE: dict[Any, Any] = {
    getattr(getattr(aten, f"__{name}__"), kind): getattr(getattr(aten, f"bitwise_{name}"), kind)
    for name in ("and", "or", "xor")
    for kind in ("Tensor", "Scalar")
}


class PlainBitwise(Identity):
    """``x & y = bitwise_and(x, y)``, as operators of Python are captured; ``|`` and ``^`` alike."""

    pattern = op(tuple(_BITWISE), "x", ...)

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build(_BITWISE[match.root.target], *match.root.args)

    def examples(self) -> Iterable[Example]:
        yield case("masks", lambda x: (x > 0) & (x < 1))
        yield case("or, grown", lambda x: (x > 0) | (x[:1] < 1))
        yield case("integers", lambda x: x ^ x.flip(0), torch.arange(6))
        yield case("a number", lambda x: (x & 5) + (x | 2) + (x ^ 1), torch.arange(6), count=3)
        yield case("other integers", lambda x: x & x.to(torch.uint8), torch.arange(6))

    def near_misses(self) -> Iterable[Example]:
        yield case("logical", lambda x: torch.logical_and(x, x.flip(0)), torch.arange(6))
        yield case("plain", lambda x: torch.bitwise_and(x, x.flip(0)), torch.arange(6))
        yield case("shifted", lambda x: x << 1, torch.arange(6))
        yield case("not", lambda x: ~x, torch.arange(6))


class Square(Identity):
    """``x * x = square(x) = pow(x, 2)``, for floating ``x``."""

    pattern = either(op(aten.square.default, _FLOAT), op(aten.mul.Tensor, _FLOAT, _FLOAT))

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build(aten.pow.Tensor_Scalar, match["x"], 2)

    def examples(self) -> Iterable[Example]:
        yield case("square", lambda x: x.square())
        yield case("product", lambda x: (y := x.sin()) * y)
        yield case("bfloat16", lambda x: x * x, torch.randn(64).bfloat16())

    def near_misses(self) -> Iterable[Example]:
        yield case("two factors", lambda x: x * x.sin())
        yield case("integers", lambda x: x * x, torch.arange(3))
        yield case("booleans", lambda x: x * x, torch.tensor([True, False]))


class Root(Identity):
    """``pow(x, 0.5) = sqrt(x)`` and ``pow(x, -0.5) = rsqrt(x)``, for floating ``x``.

    In half precision ``pow`` rounds the root before it inverts it, and ``rsqrt`` does not.
    """

    pattern = op(aten.pow.Tensor_Scalar, _FLOAT, num("power"))

    def applies(self, match: Match) -> bool:
        wide = match.val("x").dtype in (torch.float32, torch.float64)
        return match["power"] == 0.5 or (match["power"] == -0.5 and wide)

    def rewrite(self, match: Match, build: Builder) -> Any:
        target = aten.sqrt.default if match["power"] > 0 else aten.rsqrt.default
        return build(target, match["x"])

    def examples(self) -> Iterable[Example]:
        yield case("square root", lambda x: x.abs() ** 0.5)
        yield case("reciprocal square root", lambda x: (x * x + 1) ** -0.5)
        yield case("of what is negative", lambda x: x**0.5)

    def near_misses(self) -> Iterable[Example]:
        yield case("other power", lambda x: x.abs() ** 0.25)
        yield case("integers", lambda x: x**0.5, torch.arange(3))
        for dtype in (torch.float16, torch.bfloat16):
            positive = 3 * torch.rand(1000).to(dtype)
            yield case(f"reciprocal root in {dtype}", lambda x: x**-0.5, positive)


class ReversedSub(Identity):
    """``rsub(x, y, alpha) = sub(y, x, alpha)``, for tensors."""

    pattern = op(aten.rsub.Tensor, "x", "y", ...)

    def rewrite(self, match: Match, build: Builder) -> Any:
        alpha = arguments(match.root)["alpha"]
        return build(aten.sub.Tensor, match["y"], match["x"], alpha=alpha)

    def examples(self) -> Iterable[Example]:
        yield case("rsub", lambda x: torch.rsub(x, x.sin()))
        yield case("alpha", lambda x: torch.rsub(x, x.sin(), alpha=3))

    def near_misses(self) -> Iterable[Example]:
        yield case("number", lambda x: 1 - x)


class TypeAs(Identity):
    """``type_as(x, y) = x`` where y is of the dtype and on the device of x, and else a cast."""

    pattern = op(aten.type_as.default, "x", "y")

    def rewrite(self, match: Match, build: Builder) -> Any:
        before, after = match.val("x"), match.val("y")
        wanted = {"dtype": after.dtype, "device": after.device}
        changed = {k: v for k, v in wanted.items() if getattr(before, k) != v}
        return build(aten._to_copy.default, match["x"], **changed) if changed else match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("same", lambda x: (y := x.sin()).cos().type_as(y) + 1)
        yield case("of an input", lambda x: x.type_as(x.sin()))
        yield case("cast", lambda x: x.double().sin().type_as(x) + 1)
        yield case("to integers", lambda x: (3 * x).type_as(torch.arange(2)))

    def near_misses(self) -> Iterable[Example]:
        yield case("a cast by its dtype", lambda x: x.to(torch.float64) + 1)


class SubNumber(Identity):
    """``x - c = x + (-c)``, for floating ``x``: IEEE 754 defines subtraction so."""

    pattern = op(aten.sub.Tensor, _FLOAT, _NONZERO)

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build(aten.add.Tensor, match["x"], -match["c"])

    def examples(self) -> Iterable[Example]:
        yield case("number", lambda x: x - 0.1)
        yield case("half", lambda x: x - 0.1, torch.randn(64).half())

    def near_misses(self) -> Iterable[Example]:
        yield case("integers", lambda x: x - 1, torch.arange(3, dtype=torch.uint8))
        yield case("zero keeps its sign", lambda x: x - 0, torch.tensor([0.0, -0.0]))
        yield case("scaled", lambda x: torch.sub(x, 2, alpha=3))
        yield case("tensor", lambda x: x - x.sin())


class DivPowerOfTwo(Identity):
    """``x / 2**k = x * 2**-k``: only a power of two has an exact reciprocal.

    Both are the same real number rounded once. ``x / 3`` and ``x * (1 / 3)`` are not.
    """

    pattern = op(aten.div.Tensor, _FLOAT, _NONZERO)

    def applies(self, match: Match) -> bool:
        mantissa, exponent = math.frexp(match["c"])
        limit = 14 if match.val("x").dtype is torch.float16 else 126
        return abs(mantissa) == 0.5 and abs(exponent - 1) <= limit

    def rewrite(self, match: Match, build: Builder) -> Any:
        return build(aten.mul.Tensor, match["x"], 1.0 / match["c"])

    def examples(self) -> Iterable[Example]:
        yield case("eight", lambda x: x / 8)
        yield case("minus a quarter", lambda x: x / -0.25)
        yield case("half", lambda x: x / 1024, torch.randn(64).half())

    def near_misses(self) -> Iterable[Example]:
        yield case("three", lambda x: x / 3)
        yield case("integers", lambda x: x / 8, torch.arange(3))
        yield case("rounded", lambda x: torch.div(x, 8, rounding_mode="floor"))
        yield case("beyond half precision", lambda x: x / 65536, torch.randn(64).half())


class TimesOne(CopyFree):
    """``x * 1 = x / 1 = pow(x, 1) = x``, where the dtype stays."""

    pattern = either(
        op((aten.mul.Tensor, aten.div.Tensor), "x", num(1)), op(aten.pow.Tensor_Scalar, "x", num(1))
    )

    def applies(self, match: Match) -> bool:
        return same_value(match.root, match["x"]) and not match.val("x").is_complex()

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("product", lambda x: (x * 1.0).sin())
        yield case("swapped", lambda x: (1 * x).sin())
        yield case("quotient", lambda x: (x / 1).sin())
        yield case("power", lambda x: (x**1).sin())
        yield case("integers", lambda x: x * 1 + x, torch.arange(3))

    def near_misses(self) -> Iterable[Example]:
        yield case("becomes floating", lambda x: x * 1.0, torch.arange(3))
        yield case("complex", lambda x: (x * 1).sin(), torch.tensor([complex(-0.0, -1.0)]))
        yield case("nearly one", lambda x: (x * 1.0000001).sin())
        yield case("broadcast", lambda x: x * torch.ones(1), (2, 1))
        yield case("returned", lambda x: x * 1, reason="model's own")


class PlusNothing(CopyFree):
    """``x - 0 = x + (-0.0) = x``, and ``n + 0 = n`` for integers; not ``x + 0.0``."""

    pattern = op((aten.add.Tensor, aten.sub.Tensor), "x", _ZERO)

    def applies(self, match: Match) -> bool:
        return same_value(match.root, match["x"]) and not match.val("x").is_complex()

    def check(self, match: Match) -> Refusal | None:
        negative = math.copysign(1.0, match["c"]) < 0
        adds = match.root.target is aten.add.Tensor
        if is_floating(match["x"]) and negative is not adds:
            return Refusal("adding 0.0 turns -0.0 into 0.0", match.root)
        return super().check(match)

    def rewrite(self, match: Match, build: Builder) -> Any:  # noqa: ARG002
        return match["x"]

    def examples(self) -> Iterable[Example]:
        yield case("integers", lambda x: (x + 0) * 2, torch.arange(3))
        yield case("minus zero", lambda x: (x - 0).sin(), torch.tensor([0.0, -0.0, 1.0]))
        yield case("plus minus zero", lambda x: (x + -0.0).sin(), torch.tensor([0.0, -0.0]))

    def near_misses(self) -> Iterable[Example]:
        yield case("plus zero", lambda x: (x + 0).sin(), torch.tensor([-0.0]), reason="-0.0")
        yield case("minus minus zero", lambda x: (x - -0.0).sin(), reason="-0.0")
        yield case("becomes floating", lambda x: x + 0.0, torch.arange(3))
        yield case("complex", lambda x: (x + 0).sin(), torch.tensor([complex(-0.0, -0.0)]))
        yield case("returned", lambda x: x + 0, torch.arange(3), reason="model's own")
