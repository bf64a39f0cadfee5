"""Every method in every format: a result that verifies, or a reason in words; never a crash."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from test_quantize_learned import batches, stack
from torch import Tensor

from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.passes import QuantizeMatmul
from graphopt.passes.canonicalize import Canonicalize
from graphopt.pipeline import Context, run_stages
from graphopt.program import Program
from graphopt.rewrite.driver import apply_rules

METHODS = (
    *("hqq", "gptq", "awq", "smoothquant", "rotate", "outliers", "lowrank", "propagate"),
    *("learned", "rtn+learned", "hqq+learned", "adaround", "flexround", "norms"),
    *("gptq+adaround", "hqq+flexround", "propagate+adaround", "awq+flexround+norms"),
    *("rotate+gptq+norms", "awq+gptq+outliers+lowrank+norms", "smoothquant+propagate+learned"),
)
INTEGERS = tuple(
    {"bits": bits, "group_size": group, "symmetric": symmetric}
    for bits, group, symmetric in product((8, 4, 3, 2), (None, 16), (True, False))
)
TABLES = tuple(
    {"bits": 4, "dtype": dtype, "group_size": group}
    for dtype, group in product(("nf4", "fp4"), (None, 16))
)
FORMATS = (*INTEGERS, *TABLES)
EACH = 7
"""One in so many is run each time: no divisor of the number of formats."""
FACTOR = 1.2
"""Times the error of rounding to nearest that a method may have on inputs like those it saw."""
REFUSED = {
    "optimises zero points": lambda method, options: "hqq" in method and options["symmetric"],
}
"""By what the words say, what may be refused at construction."""


@cache
def program() -> Program:
    made = capture(stack(), (batches(1)[0],))
    apply_rules(made, list(Canonicalize().rules()))
    return made


@cache
def data() -> list[list[Tensor]]:
    return [[x] for x in batches(4)]


def run(step: QuantizeMatmul) -> tuple[Program, Context]:
    context = Context(inputs=[data()[0]], measure=False, samples=data())
    return run_stages(program().copy(), step, context), context


def error(made: Program) -> float:
    """On inputs like those, which no method saw."""
    with torch.no_grad():
        pairs = [(made.run([x])[0], program().run([x])[0]) for x in batches(2, seed=9)]
    lost = sum(float((a - b).square().sum()) for a, b in pairs)
    return (lost / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def options(fields: dict[str, Any], method: str, *, steps: int = 15) -> dict[str, Any]:
    by_rows = fields.get("dtype", "int") == "int" and fields["group_size"] is None
    learns = any(n in method for n in ("learned", "round", "norms"))
    return {
        "symmetric": True,
        **fields,
        "method": method,
        "activations": "dynamic" if by_rows else None,
        "steps": steps if learns else None,
        "tolerance": 3.0,
    }


@cache
def of_rounding(fields: tuple[tuple[str, Any], ...]) -> float:
    return error(run(QuantizeMatmul(**options(dict(fields), "rtn")))[0])


def check(method: str, fields: dict[str, Any]) -> None:
    given = options(fields, method)
    try:
        step = QuantizeMatmul(**given)
    except ValueError as refusal:
        allowed = [words for words, why in REFUSED.items() if why(method, given)]
        assert any(words in str(refusal) for words in allowed), refusal
        return
    made, context = run(step)
    assert certify(program(), made, context, name="whole"), context.report.whole
    assert all(t.isfinite().all() for t in made.state.values() if t.is_floating_point())
    rows = [a.rule for a in context.report.applied]
    rows += [m.rule for m in context.report.missed if m.reason]
    assert rows.count("QuantizeLinear") == 6
    assert error(made) <= FACTOR * of_rounding(tuple(fields.items()))


def spelled(fields: dict[str, Any]) -> str:
    return "-".join(map(str, fields.values()))


CELLS = [
    pytest.param(method, fields, id=f"{method}-{spelled(fields)}")
    for method, fields in product(METHODS, FORMATS)
]


@pytest.mark.parametrize(("method", "fields"), CELLS[::EACH])
def test_a_method_in_a_format(method: str, fields: dict[str, Any]) -> None:
    check(method, fields)


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("method", "fields"), [cell for place, cell in enumerate(CELLS) if place % EACH]
)
def test_the_rest_of_them(method: str, fields: dict[str, Any]) -> None:
    check(method, fields)


def test_each_method_and_each_format_is_among_the_first() -> None:
    seen = [cell.values for cell in CELLS[::EACH]]
    assert {method for method, _ in seen} == {*METHODS}
    assert {spelled(fields) for _, fields in seen} == {*map(spelled, FORMATS)}
