"""``graphopt optimize MODEL.onnx`` from the command line: files, reports, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
from graphs import operators, save, weights
from test_optimize import gelu

from graphopt.cli import main


@pytest.fixture
def source(tmp_path):
    return save(gelu(), tmp_path / "m.onnx")


@pytest.mark.parametrize("keep", ["half", "garbage", "empty"])
def test_damaged_files_are_one_error(source, tmp_path, keep, capsys):
    data = source.read_bytes()
    damaged = {"half": data[: len(data) // 2], "garbage": b"\x08\x08" + bytes(50), "empty": b""}
    (tmp_path / "d.onnx").write_bytes(damaged[keep])
    status, _, err = call(capsys, "optimize", tmp_path / "d.onnx", "-o", tmp_path / "o.onnx")
    assert status == 1 and err.count("error:") == 1 and "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "d.onnx"}


def call(capsys, *arguments):
    status = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as leave:
        status = leave.code or 0
    out, err = capsys.readouterr()
    return status, out, err


def test_the_verb_writes_file_and_reports(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wanted = ["o.onnx", "r.html", "r.json", "r.yaml"]
    arguments = [part for name in wanted for part in ("-o", name)]
    status, out, _ = call(capsys, "optimize", "m.onnx", *arguments, "--no-measure", "--json")
    facts = json.loads(out)
    assert status == 0 and facts["written"] == wanted and facts["report"]["verified"]
    assert facts["bytes"][0] == source.stat().st_size
    assert all((tmp_path / name).is_file() for name in wanted)
    page = (tmp_path / "r.html").read_text()
    assert "BiasGelu" in page and "merge equal constants" in page
    status, _, _ = call(capsys, "verify", "m.onnx", "o.onnx")
    assert status == 0
    status, _, _ = call(
        capsys, "optimize", "m.onnx", "--recipe", "r.yaml", "-o", "p.onnx", "--no-measure"
    )
    assert status == 0 and operators("p.onnx") == operators("o.onnx")
    status, out, _ = call(
        capsys, "optimize", "m.onnx", "--no-measure", "--inputs", "x:float32[b=3,16]"
    )
    assert status == 0 and "wrote m.optimized.onnx" in out


REFUSED = [
    (["--train"], "--train means nothing"),
    (["--arch", "a:b"], "--arch means nothing"),
    (["--trust-pickle"], "--trust-pickle means nothing"),
    (["--dequantize"], "--dequantize means nothing"),
    (["--target", "inductor"], "--target inductor means nothing"),
    (["-o", "o.pt2"], "cannot write a file that ends in .pt2"),
    (["-o", "o.onnx", "-o", "p.onnx"], "one ONNX file"),
    (["-o", "m.onnx"], "would overwrite"),
    (["--pass", "FuseLossHead"], "not ONNX files"),
    (["--pass", "MergeInitializers:a=1"], "has no options"),
    (["--pass", "MergeWeights"], "unknown pass"),
    (["--recipe", "small"], "not available"),
    (["--inputs", "z:float32[2,16]"], "needs the input 'x'"),
    (["--inputs", "x:float32[2,16];z:float32[2]"], "has no input 'z'"),
    (["--inputs", "x:float64[2,16]"], "takes 'x' as float32"),
    (["--inputs", "x:float32[2,17]"], "takes 'x' as float32"),
    (["--calibration", "words.txt"], "a text says nothing"),
]


@pytest.mark.parametrize(
    ("options", "words"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_what_means_nothing_is_refused(options, words, source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("words")
    status, _, err = call(capsys, "optimize", "m.onnx", *options)
    assert status == 1 and words in err
    assert {p.name for p in tmp_path.iterdir()} == {"m.onnx", "words.txt"}


def test_calibration_inputs_are_compared_on(source, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("c.npz", x=weights(8, 16))
    call(capsys, "optimize", "m.onnx", "-o", "o.onnx", "-o", "a.json", "--no-measure")
    call(
        capsys,
        *("optimize", "m.onnx", "-o", "p.onnx", "-o", "b.json", "--no-measure"),
        *("--calibration", "c.npz", "--inputs", "x:float32[batch=4,16]"),
    )
    runs = [
        json.loads((tmp_path / n).read_text())["whole"][0]["runs"] for n in ("a.json", "b.json")
    ]
    assert runs[1] == runs[0] + 2


def test_passes_of_files_are_listed(capsys):
    status, out, _ = call(capsys, "passes")
    assert status == 0 and "MergeInitializers (on ONNX files): Constants of equal type" in out
    status, out, _ = call(capsys, "passes", "MergeInitializers", "--json")
    assert status == 0 and [row["on"] for row in json.loads(out)] == ["ONNX files"]
    status, out, _ = call(capsys, "passes", "FoldConstants")
    assert out.startswith("FoldConstants: ") and "(on ONNX files)" in out
