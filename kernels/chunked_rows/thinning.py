"""Gradients of a product's factors without the slopes that round to nothing.

After Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models", section 4.3. A few
rows at a time, a class is kept where a slope of it is at least ``threshold`` times its row's
largest; both products are taken of the kept classes, gathered. Where that is most classes, all are.

The slopes left out, ``L``, count by their sums: ``L 1 (sign(L 1)^T L) / |L 1|`` stands for them,
one outer product for all rows. A vocabulary has a direction in common, along which the slopes of a
row cancel; without the small ones they would not. SmolLM2-135M (V = 49,152) on 510 tokens of text
keeps 6 % of the classes at ``2^-12``, and its gradients of hidden and weight are off by 0.8 and
0.2 %; without the sums by 5.2 and 0.4 %.

What is gathered lies in the memory of the slopes: ``n x V`` numbers of which few are needed. More
than that takes ``N + V`` numbers for the sums.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.kernels.chunked_rows.factors import FactorGradients, Rows
from graphopt.kernels.filtering import report

_MOST = 0.25
"""Of the classes: with more, gathering costs what it saves. Measured on 2 cores, 65 rows, D = 512,
V = 32000, float32: 30 % take the time of all."""

_ROWS = 64
"""Rows that are looked at together: fewer have fewer classes to keep, more use what is gathered
more often."""

_ROWS_ELSEWHERE = 512
"""The same on other devices, which wait for each group's number of classes."""

_BLOCK = 2**17
"""Numbers of the slopes that are copied at a time: 512 KiB in float32."""

_BLOCK_ELSEWHERE = 2**22

_WAITING = 2048
"""Classes of a partial gradient that is cast before it is added to a wider sum."""


