"""Weights that an embedding and a head share are in the file, and in memory, once."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

import graphopt
from graphopt.emit import onnx_drafts
from graphopt.emit.onnx_tied import ONE_COPY, merge_equal
from graphopt.verify.timing import Pace

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")


class Tied(nn.Module):
    def __init__(self, classes: int = 300, width: int = 16, variant: str = ""):
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.head = nn.Linear(width, classes, bias=variant == "bias")
        self.variant = variant
        if variant == "equal":
            with torch.no_grad():
                self.head.weight.copy_(self.embedding.weight)
        elif variant != "apart":
            self.head.weight = self.embedding.weight

    def forward(self, ids):
        hidden = torch.tanh(self.embedding(ids))
        if self.variant == "vector":
            hidden = hidden[:, 0]
        return self.head(hidden)


def compiled(model, ids=None):
    ids = torch.randint(300, (2, 5)) if ids is None else ids
    axes = {"ids": {0: "batch", 1: "seq"}}
    return graphopt.compile(
        model.eval(), example_kwargs={"ids": ids}, dynamic_shapes=axes, measure=False
    )


def vocabularies(path, classes=300):
    graph = onnx.load(path).graph
    return [i.name for i in graph.initializer if classes in i.dims and len(i.dims) == 2]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("variant", ["", "bias", "vector", "equal"])
def test_the_weight_is_in_the_file_once(tmp_path, variant, fuse):
    module = compiled(Tied(variant=variant))
    result = graphopt.export_onnx(module, tmp_path / "t.onnx", measure=False, fuse=fuse)
    assert len(vocabularies(result.path)) == 1
    assert [note for note in result.notes if "session.disable_prepacking=1" in note]
    session = runtime.InferenceSession(str(result.path))
    ids = torch.randint(300, (3, 7))
    found = torch.from_numpy(session.run(None, {"ids": ids.numpy()})[0])
    torch.testing.assert_close(found, module(ids=ids))


@pytest.mark.parametrize("fuse", [True, False])
def test_a_large_weight_is_a_product_of_rows(tmp_path, fuse):
    """What the exporter does not fold: `Transpose`, which the fusions join with the product."""
    module = compiled(Tied(20_000, 64), torch.randint(300, (2, 5)))
    result = graphopt.export_onnx(module, tmp_path / "t.onnx", measure=False, fuse=fuse)
    kinds = [node.op_type for node in onnx.load(result.path).graph.node]
    assert "Gemm" in kinds and not {"MatMul", "FusedMatMul", "Transpose"} & {*kinds}
    assert len(vocabularies(result.path, 20_000)) == 1


def test_weights_of_their_own_stay_products(tmp_path):
    result = graphopt.export_onnx(compiled(Tied(variant="apart")), tmp_path / "t.onnx")
    assert len(vocabularies(result.path)) == 2 and not result.notes
    assert "Gemm" not in [node.op_type for node in onnx.load(result.path).graph.node]


@pytest.mark.parametrize(("new", "copies"), [(1.05, 1), (1.2, 2)])
def test_a_slower_form_is_not_written(monkeypatch, tmp_path, new, copies):
    monkeypatch.setattr(onnx_drafts, "interleaved", lambda *_args, **_kw: Pace(1.0, new))
    result = graphopt.export_onnx(compiled(Tied()), tmp_path / "t.onnx")
    assert len(vocabularies(result.path)) == copies
    (note,) = result.notes
    assert ("left in two copies" in note) == (copies == 2)


@pytest.mark.parametrize("variant", ["bias", "vector"])
def test_one_copy_reads_the_weight_as_no_constant(tmp_path, variant):
    module = compiled(Tied(variant=variant))
    result = graphopt.export_onnx(module, tmp_path / "t.onnx", one_copy=True)
    (note,) = result.notes
    assert "sessions hold one copy" in note and "x the speed of two copies here" in note
    graph = onnx.load(result.path).graph
    (gemm,) = (node for node in graph.node if node.op_type == "Gemm")
    assert gemm.input[1] not in {i.name for i in graph.initializer}
    ids = torch.randint(300, (3, 7))
    found = runtime.InferenceSession(str(result.path)).run(None, {"ids": ids.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), module(ids=ids))


def test_one_copy_of_nothing_says_so(tmp_path):
    module = compiled(Tied(variant="apart"))
    result = graphopt.export_onnx(module, tmp_path / "t.onnx", measure=False, one_copy=True)
    (note,) = result.notes
    assert note.startswith("one_copy: no weight")


def test_equal_is_what_has_the_same_bytes():
    import onnx_ir

    given = {
        "a": torch.ones(2, 2),
        "b": torch.ones(2, 2),
        "c": torch.ones(4),
        "d": torch.ones(2, 2).double(),
        "zero": torch.zeros(2, 2),
        "negative": -torch.zeros(2, 2),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "straight": torch.arange(6.0).reshape(2, 3).T.contiguous(),
    }
    values = [
        onnx_ir.Value(
            name=name,
            shape=(held := onnx_ir.tensor(tensor.numpy(), name=name)).shape,
            type=onnx_ir.TensorType(held.dtype),
            const_value=held,
        )
        for name, tensor in given.items()
    ]
    nodes = [onnx_ir.node("Identity", [value]) for value in values]
    graph = onnx_ir.Graph(
        [], [n.outputs[0] for n in nodes], nodes=nodes, initializers=values, opset_imports={"": 20}
    )
    assert merge_equal(onnx_ir.Model(graph, ir_version=10)) == 2
    assert [*graph.initializers] == ["a", "c", "d", "zero", "negative", "turned"]
    assert nodes[1].inputs[0] is values[0] and nodes[7].inputs[0] is values[6]


RESIDENT = """
import re, sys
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for entry in sys.argv[2:]:
    options.add_session_config_entry(*entry.split("="))
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"ids": numpy.arange(8)[None]})
print(re.search(r"^Rss:\\s+(\\d+)", open("/proc/self/smaps_rollup").read(), re.M)[1])
"""


def resident(path, *settings):
    """Bytes of a process that has run a file."""
    command = [sys.executable, "-c", RESIDENT, str(path), *settings]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout) * 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_holds_the_weight_once(tmp_path):
    small = graphopt.export_onnx(compiled(Tied()), tmp_path / "small.onnx", measure=False)
    module = compiled(Tied(65_536, 256))
    large = graphopt.export_onnx(module, tmp_path / "large.onnx", measure=False)
    bare, size = resident(small.path), large.bytes - small.bytes
    settings = [f"{name}={value}" for name, value in ONE_COPY.items()]
    assert resident(large.path, *settings) < bare + 1.15 * size
    assert resident(large.path) > bare + 1.6 * size
    path = tmp_path / "one.onnx"
    graphopt.export_onnx(module, path, measure=False, one_copy=True)
    assert resident(path) < bare + 1.15 * size
