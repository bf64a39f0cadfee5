"""Half precision: what stays float32 and why, masks, types of inputs and outputs, refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from models.huggingface import ENTRIES
from torch import nn

import graphopt
from graphopt.cli import main
from graphopt.emit.onnx_half import Halver
from graphopt.errors import ExportError
from graphopt.passes import QuantizeMatmul

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
HALF = onnx.TensorProto.FLOAT16


class Net(nn.Module):
    """``scale`` makes squares that overflow in float16."""

    def __init__(self, scale: float = 1.0, width: int = 32):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, 4)
        self.scale = scale

    def forward(self, x):
        hidden = self.first(x) * self.scale
        size = hidden.square().mean(-1, keepdim=True).sqrt()
        return self.second(torch.tanh(hidden / (size + 1.0)))


def compiled(model, x=None, **options):
    x = torch.randn(2, 5, 32) if x is None else x
    axes = {"x": {0: "batch", 1: "seq"}}
    return graphopt.compile(
        model.eval(), example_kwargs={"x": x}, dynamic_shapes=axes, measure=False, **options
    )


def exported(module, path, dtype="float16", **options):
    result = graphopt.export_onnx(module, path, dtype=dtype, measure=False, **options)
    return result, onnx.load(path).graph


def kinds_of(graph, dtype=HALF):
    known = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.output)}
    return {node.op_type for node in graph.node if known.get(node.output[0]) == dtype}


def test_everything_is_half_where_nothing_needs_more(tmp_path):
    module = compiled(Net(width=32))
    result, graph = exported(module, tmp_path / "h.onnx")
    whole = graphopt.export_onnx(module, tmp_path / "w.onnx", measure=False)
    assert kinds_of(graph, onnx.TensorProto.FLOAT) == set()
    assert not [note for note in result.notes if "in float32:" in note]
    assert {i.data_type for i in graph.initializer if i.data_type != 7} == {HALF}
    weights = 2 * sum(p.numel() for p in Net().parameters())
    assert whole.bytes - result.bytes > 0.5 * weights
    x = torch.randn(3, 7, 32)
    session = runtime.InferenceSession(str(tmp_path / "h.onnx"))
    (found,) = session.run(None, {"x": x.half().numpy()})
    assert found.dtype == np.float16
    torch.testing.assert_close(torch.from_numpy(found).float(), module(x=x), rtol=2e-2, atol=2e-2)


def test_what_overflows_stays_float32_and_is_told(tmp_path):
    result, graph = exported(compiled(Net(1e3)), tmp_path / "h.onnx")
    wide = kinds_of(graph, onnx.TensorProto.FLOAT)
    assert {"Pow", "ReduceMean"} & wide and "MatMul" in kinds_of(graph)
    told = [note for note in result.notes if note.startswith("in float32:")]
    assert told and all("in half precision" in note and "without" in note for note in told)
    assert result.error < 1e-2


def test_rounding_is_measured_where_the_cpu_leaves_it_out(tmp_path):
    """ONNX Runtime adds two halves as float32: 60,000 twice, less 60,000, is not infinite."""
    import onnx_ir

    module = compiled(Net())
    graphopt.export_onnx(module, tmp_path / "w.onnx", measure=False)
    made = Halver(onnx_ir.load(tmp_path / "w.onnx"), onnx_ir.DataType.FLOAT16, keeps=False)
    for index, model in enumerate((made.explicit(), made.explicit({*made.nodes}))):
        onnx_ir.save(model, tmp_path / f"{index}.onnx")
    x = np.random.default_rng(0).standard_normal((2, 3, 32), dtype=np.float32)
    rounded, wide = (
        runtime.InferenceSession(str(tmp_path / f"{i}.onnx")).run(None, {"x": x})[0]
        for i in range(2)
    )
    exact = module(x=torch.from_numpy(x)).detach().numpy()
    assert 0 < np.square(wide - exact).mean() < np.square(rounded - exact).mean() < 1e-5
    assert np.array_equal(rounded, rounded.astype(np.float16).astype(np.float32))


class Masked(nn.Module):
    """Two masks of the least float32: their sum is finite in float16, and a row may be empty."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(32, 32)

    def forward(self, x):
        hidden = self.project(x)
        least = torch.finfo(torch.float32).min
        mask = torch.full((x.shape[1], x.shape[1]), least).triu(1)
        odd = torch.where(x[:, :, :1] > 1e4, least, 0.0).transpose(1, 2)
        scores = hidden @ hidden.transpose(1, 2) - 40
        return torch.softmax((scores + mask) + odd.clamp(min=least), -1) @ hidden


@pytest.mark.parametrize("dtype", ["float16", "mixed"])
def test_masks_stay_finite(tmp_path, dtype):
    result, graph = exported(compiled(Masked()), tmp_path / "h.onnx", dtype)
    held = [onnx.numpy_helper.to_array(i) for i in graph.initializer if i.data_type == HALF]
    single = [float(array.item()) for array in held if array.size == 1]
    assert min(n for n in single if np.isfinite(n)) == -65504 / 2
    assert result.error < 1e-2
    wanted = HALF if dtype == "float16" else onnx.TensorProto.FLOAT
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {wanted}


