"""Every verb on real files: what it prints, its exit status, and what it leaves behind."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.export import Dim

from graphopt.cli import main


class Net(nn.Module):
    """Convolution, BatchNorm and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def build():
    """Factory for --arch."""
    return Net()


SPEC = "x:float32[batch,3,8,8]"


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A state dict and the module that builds it, in the working folder."""
    monkeypatch.chdir(tmp_path)
    source = "from test_cli import build\n"
    (tmp_path / "arch_of_cli_test.py").write_text(source)
    monkeypatch.syspath_prepend(str(__import__("pathlib").Path(__file__).parent))
    torch.save(Net().eval().state_dict(), tmp_path / "net.pt")
    return ["net.pt", "--arch", "arch_of_cli_test:build", "--inputs", SPEC]


def run(capsys, *arguments):
    """Exit status, standard output and standard error of one call."""
    status = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as leave:
        status = leave.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def test_optimize_writes_module_onnx_report_and_recipe(weights, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    wanted = ["net.pt2", "net.onnx", "report.html", "report.json", "recipe.yaml"]
    outputs = [word for name in wanted for word in ("-o", name)]
    status, out, err = run(capsys, "optimize", *weights, *outputs, "--no-measure")
    assert status == 0, err
    assert "verified" in out and "FoldBatchNorm" in out
    assert all((tmp_path / name).stat().st_size for name in wanted)
    assert json.loads((tmp_path / "report.json").read_text())["verified"] is True

    status, out, _ = run(capsys, "verify", "net.pt2", "net.onnx")
    assert status == 0 and "agree" in out
    status, out, _ = run(capsys, "verify", "net.pt", "net.onnx", *weights[1:])
    assert status == 0 and "agree" in out
    status, out, _ = run(
        capsys, "optimize", "net.pt2", "-o", "again.pt2", "--recipe", "recipe.yaml"
    )
    assert status == 0 and (tmp_path / "again.pt2").exists()


def test_verify_says_which_output_differs(weights, tmp_path, capsys):
    torch.save(Net().eval().state_dict(), tmp_path / "other.pt")
    status, out, _ = run(capsys, "verify", "net.pt", "other.pt", *weights[1:])
    assert status == 1
    assert "output 0" in out and "DIFFERS" in out


def test_json_is_one_document(weights, capsys):
    status, out, _ = run(capsys, "optimize", *weights, "--json", "--no-measure")
    assert status == 0
    facts = json.loads(out)
    assert facts["report"]["verified"] is True
    assert facts["written"] == ["net.optimized.pt2"]


def test_explain_gives_reasons_and_writes_nothing(weights, tmp_path, capsys):
    before = sorted(p.name for p in tmp_path.iterdir())
    status, out, _ = run(capsys, "explain", *weights, "--no-measure", "--graph")
    assert status == 0
    assert "aten.conv2d" in out
    after = sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__")
    assert after == before


def test_explain_in_training_says_why_batch_norm_stays(weights, capsys):
    status, out, _ = run(capsys, "explain", *weights, "--train", "--no-measure", "--json")
    assert status == 0
    report = json.loads(out)
    assert report["verified"] is True
    assert not any(row["pass_name"] == "FoldBatchNorm" for row in report["applied"])
    (missed,) = [row for row in report["missed"] if row["pass_name"] == "FoldBatchNorm"]
    assert "statistics of each batch" in missed["reason"]
    assert missed["option"] == "model.eval()"


def test_export(weights, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    status, out, _ = run(capsys, "export", *weights, "-o", "net.onnx", "--no-measure")
    assert status == 0
    assert "inputs: x" in out
    assert (tmp_path / "net.onnx").exists()


def test_bench_measures_eager_compile_and_ablation(weights, capsys):
    status, out, _ = run(
        capsys, "bench", *weights, "--rounds", 3, "--no-inductor", "--json",
        "--pass", "FoldBatchNorm", "--no-measure",
    )  # fmt: skip
    assert status == 0
    names = [row["name"] for row in json.loads(out)["rows"]]
    assert names[0] == "eager"
    assert {"graphopt", "  without FoldBatchNorm"} <= set(names)


def test_inspect_passes_and_doctor(weights, capsys):
    status, out, _ = run(capsys, "inspect", "net.pt")
    assert status == 0 and "conv.weight" in out
    status, out, _ = run(capsys, "passes")
    assert status == 0 and "FoldBatchNorm" in out
    status, out, _ = run(capsys, "passes", "FoldBatchNorm", "--json")
    assert status == 0 and json.loads(out)[0]["rules"]
    status, out, _ = run(capsys, "doctor", "--json")
    assert status == 0, out
    found = json.loads(out)
    assert found["versions"]["torch"]
    if found["versions"]["onnxruntime"]:
        assert "CPUExecutionProvider" in found["providers"]
        assert "CPUExecutionProvider" in run(capsys, "doctor")[1]


BAD = [
    (["optimize", "missing.pt"], "missing.pt"),
    (["optimize", "net.pt"], "--arch"),
    (["optimize", "net.pt", "--arch", "arch_of_cli_test:build"], "--inputs"),
    (["optimize", "net.pt", "--arch", "arch_of_cli_test:nothing", "--inputs", SPEC], "nothing"),
    (["optimize", "net.pt", "--arch", "arch_of_cli_test:build", "--inputs", "x:f32[2]"], "dtype"),
    (["optimize", "net.pt", "--arch", "arch_of_cli_test:build", "--inputs", "x:float32[2]"], ""),
    (["optimize", "@", "-o", "net.bin"], ".pt2"),
    (["optimize", "@", "-o", "nowhere/net.pt2"], "nowhere"),
    (["optimize", "@", "--recipe", "exakt"], "exact"),
    (["optimize", "@", "--recipe", "small"], "ShareWeights"),
    (["optimize", "@", "--pass", "FoldBatchNrom"], "FoldBatchNorm"),
    (["optimize", "@", "--pass", "FoldBatchNorm:depth=3"], "depth"),
    (["export", "@", "-o", "net.pt2"], ".onnx"),
    (["export", "@", "--opset", "0"], "cannot write operator set 0"),
    (["export", "@", "--opset", "9"], "cannot write operator set 9"),
    (["export", "@", "--opset", "99"], "cannot write operator set 99"),
    (["optimize", "@", "--train", "-o", "t.pt2", "-o", "t.onnx", "-o", "t.json"], "training mode"),
    (["optimize", "@", "--pass", "Canonicalize:x=["], "cannot read the value"),
    (["passes", "Nothing"], "valid names"),
    (["explode"], "explode"),
]


@pytest.mark.parametrize(("arguments", "hint"), BAD, ids=lambda v: str(v)[:40])
def test_bad_input_is_one_clear_error(weights, tmp_path, capsys, arguments, hint):
    filled = [w for a in arguments for w in (weights if a == "@" else [a])]
    before = sorted(p.name for p in tmp_path.rglob("*") if "__pycache__" not in str(p))
    status, out, err = run(capsys, *filled)
    assert status != 0
    assert hint in err
    assert "Traceback" not in err + out
    after = sorted(p.name for p in tmp_path.rglob("*") if "__pycache__" not in str(p))
    assert after == before


def test_a_failed_output_leaves_the_others_as_they_were(weights, tmp_path, capsys):
    (tmp_path / "t.pt2").write_text("from before")
    status, _, err = run(capsys, "optimize", *weights, "--train", "-o", "t.pt2", "-o", "t.onnx")
    assert status == 1 and "training mode" in err
    assert (tmp_path / "t.pt2").read_text() == "from before"
    assert not (tmp_path / "t.onnx").exists()


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """A ``.pt2`` whose first axis is dynamic."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    example = {"x": torch.randn(3, 3, 8, 8)}
    model = torch.export.export(Net().eval(), (), example, dynamic_shapes={"x": {0: Dim("batch")}})
    torch.export.save(model, "net.pt2")
    return "net.pt2"


