"""What the report shows of a file: lines and modules that its exporter wrote, unique names."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from graphs import model, node, save, value
from torch import nn

import graphopt
from graphopt.onnx_files.document import document_of
from graphopt.onnx_files.origins import module_of
from graphopt.onnx_files.views import node_views
from graphopt.report import Report, json_schema

sys.path.append(str(Path(__file__).resolve().parents[1] / "report"))
from schema_check import problems


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))  # the line that the report names


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Layer(), Layer())

    def forward(self, x):
        return self.layers(x)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("views") / "net.onnx"
    torch.manual_seed(0)
    torch.onnx.export(
        Net().eval(),
        (torch.randn(2, 4, 16),),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    return path


def test_rewrites_name_the_line_of_the_user(source, tmp_path):
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", measure=False)
    text = Path(__file__).read_text().splitlines()
    line = next(i for i, row in enumerate(text, 1) if "the line that the report names" in row)
    fused = [a for a in found.report.applied if a.rule == "fuse BiasGelu"]
    assert len(fused) == 2 and {a.source for a in fused} == {f"{Path(__file__)}:{line}"}
    views = [v for v in found.report.graph_before if v.op.endswith("Gelu")]
    assert [v.module for v in views] == ["layers.0", "layers.1"]
    assert {v.source for v in views} == {fused[0].source}


def test_the_report_is_that_of_the_schema_and_reads_back(source, tmp_path):
    found = graphopt.optimize_onnx(source, tmp_path / "o.onnx", passes="balanced", measure=False)
    data = found.report.to_dict()
    assert not problems(data, json_schema(), json_schema())
    assert Report.from_dict(data).to_dict() == data
    assert "layers.0" in found.report.to_html()


def test_names_are_unique_whatever_the_file_calls_its_values():
    nodes = [
        node("Neg", ["output"], ["a"], name="output"),
        node("Neg", ["a"], ["b"], name="same"),
        node("Neg", ["b"], ["y"], name="same"),
    ]
    made = model(nodes, [value("output", [2])], [value("y", [2])])
    views = node_views(document_of(made, Path("m.onnx")).model)
    names = [view.name for view in views]
    assert names == ["output", "output.2", "same", "same.2", "output.3"]
    assert views[-1].inputs == ("same.2",) and views[2].inputs == ("output.2",)


@pytest.mark.parametrize("text", ["[", "1", "['a']", "[1, 2]", "__import__('os')", "[" * 5000])
def test_scopes_of_a_file_are_not_trusted(text, tmp_path):
    made = model([node("Neg", ["x"], ["y"], name="/a/b/Neg")], [value("x", [2])], [value("y", [2])])
    made.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    first = document_of(made, save(made, tmp_path / "m.onnx")).model.graph.node(0)
    assert module_of(first) == "a.b"