class Image(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm(8)

    def forward(self, x):
        large = nn.functional.interpolate(
            self.norm(self.conv(x)), scale_factor=2.0, mode="bilinear"
        )
        ramp = torch.arange(large.shape[-1], dtype=torch.float32)
        return (large * ramp).cumsum(-1), large.flatten(1).argmax(-1), large > 0.1


def test_resize_ranges_and_integers(tmp_path):
    module = graphopt.compile(
        Image().eval(), example_kwargs={"x": torch.randn(2, 3, 8, 8)}, measure=False
    )
    result, graph = exported(module, tmp_path / "h.onnx")
    assert "Resize" in {node.op_type for node in graph.node}
    assert [v.type.tensor_type.elem_type for v in graph.output] == [HALF, 7, 9]
    assert result.error < 1e-2


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(32, 32)

    def forward(self, x):
        hidden = self.first(x)
        return torch.cond(x.sum() > 0, lambda h: (h * 2).sin(), lambda h: h.cos() - 1, (hidden,))


def test_bodies_of_conditions_read_float32(tmp_path):
    try:
        module = compiled(Branch())
        graphopt.export_onnx(module, tmp_path / "w.onnx", measure=False)
    except graphopt.errors.GraphoptError as error:
        pytest.skip(f"no such file in float32 either: {error}")
    _, graph = exported(module, tmp_path / "h.onnx")
    assert "If" in {node.op_type for node in graph.node}


@pytest.mark.parametrize("name", ["bert", "llama"])
@pytest.mark.parametrize("fuse", [True, False])
def test_models_of_the_zoo(tmp_path, name, fuse):
    entry = ENTRIES[name]
    module = graphopt.compile(
        entry.build(),
        example_kwargs=entry.inputs(),
        dynamic_shapes=entry.dynamic_axes,
        measure=False,
    )
    result, graph = exported(module, tmp_path / "h.onnx", fuse=fuse)
    assert result.error < 1e-2
    assert {"MatMul", "Gemm", "Attention", "Softmax"} & kinds_of(graph)
    if not fuse:
        onnx.checker.check_model(str(tmp_path / "h.onnx"), full_check=True)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("fuse", [True, False])
def test_quantized_weights_with_half_activations(tmp_path, bits, fuse):
    passes = [QuantizeMatmul(bits=bits, activations=None, group_size=32)]
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    module = graphopt.compile(
        model.eval(), example_inputs=(torch.randn(4, 32),), passes=passes, measure=False
    )
    result, graph = exported(module, tmp_path / "h.onnx", fuse=fuse)
    assert result.error is not None
    assert graph.input[0].type.tensor_type.elem_type == HALF


def test_bfloat16_is_written_for_gpus_alone(tmp_path):
    module = compiled(Net(1e3))
    with pytest.raises(ExportError, match="cannot be compared here"):
        graphopt.export_onnx(module, tmp_path / "b.onnx", dtype="bfloat16")
    assert not list(tmp_path.iterdir())
    result, graph = exported(module, tmp_path / "b.onnx", "bfloat16", verify=False)
    assert "Pow" in kinds_of(graph, onnx.TensorProto.BFLOAT16)
    assert [n for n in result.notes if "not run" in n] and result.error is None


def test_refusals(tmp_path):
    module = compiled(Net())
    with pytest.raises(ExportError, match="no dtype 'int8'"):
        graphopt.export_onnx(module, tmp_path / "h.onnx", dtype="int8")
    double = compiled(Net().double(), torch.randn(2, 5, 32, dtype=torch.float64))
    with pytest.raises(ExportError, match="float64"):
        graphopt.export_onnx(double, tmp_path / "h.onnx", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_the_command_line_refuses_at_once(tmp_path, capsys):
    path = str(tmp_path / "model.pt2")
    (tmp_path / "model.pt2").touch()
    for arguments, word in (
        (["--format", "gptq", "--dtype", "float16"], "keeps the dtype"),
        (["--dtype", "bfloat16"], "--no-verify"),
        (["--dtype", "float16", "--train"], "training"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["export", path, *arguments])
        assert stopped.value.code
        assert word in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("dtype", [None, "mixed"])
def test_the_same_program_gives_the_same_bytes(tmp_path, dtype):
    module = compiled(Net(1e3))
    for name in ("a.onnx", "b.onnx"):
        graphopt.export_onnx(module, tmp_path / name, dtype=dtype, measure=False)
    data = (tmp_path / "a.onnx").read_bytes()
    assert data == (tmp_path / "b.onnx").read_bytes()
    assert str(tmp_path).encode() not in data and __file__.encode() not in data
    (held,) = (
        p.value for p in onnx.load(tmp_path / "a.onnx").metadata_props if p.key == "graphopt"
    )
    facts = json.loads(held)
    assert facts["dtype"] == (dtype or "as captured") and facts["versions"]["torch"]
    assert facts["recipe"] and all("bound" in c and c["inputs"] for c in facts["certificates"])