class ThinGradients(FactorGradients):
    """As `FactorGradients`, of the kept classes.

    Args:
        threshold: what a slope must be of the largest in its row, above zero.
        count: N.
    """

    def __init__(
        self, hidden: Tensor | None, weight: Tensor | None, threshold: float, count: int
    ) -> None:
        super().__init__(hidden, weight)
        self.threshold, self.count = threshold, count
        self.rest: list[tuple[int, int]] = []
        self.seen = self.kept = 0
        self.left: _Left | None = None

    def piece(self, rows: Rows) -> None:
        for group in _groups(rows):
            size = group.slope.numel()
            self.seen += size
            kept = kept_classes(group.slope, self.threshold)
            if kept is None or not _has_room(group, len(kept)):
                self.kept += size
                self._leave(group.span)
            else:
                self.kept += len(kept) * len(group.slope)
                self._some_classes(group, kept)

    def chunk(self, rows: Rows) -> None:
        for start, stop in self.rest:
            self._all_classes(rows.part(start - rows.span.start, stop - rows.span.start))
        self.rest.clear()

    def finish(self) -> None:
        if self.weight is not None and self.is_fresh:  # there were no rows
            self.weight.zero_()
        if self.left is not None:
            self.left.add_to(self.hidden, self.weight)

    def _leave(self, span: slice) -> None:
        """Rows for `chunk`, with those before them where they touch."""
        start = span.start
        if self.rest and self.rest[-1][1] == start:
            start, _ = self.rest.pop()
        self.rest.append((start, span.stop))

    def _some_classes(self, rows: Rows, kept: Tensor) -> None:
        if self.left is None:
            self.left = _Left(rows, self.count)
        small = self._packed(rows, kept)
        rest = rows.slope.view(-1)[small.numel() :]
        sums = small.new_zeros(rows.hidden.shape, dtype=_wide(small))
        if self.weight is not None and self.is_fresh:
            self.weight.zero_()
            self.is_fresh = False
        features = rows.weight.shape[1]
        step = max(1, rest.numel() // max(1, features))
        for names, slope in zip(kept.split(step), small.split(step, 1), strict=True):
            room = rest[: len(names) * features].view(len(names), features)
            if self.hidden is not None:
                torch.index_select(rows.weight, 0, names, out=room)
                sums += slope @ room
            if self.weight is not None:
                torch.mm(slope.mT, rows.hidden, out=room)
                _add_at(self.weight, names, room)
        if self.hidden is not None:
            self.hidden[rows.span] = sums

    def _packed(self, rows: Rows, kept: Tensor) -> Tensor:
        """The kept columns ``(n, k)`` in the first part of the memory of all; sums others."""
        assert self.left is not None
        flat = rows.slope.view(-1)
        for start, some in _blocks(rows.slope):
            part = some.index_select(1, kept)
            stop = start + len(part)
            self.left.add(rows.part(start, stop), some, part, kept)
            flat[start * len(kept) : stop * len(kept)].view(part.shape).copy_(part)
        return flat[: len(rows.slope) * len(kept)].view(len(rows.slope), len(kept))


class _Left:
    """Sums of what is left out: of each row, of each class, and of ``hidden`` by rows."""

    def __init__(self, rows: Rows, count: int) -> None:
        wide = _wide(rows.slope)
        (classes, features), new = rows.weight.shape, rows.slope.new_zeros
        self.operand = rows.weight
        self.of_rows = new(count, dtype=wide)
        self.of_classes = new(classes, dtype=wide)
        self.of_hidden = new(features, dtype=wide)

    def add(self, rows: Rows, slope: Tensor, part: Tensor, kept: Tensor) -> None:
        """Take in rows whose kept columns are ``part``."""
        wide = self.of_rows.dtype
        sums = slope.sum(1, dtype=wide) - part.sum(1, dtype=wide)
        columns = (sums.sign().to(slope.dtype) @ slope).to(wide)
        self.of_rows[rows.span] = sums
        self.of_classes += columns.index_fill_(0, kept, 0)
        self.of_hidden += (sums.to(rows.hidden.dtype) @ rows.hidden).to(wide)

    def add_to(self, hidden: Tensor | None, weight: Tensor | None) -> None:
        """Nothing where the slopes left out in a row cancel: their sums say little then."""
        total = self.of_rows.abs().sum()
        if not total or self.of_classes.abs().sum() > 2 * total:
            return
        share = self.of_classes / total
        if hidden is not None:
            mean = self.operand.mT @ share.to(self.operand.dtype)
            hidden.addr_(self.of_rows.to(hidden.dtype), mean.to(hidden.dtype))
        if weight is not None:
            weight.addr_(share.to(weight.dtype), self.of_hidden.to(weight.dtype))


def kept_classes(slope: Tensor, threshold: float) -> Tensor | None:
    """Classes that count in ``slope (n, V)``, in order; ``None`` where leaving out is not worth it.

    All count where something is infinite or NaN.
    """
    most, highest = _MOST * slope.shape[1], None
    for _, some in _blocks(slope):
        size = some.abs().to(_wide(slope))
        top = size.amax(1, keepdim=True)
        found = size.div_(torch.where(top == 0, 1, top * threshold)).amax(0)
        highest = found if highest is None else torch.maximum(highest, found)
        if int((highest < 1).sum()) < slope.shape[1] - most:
            return None
    if highest is None or not slope.sum(1, dtype=_wide(slope)).isfinite().all():
        return None
    return (highest < 1).logical_not_().nonzero().squeeze(1)


def told(gradients: list[FactorGradients]) -> None:
    """Report the share of the products that was kept; all of nothing is 1."""
    thin = [g for g in gradients if isinstance(g, ThinGradients)]
    if thin:
        seen, kept = sum(g.seen for g in thin), sum(g.kept for g in thin)
        report(torch.tensor(kept / seen if seen else 1.0))


def _has_room(rows: Rows, count: int) -> bool:
    """Whether as many rows of the weight fit beside the kept columns, in a few turns at worst."""
    free = rows.slope.numel() - len(rows.slope) * count
    return free >= min(count, _WAITING) * rows.weight.shape[1]


def _groups(rows: Rows) -> Iterator[Rows]:
    step = _ROWS if rows.slope.device.type == "cpu" else _ROWS_ELSEWHERE
    for start in range(0, len(rows.slope), step):
        yield rows.part(start, min(start + step, len(rows.slope)))


def _blocks(slope: Tensor) -> Iterator[tuple[int, Tensor]]:
    numbers = _BLOCK if slope.device.type == "cpu" else _BLOCK_ELSEWHERE
    step = max(1, numbers // max(1, slope.shape[1]))
    for start in range(0, len(slope), step):
        yield start, slope[start : start + step]


def _add_at(into: Tensor, names: Tensor, product: Tensor) -> None:
    """``into[names] += product``."""
    if into.dtype == product.dtype:
        into.index_add_(0, names, product)
        return
    for some, part in zip(names.split(_WAITING), product.split(_WAITING), strict=True):
        into.index_add_(0, some, part.to(into.dtype))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
