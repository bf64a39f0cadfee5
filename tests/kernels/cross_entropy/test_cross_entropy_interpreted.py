"""The Triton kernels under Triton's interpreter."""

from __future__ import annotations

import pytest
from interpreting import run_interpreted


@pytest.mark.parametrize("group", ["pairs", "not pairs"])
def test_under_the_interpreter(group: str) -> None:
    pytest.importorskip("triton")
    run_interpreted("interpreted_cases.py", group)
