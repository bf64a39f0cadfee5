"""Test-wide setup: makes the model zoo importable as ``models`` and seeds every test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more threads than that only wait for each other.
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        default=os.environ.get("GRAPHOPT_DATA"),
        help="folder with weights/, images/ and text/ (default: the variable GRAPHOPT_DATA)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave sweeps out unless ``-m`` names them; skip GPU tests where there is no GPU."""
    asked = "sweep" in (config.option.markexpr or "")
    swept = [item for item in items if item.get_closest_marker("sweep") and not asked]
    if swept:
        config.hook.pytest_deselected(items=swept)
        items[:] = [item for item in items if item not in swept]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random state and leaves gradient mode as it was."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(True):
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """What Dynamo compiled before and will compile after is unknown to the test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def data_dir(request: pytest.FixtureRequest) -> Path:
    """The folder with real weights and images; tests that need it skip where there is none."""
    folder = request.config.getoption("--data")
    if folder is None:
        pytest.skip("needs real data: pass --data DIR or set GRAPHOPT_DATA")
    if not Path(folder).is_dir():
        pytest.fail(f"--data {folder}: no such folder")
    return Path(folder)
