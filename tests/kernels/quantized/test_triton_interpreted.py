"""The Triton kernels of quantized products under Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
from interpreting import run_interpreted


@pytest.mark.parametrize("group", ["weight_only", "dynamic", "not weight_only and not dynamic"])
def test_under_the_interpreter(group: str) -> None:
    pytest.importorskip("triton")
    run_interpreted(Path(__file__).with_name("triton_cases.py"), group)
