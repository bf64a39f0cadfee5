from __future__ import annotations

from pathlib import Path

import pytest
import torch


class Tiny(torch.nn.Module):
    """A linear layer, a buffer, and the input's own size in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: torch.Tensor, *, scale: dict[str, torch.Tensor]) -> torch.Tensor:
        return (self.layer(x) + self.shift) * scale["by"] * x.shape[0]


@pytest.fixture(scope="session")
def program() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(
        Tiny().eval(),
        (torch.randn(3, 4),),
        {"scale": {"by": torch.ones(4)}},
        dynamic_shapes={"x": {0: batch}, "scale": {"by": None}},
    )


@pytest.fixture(scope="session")
def clean_pt2(
    program: torch.export.ExportedProgram, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("clean") / "tiny.pt2"
    torch.export.save(program, path, extra_files={"graphopt.json": '{"format": 1}'})
    return path


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What a payload would create."""
    return tmp_path / "it-ran"
