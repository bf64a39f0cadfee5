"""What ranges and conditions on sizes imply."""

from __future__ import annotations

import pytest
import sympy
from torch.utils._sympy.functions import Mod
from torch.utils._sympy.value_ranges import ValueRanges

from graphopt.conditions import implied

S, T = sympy.symbols("s0 s1", integer=True, positive=True)
RANGES = {S: ValueRanges(3, 10), T: ValueRanges(1, 4)}


@pytest.mark.parametrize(
    ("demand", "conditions", "holds"),
    [
        (S >= 3, [], True),
        (S > 3, [], False),
        (S > 3, ["s0 != 3"], True),
        (S > 3, ["s0 != 4"], False),
        (S > 4, ["2*s0 != 6", "s0 != 4"], True),
        (S <= 10, [], True),
        (S > T, [], False),
        (S + 2 > T, [], True),
        (S > 3, ["s0 != s1"], False),
        (sympy.Ne(T * (S - 2), T), [], False),
        (sympy.Ne(T * (S - 2), T), ["s0 - 2 != 1"], True),
        (sympy.Ne((T - 1) * (S - 2), T - 1), ["s0 - 2 != 1"], False),
        (sympy.Ne(Mod(T, T * (S - 2)), 0), [], False),
        (sympy.Ne(Mod(T, T * (S - 2)), 0), ["s0 != 3"], True),
        (sympy.Eq(Mod(2 * T, T * (S - 2)), 0), ["s0 != 3"], False),
        (sympy.Symbol("u0", integer=True) > 0, [], False),
    ],
)
def test_implied(demand: sympy.Basic, conditions: list[str], holds: bool) -> None:
    assert implied(demand, RANGES, conditions) is holds
