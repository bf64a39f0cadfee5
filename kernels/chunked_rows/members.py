"""The cross-entropy kin: what each operator asks of a matrix, and what it makes of its columns.

A member stands for one operator on ``x (n, V)``, or on ``log_softmax(x) = x - norm(x)``. Its fields
are the operator's arguments: names of a body's values first, then these values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.softmax import Columns

aten = torch.ops.aten


@dataclass(frozen=True)
class Member:
    """One operator.

    Attributes:
        of_log: whether it reads the log-softmax.
    """

    of_log: bool

    @property
    def normalised(self) -> bool:
        """Whether it reads ``log_softmax(x)``, which is NaN along all of a row that has none."""
        return self.of_log

    @property
    def total(self) -> bool:
        """Whether it needs the sum of each row."""
        return False

    @property
    def top(self) -> bool:
        """Whether it needs the largest of each row."""
        return False

    @property
    def per_row(self) -> tuple[Any, ...]:
        """Operands with ``n`` rows."""
        return ()

    @property
    def weight_of_all(self) -> Tensor | None:
        """Weights ``(V,)`` for a sum of all classes."""
        return None

    def fits(self, x: Tensor) -> bool:
        """Whether the operands are such that columns give what the operator gives.

        Where it would raise an error they are not, so that it does.
        """
        return self.matches(x)

    def matches(self, x: Tensor) -> bool:  # noqa: ARG002
        """Whether their shapes and dtypes are such; values are not looked at."""
        return True

    def places(self, x: Tensor) -> Tensor | None:  # noqa: ARG002
        """Classes to pick ``(n, k)``."""
        return None

    def give(self, c: Columns) -> Any:
        """The operator's results; ``c.own`` holds what this member picks, ``c.places`` where."""
        raise NotImplementedError


@dataclass(frozen=True)
class LogSumExp(Member):
    """That of a row whose largest number is infinite is that number."""

    keepdim: bool

    def give(self, c: Columns) -> Tensor:
        known = c.peak.isfinite() | (c.norm == c.peak)
        return _kept(c.norm.where(known, c.peak), self.keepdim)


@dataclass(frozen=True)
class Picked(Member):
    """``gather(x, 1, at)``."""

    at: Any

    @property
    def per_row(self) -> tuple[Any, ...]:
        return (self.at,)

    def fits(self, x: Tensor) -> bool:
        return self.matches(x) and _in_range(self.at, x)

    def matches(self, x: Tensor) -> bool:
        shaped = self.at.dim() == 2 and self.at.shape[0] == x.shape[0]
        return shaped and bool(self.at.dtype == torch.int64)

    def places(self, x: Tensor) -> Tensor:  # noqa: ARG002
        return self.at

    def give(self, c: Columns) -> Tensor:
        assert c.own is not None
        return c.own - c.norm if self.of_log else c.own


@dataclass(frozen=True)
class Loss(Member):
    """``w[t] (norm - x[t])``, zero where the target is ignored; with smoothing ``s``
    ``(1 - s)`` times that and ``s / V sum_v w[v] (norm - x[v])``."""

    target: Any
    weight: Any
    summed: bool
    ignored: int
    smoothing: float

    @property
    def normalised(self) -> bool:
        return True

    @property
    def per_row(self) -> tuple[Any, ...]:
        return (self.target,)

    @property
    def total(self) -> bool:
        return self.smoothing > 0 and self.weight is None

    @property
    def weight_of_all(self) -> Tensor | None:
        return self.weight if self.smoothing else None

    def fits(self, x: Tensor) -> bool:
        return self.matches(x) and _in_range(self._safe(), x)

    def matches(self, x: Tensor) -> bool:
        target, weight = self.target, self.weight
        if target.dtype != torch.int64 or target.shape != x.shape[:1]:
            return False
        if weight is not None and (weight.requires_grad or weight.shape != x.shape[1:]):
            return False
        same = weight is None or weight.dtype == x.dtype
        return same and 0 <= self.smoothing <= 1

    def _safe(self) -> Tensor:
        return self.target.where(self.target != self.ignored, 0)

    def places(self, x: Tensor) -> Tensor:  # noqa: ARG002
        return self._safe().unsqueeze(1)

    def give(self, c: Columns) -> Tensor:
        assert c.own is not None
        counts = (self.target != self.ignored).unsqueeze(1)
        loss = c.norm - c.own
        if self.weight is not None:
            loss = loss * self.weight.to(loss.dtype)[c.places]
        loss = loss.where(counts, 0)
        if self.smoothing:
            smooth = self._smooth(c).where(counts, 0)
            loss = (1 - self.smoothing) * loss + self.smoothing * smooth
        return loss.sum() if self.summed else loss.squeeze(1)

    def _smooth(self, c: Columns) -> Tensor:
        """The mean over classes."""
        if self.weight is None:
            assert c.total is not None
            return c.norm - c.total / c.classes
        assert c.weighted is not None
        mass = self.weight.sum(dtype=c.norm.dtype)
        return (c.norm * mass - c.weighted) / c.classes


