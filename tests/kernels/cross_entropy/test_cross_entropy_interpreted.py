"""The Triton kernels under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreting import run_interpreted


@pytest.mark.parametrize("group", ["pairs", "not pairs"])
def test_under_the_interpreter(group: str) -> None:
    pytest.importorskip("triton")
    run_interpreted(Path(__file__).with_name("interpreted_cases.py"), group)
