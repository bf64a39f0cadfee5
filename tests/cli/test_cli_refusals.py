"""Calls that make no sense are refused before any work, and with ``--json`` as JSON."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import graphopt
from graphopt.cli import main


class Attention(nn.Module):
    """LayerNorm and one head of attention, written by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x):
        h = self.norm(x)
        return torch.softmax(self.q(h) @ self.k(h).transpose(-1, -2), -1) @ self.v(h)


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """``m.pt2``, its first axis dynamic, and a recipe, in the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    batch = torch.export.Dim("batch", min=2, max=100)
    example = (torch.randn(4, 6, 16),)
    shapes = {"x": {0: batch}}
    program = torch.export.export(Attention().eval(), example, dynamic_shapes=shapes)
    torch.export.save(program, "m.pt2")
    (tmp_path / "r.yaml").write_text("passes: [Canonicalize]\n")


def call(capsys, *arguments):
    """Exit status, standard output and standard error of one call."""
    status = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as leave:
        status = leave.code or 0
    return status, *capsys.readouterr()


ORT = ["optimize", "m.pt2", "--target", "onnxruntime"]
REFUSED = [
    (["optimize", "m.pt2", "-o", "m.pt2"], "overwrite a file that it is made from"),
    (["optimize", "m.pt2", "--recipe", "r.yaml", "-o", "./r.yaml"], "overwrite"),
    (["optimize", "m.pt2", "-o", "a.pt2", "-o", "./a.pt2"], "named twice"),
    (["optimize", "m.pt2", "--pass", "Canonicalize", "--recipe", "exact"], "leave one of them"),
    (["explain", "m.pt2", "--pass", "MergeProjections", "--recipe", "none"], "leave one of them"),
    (["explain", "m.pt2", "--pass", "Canonicalize:a=1,a=2"], "'a' is given twice"),
    (["explain", "m.pt2", "--recipe", "small"], "not available in this version"),
    (["export", "m.pt2", "--train"], "leave --train out"),
    (["optimize", "m.pt2", "--train", "-o", "a.onnx"], "leave --train out"),
    (["optimize", "m.pt2", "--train", "--target", "onnxruntime"], "leave --train out"),
    (["optimize", "m.pt2", "--provider", "cpu"], "leave providers out"),
    ([*ORT, "--provider", "cpux"], "did you mean 'cpu'"),
    ([*ORT, "--provider", "rknpuexecutionprovider"], "available here: "),
]


@pytest.mark.parametrize(("arguments", "hint"), REFUSED, ids=lambda v: str(v)[:50])
def test_refused_before_the_model_is_loaded(tmp_path, capsys, monkeypatch, arguments, hint):
    def fail(*_arguments, **_options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("graphopt.cli.subject.load_model", fail)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    status, _, err = call(capsys, *arguments)
    assert status == 1
    assert hint in err and "  try: " in err and "  at: " in err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "arguments", [["export", "m.pt2"], ["optimize", "m.pt2", "-o", "a.onnx"], ORT]
)
def test_a_missing_exporter_is_told_first(capsys, monkeypatch, arguments):
    monkeypatch.setattr("graphopt.emit.onnx_runtime.find_spec", lambda _name: None)
    monkeypatch.setattr("graphopt.cli.subject.load_model", None)
    status, _, err = call(capsys, *arguments)
    assert status == 1 and "pip install 'graphopt[onnx]'" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["optimize", "missing.pt2"],
        ["optimize", "m.pt2", "--target", "moon"],
        ["optimize", "m.pt2", "--nothing"],
        ["explode"],
        ["verify", "m.pt2", "missing.pt2"],
    ],
)
def test_errors_in_the_call_are_json_too(capsys, arguments):
    status, out, err = call(capsys, *arguments, "--json")
    assert status == 2 and err == ""
    error = json.loads(out)["error"]
    assert error["what"] and error["where"].startswith("graphopt") and "--help" in error["fix"]


def test_help_offers_only_presets_that_can_run(capsys):
    status, out, _ = call(capsys, "optimize", "--help")
    assert status == 0 and "Preset (none, exact, balanced)" in " ".join(out.split())


def test_a_pt2_holds_the_graph_before_inductor(capsys, monkeypatch):
    monkeypatch.setattr("graphopt.emit.inductor.to_inductor", lambda *_arguments: None)
    arguments = ("--target", "inductor", "--no-measure", "--pass", "Canonicalize")
    status, out, err = call(capsys, "optimize", "m.pt2", "-o", "z.pt2", *arguments)
    assert status == 0, err
    assert "z.pt2 holds the rewritten graph as it is before Inductor" in " ".join(out.split())


def test_onnxruntime_as_the_target(capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    arguments = ("--provider", "cpu", "--no-measure", "-o", "z.pt2", "-o", "z.json")
    status, out, err = call(capsys, *ORT, *arguments)
    assert status == 0, err
    said = " ".join(out.split())
    assert "ONNX Runtime: CPUExecutionProvider" in said and "1 region with" in said
    assert "z.pt2 holds the whole rewritten graph" in said
    found = json.loads((tmp_path / "z.json").read_text())["partition"]
    assert found["providers"] == ["CPUExecutionProvider"] and len(found["regions"]) == 1
    x = torch.randn(5, 6, 16)
    plain = graphopt.load("z.pt2")
    assert plain.report.partition is None
    fast = graphopt.load("z.pt2", target="onnxruntime", providers=["cpu"], measure=False)
    assert fast.report.partition.regions
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-6)


def test_an_export_that_was_not_compared_says_so(capsys):
    pytest.importorskip("onnxscript")
    arguments = ("--no-verify", "--no-measure", "--pass", "Canonicalize", "-o", "m.onnx")
    status, out, err = call(capsys, "export", "m.pt2", *arguments)
    assert status == 0, err
    assert "largest relative error in ONNX Runtime: not compared" in out
    status, out, _ = call(capsys, "export", "m.pt2", *arguments, "--json")
    assert status == 0 and json.loads(out)["error"] is None and "NaN" not in out


def test_the_api_refuses_another_ending_too(tmp_path):
    import graphopt

    fast = graphopt.compile(Attention().eval(), example_inputs=(torch.randn(2, 6, 16),), passes=[])
    with pytest.raises(graphopt.GraphoptError, match=r"ends in \.onnx"):
        graphopt.export_onnx(fast, tmp_path / "net.foo")
    assert not (tmp_path / "net.foo").exists()


@pytest.mark.parametrize("verb", [["export"], ["optimize", "-o", "a.onnx"]], ids=lambda v: v[0])
def test_a_program_that_trains_is_no_onnx_before_any_pass(verb, tmp_path, capsys):
    module = graphopt.compile(Attention().train(), example_inputs=(torch.randn(4, 6, 16),))
    graphopt.save(module, "trains.pt2")
    status, _, err = call(capsys, verb[0], "trains.pt2", *verb[1:])
    assert status == 1
    assert "was captured in training mode" in err
    assert "MergeProjections" not in err
    assert not list(tmp_path.glob("*.onnx"))
