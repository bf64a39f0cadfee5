"""``graphopt inspect`` on damaged files: what is wrong, what to do, and the exit status."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graphopt.cli import main


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """Whole files, and each cut short."""
    monkeypatch.chdir(tmp_path)
    model = nn.Linear(8, 8).eval()
    torch.export.save(torch.export.export(model, (torch.ones(2, 8),)), "whole.pt2")
    torch.save(model.state_dict(), "whole.pt")
    save_file(model.state_dict(), "whole.safetensors")
    for ending in ("pt2", "pt", "safetensors"):
        data = (tmp_path / f"whole.{ending}").read_bytes()
        (tmp_path / f"cut.{ending}").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.onnx").write_text("hello there\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")


def inspect(capsys, *arguments):
    """Exit status, standard output and standard error of ``graphopt inspect``."""
    status = 0
    try:
        main(["inspect", *arguments])
    except SystemExit as leave:
        status = leave.code or 0
    return status, *capsys.readouterr()


@pytest.mark.parametrize("name", ["whole.pt2", "whole.pt", "whole.safetensors"])
def test_whole_files_are_described(capsys, name):
    status, out, err = inspect(capsys, name)
    assert status == 0 and "weight" in out and err == ""


@pytest.mark.parametrize("name", ["cut.pt2", "cut.pt", "cut.safetensors", "text.onnx", "folder"])
def test_damage_is_an_error_with_advice(capsys, name):
    if name.endswith("onnx"):
        pytest.importorskip("onnx")
    status, _, err = inspect(capsys, name)
    assert status == 1
    assert err.startswith("error: ") and f"at: {name}" in err and "  try: " in err
    status, out, err = inspect(capsys, name, "--json")
    assert status == 1 and err == ""
    found = json.loads(out)
    assert found.get("findings") or found["error"]["fix"]
