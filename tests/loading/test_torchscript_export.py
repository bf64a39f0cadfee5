"""TorchScript becomes an exported program that computes the same, or an explained refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graphopt.errors import LoadError
from graphopt.loading.torchscript_export import export_torchscript


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())
        self.norm = torch.nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return self.norm(self.layers(x)) * scale


def scripted() -> torch.jit.ScriptModule:
    return torch.jit.script(Net().eval())


def test_same_results_also_at_another_size() -> None:
    module = scripted()
    exported = export_torchscript(module, {"x": torch.randn(2, 3)}, "m.pt")
    x = torch.randn(5, 3)
    torch.testing.assert_close(exported.module()(x, 2.0), module(x))
    assert set(exported.state_dict) == set(module.state_dict())


def test_traced_module() -> None:
    x = torch.randn(2, 3)
    module = torch.jit.trace(Net().eval(), x)
    exported = export_torchscript(module, {"x": x}, "m.pt")
    torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.parametrize("names", [["scale"], ["y"], ["x", "y"], ["x", "self"], []])
def test_inputs_that_do_not_fit(names: list[str]) -> None:
    kwargs = {name: torch.ones(2, 3) for name in names}
    with pytest.raises(LoadError, match=r"do not fit forward\(x, scale\)"):
        export_torchscript(scripted(), kwargs, "m.pt")


def test_operator_without_conversion() -> None:
    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = torch.nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attend(x, x, x, need_weights=False)[0]

    module = torch.jit.script(Attention().eval())
    with pytest.raises(LoadError, match=r"could not be converted: .*prim::If") as refusal:
        export_torchscript(module, {"x": torch.randn(1, 3, 4)}, "m.pt")
    assert refusal.value.where == "m.pt" and "nn.Module" in (refusal.value.fix or "")


def test_other_results_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._export.converter import TS2EPConverter

    wrong = torch.export.export(Net().eval(), (torch.randn(2, 3), 2.0))
    monkeypatch.setattr(TS2EPConverter, "convert", lambda self: wrong)
    with pytest.raises(LoadError, match="computes something else"):
        export_torchscript(scripted(), {"x": torch.randn(2, 3)}, "m.pt")


def test_command_line_takes_torchscript(tmp_path: Path) -> None:
    from graphopt.cli.subject import load_subject

    path = tmp_path / "m.pt"
    scripted().save(path)
    subject = load_subject(str(path), "x:float32[batch=2,3]", None, False)
    program, _ = subject.capture()
    assert program.name == "m" and "linear" in str(program)
