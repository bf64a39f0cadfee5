"""``graphopt::cross_entropy_rows`` for torch: schemas, what runs, fake values.

Two operators: the one that users and passes call, and the one that its autograd calls, which
gives a gradient for each of hidden, weight and bias that is ``wanted``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.kernels.cross_entropy import reference
from graphopt.kernels.cross_entropy.operands import (
    Cotangents,
    Head,
    Summaries,
    check,
    check_targets,
    wide,
)
from graphopt.kernels.filtering import report

library = torch.library.Library("graphopt", "FRAGMENT")
for _schema in (
    "cross_entropy_rows(Tensor hidden, Tensor weight, Tensor target, Tensor? bias=None, "
    "float? softcap=None, int ignore_index=-100, bool sums=False, bool entropy=False, "
    "bool argmax=False, float filter_threshold=0.0) -> "
    "(Tensor lse, Tensor target_logit, Tensor logit_sum, Tensor entropies, Tensor argmaxes)",
    "cross_entropy_rows_backward(Tensor hidden, Tensor weight, Tensor target, Tensor? bias, "
    "float? softcap, int ignore_index, Tensor lse, Tensor entropies, Tensor? d_lse, "
    "Tensor? d_target_logit, Tensor? d_logit_sum, Tensor? d_entropy, bool[] wanted, "
    "float filter_threshold=0.0) -> Tensor[]",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

cross_entropy_rows = torch.ops.graphopt.cross_entropy_rows.default


def by_triton(tensor: Tensor) -> bool:
    """On a GPU; and anywhere if Triton interprets its kernels, as tests have it."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return tensor.dtype != torch.float64 and (tensor.is_cuda or interpreted)


def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    sums: bool = False,
    entropy: bool = False,
    argmax: bool = False,
    filter_threshold: float = 0.0,  # noqa: ARG001 - of the backward pass
) -> Summaries:
    head = Head(hidden, weight, target, bias, softcap, ignore_index)
    check(head)
    check_targets(head)
    if not by_triton(hidden):
        return reference.forward(head, sums, entropy, argmax)
    from graphopt.kernels.cross_entropy import launch

    return launch.forward(head, sums, entropy, argmax)


def _backward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    lse: Tensor,
    entropies: Tensor,
    d_lse: Tensor | None,
    d_target_logit: Tensor | None,
    d_logit_sum: Tensor | None,
    d_entropy: Tensor | None,
    wanted: Sequence[bool],
    filter_threshold: float = 0.0,
) -> list[Tensor]:
    head = Head(hidden, weight, target, bias, softcap, ignore_index)
    check(head)
    cotangents = Cotangents(d_lse, d_target_logit, d_logit_sum, d_entropy)
    if not by_triton(hidden):
        if filter_threshold > 0:  # the definition leaves nothing out
            report(lse.new_ones(()))
        return reference.backward(head, lse, entropies, cotangents, wanted)
    from graphopt.kernels.cross_entropy import launch

    return launch.backward(head, lse, entropies, cotangents, wanted, filter_threshold)


def _fake_forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    sums: bool = False,
    entropy: bool = False,
    argmax: bool = False,
    filter_threshold: float = 0.0,  # noqa: ARG001
) -> Summaries:
    check(Head(hidden, weight, target, bias, softcap, ignore_index))
    rows, kind = hidden.shape[0], wide(hidden.dtype)
    return Summaries(
        lse=hidden.new_empty(rows, dtype=kind),
        target_logit=hidden.new_empty(rows, dtype=kind),
        logit_sum=hidden.new_empty(rows if sums else 0, dtype=kind),
        entropy=hidden.new_empty(rows if entropy else 0, dtype=kind),
        argmax=hidden.new_empty(rows if argmax else 0, dtype=torch.int64),
    )


def _fake_backward(
    hidden: Tensor,
    weight: Tensor,
    _: Tensor,
    bias: Tensor | None,
    *settings: Any,
) -> list[Tensor]:
    wanted = settings[8]
    pairs = zip((hidden, weight, bias), wanted, strict=True)
    return [t.new_empty(t.shape) for t, asked in pairs if asked and t is not None]


for _name, _real, _meta in (
    ("cross_entropy_rows", _forward, _fake_forward),
    ("cross_entropy_rows_backward", _backward, _fake_backward),
):
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _real, _key)
    torch.library.register_fake(f"graphopt::{_name}", _meta, lib=library)
