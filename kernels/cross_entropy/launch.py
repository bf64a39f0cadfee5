"""How the Triton kernels are called: spans of classes forward, panels of classes backward.

For ``P = 2 N V D`` FLOPs a product, forward takes ``P`` and backward ``3 P``: the slopes of a
panel (``P`` in all, the logits computed again) are written as a matrix ``(N, width)`` in the
dtype of hidden, of which both gradients are plain products (``P`` each; one is left out where its
operand is frozen).

Why panels: a program that kept its slopes in registers would need all ``D`` columns of a gradient
beside them (in float32 64 x 2304 of them are 590 KB, twice the registers of a multiprocessor), or
compute the slopes again for every block of columns (``1 + D / 256`` products), or add to
gradients in memory by atomics, in another order each time and with the weight's in float32
(``4 V D`` bytes). A panel costs ``2 N width`` bytes, written once and read twice, partly in L2.

Two-byte N=8192 D=2304 V=256000: ``P`` is 9.66 TFLOP, 13.8 ms at 700 TFLOP/s; four are 55 ms. A
panel has 1,792 classes. If L2 held nothing from one launch to the next, the slopes would move 75
MB, ``d_weight`` 75 MB and ``d_hidden`` 189 MB a panel, 49 GB in all: 10 ms at 4.8 TB/s, beside 41
ms of products. Memory is 1,217 MB of gradients, 29 MB for a panel and 75 MB to sum the gradient
of hidden in, 1,293 MB at most (the sum is there while it is rounded, the panel no more).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.cross_entropy import configs
from graphopt.kernels.cross_entropy.filtering import Filter, listed
from graphopt.kernels.cross_entropy.operands import Cotangents, Head, Summaries, counted
from graphopt.kernels.cross_entropy.panels import panel_width
from graphopt.kernels.cross_entropy.triton_kernels import added, assigned, slopes, sweep

_PROGRAMS = 1024
"""Of the forward sweep, about, where there is the work: 8 rounds of a Hopper GPU."""


class _Spans(NamedTuple):
    """What `sweep` gives for each span of classes, ``(spans, N)``."""

    maximum: Tensor
    total: Tensor
    own: Tensor
    summed: Tensor | None
    spread: Tensor | None
    best: Tensor | None


def forward(head: Head, sums: bool, entropy: bool, argmax: bool) -> Summaries:
    """All summaries of every row; those not asked for are empty."""
    rows, classes = head.hidden.shape[0], head.weight.shape[0]
    spans = min(-(-classes // 256), -(-_PROGRAMS // max(1, -(-rows // 128))))
    real = head.hidden.new_empty((5, spans, rows), dtype=torch.float32)
    parts = _Spans(
        maximum=real[0],
        total=real[1],
        own=real[2],
        summed=real[3] if sums else None,
        spread=real[4] if entropy else None,
        best=head.target.new_empty((spans, rows), dtype=torch.int32) if argmax else None,
    )
    if rows:
        with _on(head):
            _sweep(_packed(head), parts)
    return _merged(head, parts)


def _sweep(head: Head, parts: _Spans) -> None:
    spans, rows = parts.total.shape
    sweep[lambda c: (-(-rows // c["BLOCK_N"]), spans)](
        head.hidden,
        head.weight,
        head.bias,
        head.target,
        *parts,
        rows,
        *head.weight.shape,
        *head.hidden.stride(),
        *head.weight.stride(),
        head.softcap,
        spans,
        PRECISION=_precision(),
    )


def _merged(head: Head, parts: _Spans) -> Summaries:
    """Spans put together: sums are brought to the largest logit of all, see `sweep`."""
    top = parts.maximum.amax(0)
    scale = (parts.maximum - top).exp()
    total = (scale * parts.total).sum(0)
    own = parts.own.sum(0).where(counted(head), 0.0)
    logit_sum, entropy = top.new_empty(0), top.new_empty(0)
    argmax = head.target.new_empty(0, dtype=torch.int64)
    if parts.summed is not None:
        logit_sum = parts.summed.sum(0)
    if parts.spread is not None:
        spread = parts.spread + (parts.maximum - top) * parts.total
        entropy = total.log() - (scale * spread).sum(0) / total
    if parts.best is not None:
        argmax = parts.best.gather(0, parts.maximum.argmax(0, keepdim=True)).squeeze(0).long()
    lse = (top + total.log()).where(top < torch.inf, top)
    return Summaries(lse, own, logit_sum, entropy, argmax)


def backward(
    head: Head,
    lse: Tensor,
    entropy: Tensor,
    cotangents: Cotangents,
    wanted: Sequence[bool],
    threshold: float,
) -> list[Tensor]:
    """Gradients of hidden, weight and bias, those that are wanted."""
    with _on(head):
        given = _masked(head, cotangents)
        return _Panels(_packed(head), (lse, entropy), given, wanted, threshold).run()


def _masked(head: Head, given: Cotangents) -> Cotangents:
    """Cotangents as kernels read them; rows without a target have none for its logit."""
    own = given.target_logit
    given = given._replace(target_logit=own if own is None else own.where(counted(head), 0.0))
    return Cotangents(*(c if c is None else c.float().contiguous() for c in given))


class _Panels:
    """The loop over panels of classes, and the gradients that it fills."""

    def __init__(
        self,
        head: Head,
        saved: tuple[Tensor, Tensor],
        given: Cotangents,
        wanted: Sequence[bool],
        threshold: float,
    ) -> None:
        hidden, weight, bias = head.hidden, head.weight, head.bias
        self.head, self.saved, self.given = head, saved, given
        (rows, features), size = hidden.shape, hidden.element_size()
        self.width = panel_width(rows, features, weight.shape[0], size)
        self.filter = Filter(head, given, threshold, configs.tile(size)) if threshold > 0 else None
        self.d_hidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if wanted[0] else None
        room = weight.new_empty if rows else weight.new_zeros
        self.d_weight = room(weight.shape) if wanted[1] else None
        self.d_bias = torch.zeros_like(bias) if wanted[2] and bias is not None else None

    def run(self) -> list[Tensor]:
        rows, classes = self.head.hidden.shape[0], self.head.weight.shape[0]
        if rows:
            scratch = self.head.hidden.new_empty((rows, self.width))
            for first in range(0, classes, self.width):
                self._panel(scratch[:, : classes - first], first)
            del scratch
        if self.filter is not None:
            self.filter.report()
        if self.d_hidden is not None:
            self.d_hidden = self.d_hidden.to(self.head.hidden.dtype)
        return [g for g in (self.d_hidden, self.d_weight, self.d_bias) if g is not None]

    def _panel(self, panel: Tensor, first: int) -> None:
        head, classes = self.head, slice(first, first + panel.shape[1])
        order = None if self.filter is None else self.filter.order[classes]
        kept = self._slopes(panel, first)
        if self.d_weight is not None:
            into = self.d_weight[classes] if order is None else self.d_weight
            turned = None if kept is None else kept.mT
            _product(_Factors(panel.mT, head.hidden, None), into, order, turned, add=False)
        if self.d_hidden is not None:
            weight = head.weight[classes] if order is None else head.weight
            _product(_Factors(panel, weight, order), self.d_hidden, None, kept, add=True)
        if self.d_bias is not None:
            summed = panel.sum(0, dtype=torch.float32).to(self.d_bias.dtype)
            self.d_bias[classes if order is None else order] = summed

    def _slopes(self, panel: Tensor, first: int) -> Tensor | None:
        """Fills the panel; which of its tiles are kept, where they are filtered."""
        head, chosen, (rows, width) = self.head, self.filter, panel.shape
        kept = None if chosen is None else chosen.marks(rows, width)
        if chosen is not None and self.d_bias is not None:
            panel.zero_()  # its sum reads what is not stored
        slopes[lambda c: (-(-rows // c["BLOCK_N"]), -(-width // c["BLOCK_V"]))](
            head.hidden,
            head.weight,
            head.bias,
            head.target,
            None if chosen is None else chosen.order,
            *self.saved,
            *self.given,
            panel,
            None if chosen is None else chosen.bar,
            kept,
            rows,
            *head.weight.shape,
            first,
            width,
            *head.hidden.stride(),
            *head.weight.stride(),
            panel.stride(0),
            head.softcap,
            PRECISION=_precision(),
            TILE=0 if chosen is None else chosen.tile,
        )
        return kept


class _Factors(NamedTuple):
    """``a`` and ``b`` of a product; ``rows`` of ``b``, where not all in order."""

    a: Tensor
    b: Tensor
    rows: Tensor | None


def _product(
    factors: _Factors, out: Tensor, out_rows: Tensor | None, kept: Tensor | None, *, add: bool
) -> None:
    """``out[out_rows] = a b[rows]``, or added to it; ``kept`` marks tiles of ``a``."""
    a, b, rows = factors
    chosen, numbers = (None, None) if kept is None else listed(kept)
    height, columns = a.shape[0], b.shape[1]
    kernel = added if add else assigned
    kernel[lambda c: (-(-height // c["BLOCK_M"]), -(-columns // c["BLOCK_C"]))](
        a,
        b,
        rows,
        out,
        out_rows,
        chosen,
        numbers,
        *a.shape,
        columns,
        *a.stride(),
        *b.stride(),
        out.stride(0),
        0 if chosen is None else chosen.stride(0),
        ADD=add,
        PRECISION=_precision(),
        TILE=0 if kept is None else configs.tile(a.element_size()),
    )


def _packed(head: Head) -> Head:
    """Target and bias as kernels read them."""
    bias = head.bias
    return head._replace(
        target=head.target.contiguous(), bias=bias if bias is None else bias.contiguous()
    )


def _on(head: Head) -> AbstractContextManager[object]:
    """The device that kernels are launched on."""
    return torch.cuda.device_of(head.hidden) if head.hidden.is_cuda else nullcontext()


def _precision() -> str:
    """Of float32 products: full, unless torch is told otherwise."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