def hashes(path):
    """Of the inputs that the whole program was verified on."""
    return [row["inputs_hash"] for row in json.loads(path.read_text())["whole"]]


def test_inputs_replace_those_of_a_pt2(exported, tmp_path, capsys):
    values = torch.full((5, 3, 8, 8), 0.25)
    torch.save({"x": values}, "five.pt")
    for name, inputs in (("own", []), ("given", ["--inputs", "five.pt"])):
        arguments = ("-o", f"{name}.json", "-o", f"{name}.pt2", "--no-measure")
        status, _, err = run(capsys, "optimize", exported, *inputs, *arguments)
        assert status == 0, err
    from graphopt.verify.whole import hash_inputs

    assert hash_inputs([values]) in hashes(tmp_path / "given.json")
    assert hash_inputs([values]) not in hashes(tmp_path / "own.json")
    status, _, err = run(capsys, "explain", exported, "--inputs", "x:float32[n=4,3,8,8]")
    assert status == 0, err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--inputs", "x:float32[2,3,8,9]"], "axis 3 must be 8"),
        (["--inputs", "x:float64[2,3,8,8]"], "float64"),
        (["--inputs", "y:float32[2,3,8,8]"], "y"),
        (["--inputs", "x:float32[n,3,width=8,8]"], "cannot become 'width'"),
        (["--inputs", ""], "no input is named"),
        (["--train"], "stays in the eval mode"),
    ],
)
def test_what_does_not_fit_a_pt2_is_refused(exported, tmp_path, capsys, arguments, hint):
    status, _, err = run(capsys, "optimize", exported, *arguments)
    assert status == 1
    assert hint in err and f"at: {arguments[0]}" in err
    assert [p.name for p in tmp_path.iterdir()] == [exported]


def test_errors_can_be_json(weights, capsys):
    status, out, _ = run(capsys, "optimize", "net.pt", "--json")
    assert status == 1
    assert "weights" in json.loads(out)["error"]["what"]
