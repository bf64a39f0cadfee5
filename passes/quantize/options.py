"""What options of `QuantizeMatmul` can be, and which go together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from graphopt.passes.quantize.budget import check_budget
from graphopt.passes.quantize.importance import checked as check_importance
from graphopt.passes.quantize.methods import learning_refusal, methods

if TYPE_CHECKING:
    from graphopt.passes.quantize import QuantizeMatmul

RANGES = ("mse", "minmax", "percentile")


def check_options(step: QuantizeMatmul) -> None:
    """Whether each option is one that there is, and goes with the others.

    Raises:
        ValueError: one does not; the message says what does.
    """
    check_budget(step)
    if step.importance is not None:
        check_importance(step.importance)
    for refusals in _REFUSALS:
        for refusal in refusals(step):
            raise ValueError(refusal)
    for one in step.each:
        one.formats.kinds  # noqa: B018 - whether fields of layers go together


def _of_weights(step: QuantizeMatmul) -> Iterator[str]:
    if step.tolerance is not None and not 0 < step.tolerance < math.inf:
        yield f"tolerance is a positive number, not {step.tolerance!r}"
    if not all(isinstance(pattern, str) for pattern in step.skip):
        yield f"skip is a sequence of patterns of names, not {step.skip!r:.80}"


def _of_activations(step: QuantizeMatmul) -> Iterator[str]:
    dtype = step.scheme.dtype
    if step.activations == "static" and dtype != "int":
        instead = "'dynamic'" if dtype == "fp8" else None
        yield (
            f"{dtype} weights have no static activations: give dtype='int', or "
            f"activations={instead}"
        )
    if step.activations and dtype not in ("int", "fp8"):
        yield (
            f"{dtype} weights have no quantized activations: give activations=None "
            "(null in a recipe), or dtype='int' or 'fp8'"
        )


def _of_methods(step: QuantizeMatmul) -> Iterator[str]:
    chosen = methods(step.method)
    if step.steps is not None and (step.steps < 1 or not chosen.by_blocks):
        yield (
            "steps are those of methods learned, adaround, flexround and norms, and there is at "
            "least one"
        )
    if (refusal := learning_refusal(chosen, step.scheme)) is not None:
        yield refusal
    if chosen.rounding == "hqq" and step.symmetric:
        yield "method hqq optimises zero points: give symmetric=False, dtype='int'"
    if step.importance is not None and not chosen.weighs:
        yield (
            "importance weighs rows for methods gptq, awq, outliers, lowrank and those that "
            "learn from blocks (learned, adaround, flexround, norms): "
            f"method={step.method!r} has none of them"
        )


def _of_what_stands_beside(step: QuantizeMatmul) -> Iterator[str]:
    kinds, share = methods(step.method).beside, step.outliers
    if "outliers" not in kinds and (share is not None or step.outlier_kind != "columns"):
        yield "outliers and outlier_kind are options of method='outliers'"
    if share is not None and (share < 0 or (share >= 1 and share != round(share))):
        yield f"outliers={share} is no share below 1, nor a count"
    if "lowrank" not in kinds and step.rank is not None:
        yield "rank is an option of method='lowrank'"
    if step.rank is not None and step.rank < 1:
        yield f"rank={step.rank} is not 1 or more"


def _of_ranges(step: QuantizeMatmul) -> Iterator[str]:
    """``layers`` may ask for static activations, and are checked by themselves."""
    if isinstance(step.ranges, str):
        if step.ranges not in RANGES:
            yield f"ranges={step.ranges!r} is not one of {', '.join(RANGES)}"
    elif not 50 <= step.ranges <= 100:
        yield f"ranges={step.ranges!r} is no percentile between 50 and 100"
    fields = (each for each in step.layers.values() if isinstance(each, Mapping))
    asked = step.activations == "static" or any(
        each.get("activations") == "static" for each in fields
    )
    if step.ranges != "mse" and not asked:
        yield "ranges are those of activations='static'"


_REFUSALS: tuple[Callable[[QuantizeMatmul], Iterator[str]], ...] = (
    _of_weights,
    _of_activations,
    _of_methods,
    _of_what_stands_beside,
    _of_ranges,
)
