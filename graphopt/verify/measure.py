"""The criterion a rewrite is held to: its error against float64, relative to the original's error.

The multiples (2x for float32, 3x for half precision, more for a handful of elements, where the
original may be right by luck) follow ``torch._dynamo.utils.same``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.rewrite.rule import Numeric

SMALL = 64
"""Below this many elements the original's error is a matter of luck."""

FLOOR = 4.0
"""Units of rounding (eps times the reference's RMS) that are always allowed."""

SENSITIVE = 1e-3
"""The most that a model's sensitivity to its own rounding is taken into account: a gradient that is
1 % off fails however sensitive the model is."""

NOISE = 0.1
"""A value whose own relative error is larger than this says nothing: its terms cancelled."""


@dataclass(frozen=True)
class Measure:
    """Errors of one value: ``rms`` and ``max`` relative to the RMS of the reference.

    ``bound`` is what ``rms`` had to stay under; ``original`` the original's own error.
    """

    rms: float
    max: float
    original: float
    bound: float
    ok: bool
    note: str = ""


ABOVE = "error above the bound"
Errors = tuple[float, float, float]
"""Relative RMS error, relative largest error, and the crest factor of the reference."""

EXACT = Measure(0.0, 0.0, 0.0, 0.0, True)


def compare(
    old: Any,
    new: Any,
    reference: Any,
    numeric: Numeric,
    tolerance: float = 0.0,
    magnitude: float = 0.0,
    rounded: Sequence[Any] = (),
    sensitive: float = SENSITIVE,
) -> Measure:
    """Judge ``new`` against ``old`` with the float64 ``reference``.

    Args:
        tolerance: for lossy rules, the largest relative RMS error against the reference.
        magnitude: RMS of what the value was summed from. Where everything cancelled and the
            original is noise itself (a bias before a batch norm has no gradient), rounding of
            that size is allowed.
        rounded: the original's value again, from runs with random rounding. The largest of their
            errors and of the original's own counts: in a model that magnifies rounding a single
            run may be near the reference by luck.
        sensitive: the most that errors of those runs count for.
    """
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        same = type(old) is type(new) and bool(old == new)
        return EXACT if same else _failure(f"{old!r} became {new!r}")
    if old.shape != new.shape or old.dtype != new.dtype:
        return _failure(f"{_kind(old)} became {_kind(new)}")
    if equal_bits(old, new):
        return EXACT
    if numeric is Numeric.BITWISE:
        return _failure("bits differ", _relative(new, old.double()))
    if old.is_complex():
        old, new = torch.view_as_real(old), torch.view_as_real(new)
        reference = torch.view_as_real(reference)
        rounded = [torch.view_as_real(value) for value in rounded]
    if not old.is_floating_point():
        return _share(old, new, tolerance if numeric is Numeric.LOSSY else 0.0)
    if not _are_finite(old, new) and not torch.equal(old.isfinite(), new.isfinite()):
        return _failure("infinities or NaN in other places")
    return _judge(old, new, reference, numeric, tolerance, magnitude, rounded, sensitive)


def _share(old: Tensor, new: Tensor, tolerance: float) -> Measure:
    """Of integers and booleans, how many differ: decisions that follow from what was off a bit."""
    share = float((old != new).double().mean())
    if tolerance and share <= tolerance:
        return Measure(share, 1.0, 0.0, tolerance, True)
    return _failure("integer or boolean values differ")


