"""Cases that run in a process of their own, where Triton interprets its kernels.

The interpreter is chosen when Triton is first imported, for the whole process: other tests that
use Triton would get it too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def run_interpreted(cases: Path, group: str) -> None:
    """Run the cases of a file whose names fit an expression of pytest's ``-k``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_"))}
    places = os.pathsep.join(filter(None, [str(HERE / "kernels"), kept.get("PYTHONPATH")]))
    added = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": places}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", str(cases), "-k", group, "-p", "no:cacheprovider"],
        env=kept | added,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-1000:]


@pytest.fixture(autouse=True)
def scalars_of_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.6 holds a scalar as an array of one number, which numpy 2.5 makes no index of."""
    import triton
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    if triton.__version__.startswith("3.6"):
        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