@dataclass(frozen=True)
class Total(Member):
    """The sum, or the mean, of each row."""

    mean: bool
    keepdim: bool

    @property
    def total(self) -> bool:
        return True

    def give(self, c: Columns) -> Tensor:
        assert c.total is not None
        column = c.total - c.classes * c.norm if self.of_log else c.total
        return _kept(column / c.classes if self.mean else column, self.keepdim)


@dataclass(frozen=True)
class Highest(Member):
    """``max(x, 1)``: values and places."""

    keepdim: bool

    def places(self, x: Tensor) -> Tensor:
        return x.detach().max(1, keepdim=True).indices

    def give(self, c: Columns) -> tuple[Tensor, Tensor]:
        assert c.own is not None
        assert c.places is not None
        values = c.own - c.norm if self.of_log else c.own
        return _kept(values, self.keepdim), _kept(c.places, self.keepdim)


@dataclass(frozen=True)
class Top(Member):
    """``amax(x, 1)``, whose gradient is shared by equals."""

    keepdim: bool

    @property
    def top(self) -> bool:
        return True

    def give(self, c: Columns) -> Tensor:
        assert c.top is not None
        return _kept(c.top - c.norm if self.of_log else c.top, self.keepdim)


@dataclass(frozen=True)
class Best(Member):
    """``argmax(x, 1)``, which is that of the log-softmax too."""

    keepdim: bool

    def give(self, c: Columns) -> Tensor:
        assert c.best is not None
        return _kept(c.best, self.keepdim)


def _kept(column: Tensor, keepdim: bool) -> Tensor:
    return column if keepdim else column.squeeze(1)


def _in_range(index: Tensor, x: Tensor) -> bool:
    """On a CPU; elsewhere ``gather`` asserts it, and nothing waits for the device."""
    if index.device.type != "cpu":
        return True
    return not bool(((index < 0) | (index >= x.shape[1])).any())


Given = Mapping[str, Any]


def _cross_entropy(given: Given, *, of_log: bool) -> Member | None:
    if given["reduction"] not in (0, 2):
        return None
    return Loss(
        of_log,
        given["target"],
        given["weight"],
        given["reduction"] == 2,
        given["ignore_index"],
        given.get("label_smoothing", 0.0),
    )


def _over_classes(dim: Any) -> bool:
    return dim in (1, -1, [1], [-1])


def _plain(given: Given) -> bool:
    """Over the classes, in the dtype at hand."""
    return _over_classes(given["dim"]) and given.get("dtype") is None


_READINGS: dict[Any, Callable[[Given, bool], Member | None]] = {
    aten.cross_entropy_loss.default: lambda g, log: None if log else _cross_entropy(g, of_log=log),
    aten.nll_loss.default: lambda g, log: _cross_entropy(g, of_log=log) if log else None,
    aten.nll_loss_nd.default: lambda g, log: _cross_entropy(g, of_log=log) if log else None,
    aten.logsumexp.default: lambda g, log: None if log else LogSumExp(log, g["keepdim"]),
    aten.gather.default: lambda g, log: Picked(log, g["index"]),
    aten.sum.dim_IntList: lambda g, log: Total(log, False, g["keepdim"]),
    aten.mean.dim: lambda g, log: Total(log, True, g["keepdim"]),
    aten.max.dim: lambda g, log: Highest(log, g["keepdim"]),
    aten.amax.default: lambda g, log: Top(log, g["keepdim"]),
}

LOGS = frozenset({aten.log_softmax.int, aten._log_softmax.default})


def reading(target: Any, given: Given, *, of_log: bool) -> Member | None:
    """The member that an operator is; ``None`` where it is none.

    Args:
        given: its arguments by name.
        of_log: whether it reads a log-softmax.
    """
    make = _READINGS.get(target)
    if make is None or ("dim" in given and not _plain(given)):
        return None
    return make(given, of_log)


def reading_best(target: Any, given: Given, *, of_log: bool) -> Member | None:
    """As `reading`, and the argmax, which needs a sweep of its own where the matrix is held."""
    if target is aten.argmax.default and _over_classes(given["dim"]):
        return Best(of_log, given["keepdim"])
    return reading(target, given, of_log=of_log)


def is_log(target: Any, given: Given) -> bool:
    """Whether an operator is the log-softmax over the classes."""
    return target in LOGS and _plain(given) and not given.get("half_to_float", False)


def normalises(target: Any) -> bool:
    """Whether an operator needs the softmax; the others alone are not worth one."""
    return target in LOGS or target in (aten.logsumexp.default, aten.cross_entropy_loss.default)