def _judge(
    old: Tensor,
    new: Tensor,
    reference: Tensor,
    numeric: Numeric,
    tolerance: float,
    magnitude: float,
    rounded: Sequence[Tensor],
    sensitive: float,
) -> Measure:
    exact = reference.to(torch.float64)
    was, now = _errors(old, exact), _errors(new, exact)
    for other in rounded:
        was = _larger(was, _errors(other, exact), sensitive)
    eps = torch.finfo(old.dtype).eps
    luck = _luck(old)
    multiple, floor = _multiple(old.dtype) * luck, FLOOR * eps * luck
    if was[0] > NOISE or old.dtype == torch.float64:  # in float64 the original is the reference
        floor *= max(1.0, magnitude / (rms(exact) or 1.0))
    bound = multiple * was[0] + floor
    if numeric is Numeric.LOSSY:  # a value smaller than the original's error of it cancelled
        bound = max(tolerance, bound) if was[0] > 1 else tolerance
    peak = math.inf if numeric is Numeric.LOSSY else 2 * multiple * was[1] + 4 * floor * now[2]
    ok = now[0] <= bound and now[1] <= peak
    return Measure(now[0], now[1], was[0], bound, ok, "" if ok else ABOVE)


def _larger(own: Errors, other: Errors, sensitive: float) -> Errors:
    """The original's errors, or those with random rounding where they are larger."""
    rms = max(own[0], min(other[0], sensitive))
    peak = max(own[1], min(other[1], 10 * sensitive))
    return rms, peak, own[2]


def _multiple(dtype: torch.dtype) -> float:
    return 3.0 if dtype in (torch.float16, torch.bfloat16) else 2.0


def _luck(value: Tensor) -> float:
    """How much more a few elements are allowed; less in half precision, which is coarse."""
    if value.numel() > SMALL:
        return 1.0
    return 2.0 if value.dtype in (torch.float16, torch.bfloat16) else 4.0


def _errors(value: Tensor, exact: Tensor) -> Errors:
    """Relative RMS error, relative largest error, and the crest factor of the reference."""
    error, wanted = value.to(torch.float64) - exact, exact
    if not math.isfinite(_norm(error)):
        finite = exact.isfinite() & value.isfinite()
        wanted = torch.where(finite, exact, 0.0)
        error = torch.where(finite, error, 0.0)
    scale = rms(wanted) or 1.0
    peak, crest = _norm(error, math.inf), _norm(wanted, math.inf)
    return rms(error) / scale, peak / scale, max(crest / scale, 1.0)


def rms(value: Tensor) -> float:
    """Root of the mean square of the finite elements; 0 where there are none."""
    total = _norm(value)
    if not math.isfinite(total):
        value = value[value.isfinite()]
        total = _norm(value)
    return total / math.sqrt(value.numel()) if value.numel() else 0.0


def _norm(value: Tensor, order: float = 2) -> float:
    """In float64, without a copy in float64; 0 for no elements."""
    if not value.numel():
        return 0.0
    if not value.is_floating_point():
        value = value.to(torch.float64)
    return float(torch.linalg.vector_norm(value, order, dtype=torch.float64))


def _are_finite(*values: Tensor) -> bool:
    """Whether all elements are, and their squares in float64; without a mask of each."""
    return all(math.isfinite(_norm(value)) for value in values)


def _relative(new: Tensor, reference: Tensor) -> float:
    return _errors(new, reference)[0] if new.is_floating_point() else math.inf


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.is_complex:
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}.get(a.element_size())
    if ints is None:
        return torch.equal(a, b)
    if torch.equal(a.contiguous().view(ints), b.contiguous().view(ints)):
        return True
    if not bool(a.isnan().any()):
        return False
    same_nan = torch.equal(a.isnan(), b.isnan())
    return same_nan and torch.equal(
        a.nan_to_num(0.0).contiguous().view(ints), b.nan_to_num(0.0).contiguous().view(ints)
    )


def kernel_tolerance(value: Any) -> float:
    """What a captured graph may differ by: the same kernels, chosen by other strides perhaps."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return 64 * torch.finfo(value.dtype).eps if floating else 0.0


def worst(measures: list[Measure]) -> Measure:
    """The measure to report for several values: a failure if any, else the largest error."""
    if not measures:
        return EXACT
    return max(measures, key=lambda m: (not m.ok, m.rms / m.bound if m.bound else m.rms))


def _failure(note: str, error: float = math.inf) -> Measure:
    return Measure(error, error, 0.0, 0.0, False, note)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape)}"
