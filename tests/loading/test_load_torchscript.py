"""TorchScript files load; code in them that reaches outside of tensors is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphopt.errors import LoadError
from graphopt.loading import inspect_file, load_model


class Script(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Writing(torch.nn.Module):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.path, self.training = state
        torch.save(torch.ones(1), self.path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Recurrent(torch.nn.Module):
    """Its TorchScript calls operators of the namespace prim, and raises."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
        self.memory = torch.nn.LSTM(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.memory(x)[0] / x.shape[0]


@pytest.mark.parametrize("how", ["traced", "scripted"])
@pytest.mark.parametrize("kind", [Script, Recurrent])
def test_torchscript_loads(how: str, kind: type[torch.nn.Module], tmp_path: Path) -> None:
    model = kind().eval()
    x = torch.randn(2, 3)
    script = torch.jit.script(model) if how == "scripted" else torch.jit.trace(model, x)
    path = tmp_path / "m.pt"
    script.save(path)
    loaded = load_model(path)
    assert loaded.kind == "torchscript" and loaded.module is not None
    torch.testing.assert_close(loaded.module(x), model(x), rtol=0, atol=0)
    assert {t.name for t in inspect_file(path).tensors} >= {"layers.0.weight", "layers.0.bias"}


def test_torchscript_that_writes_files_on_load(tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "m.pt"
    torch.jit.script(Writing(str(marker))).save(path)
    assert not marker.exists()
    with pytest.raises(LoadError, match="the code calls save") as refusal:
        load_model(path)
    assert "--trust-pickle" in (refusal.value.fix or "")
    assert inspect_file(path).findings
    assert not marker.exists()
    load_model(path, trust_pickle=True)
    assert marker.exists(), "the attack was not real"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("torch.save(x, 'f')", "calls save"),
        ("torch . save (x, 'f')", "calls save"),
        ("torch.  # comment\\\nsave(x)", "calls save"),
        ("getattr(torch, 'save')(x)", "calls save"),
        ("getattr(torch, 'sa' 've')(x)", "calls save"),
        ("getattr(torch, '\\x73ave')(x)", "calls save"),
        ("torch.from_file('/etc/passwd')", "calls from_file"),
        ("ops.aten.from_file('/etc/passwd')", "calls from_file"),
        ("ops.c10d.send(x)", "reaches outside"),
        ("ops . c10d . send(x)", "reaches outside"),
        ("__torch__.torch.classes.mine.Thing()", "native object of torch.classes.mine"),
        ("'unterminated", "cannot be read"),
    ],
)
def test_torchscript_code_scan(code: str, reason: str) -> None:
    from graphopt.loading.torchscript import code_reasons

    source = f"def f(x):\n  return {code}\n"
    assert any(reason in found for found in code_reasons(source))


@pytest.mark.parametrize(
    "code",
    [
        'getattr(self, "0")',
        "torch.relu(x)",
        "ops.quantized.linear(x, self.w, 1., 0)",
        "torch.linear(x, x, None)",
        "__torch__.torch.classes.quantized.LinearPackedParamsBase",
        "self.saved + 1  # save",
    ],
)
def test_torchscript_code_that_only_computes(code: str) -> None:
    from graphopt.loading.torchscript import code_reasons

    assert not list(code_reasons(f"def f(self, x):\n  return {code}\n"))
