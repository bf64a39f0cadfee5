"""The Triton kernels under Triton's interpreter, each group of cases in a process of its own.

The interpreter is chosen when Triton is first imported, for the whole process: other tests that
use Triton would get it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("interpreted_cases.py")
GROUPS = ["pairs", "not pairs"]


@pytest.mark.parametrize("group", GROUPS)
def test_under_the_interpreter(group: str) -> None:
    pytest.importorskip("triton")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", str(CASES), "-k", group, "-p", "no:cacheprovider"],
        env=kept | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]
