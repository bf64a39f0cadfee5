"""Captured programs as the nodes of a report."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.report import NodeView, Report
from graphopt.report.views import node_views


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.linear(self.norm(x)), dim=-1) * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x + torch.arange(4)


def by_name() -> dict[str, NodeView]:
    return {v.name: v for v in node_views(capture(Model().eval(), (torch.ones(2, 4),)))}


def test_placeholders_say_what_they_stand_for() -> None:
    views = by_name()
    weight = views["p_blocks_1_linear_weight"]
    assert (weight.op, weight.shape) == ("parameter", "f32[4, 4]")
    assert (weight.module, weight.target) == ("blocks.1.linear", "blocks.1.linear.weight")
    assert views["b_blocks_2_scale"].op == "buffer"
    assert (views["x"].op, views["x"].target) == ("input", None)


def test_nodes_carry_module_source_inputs_and_literals() -> None:
    views = by_name()
    softmax = views["softmax_1"]
    assert softmax.op == "aten.softmax.int"
    assert softmax.module == "blocks.1"
    assert softmax.literals == "dim=-1"
    assert softmax.inputs == ("linear_1",)
    line = Block.forward.__code__.co_firstlineno + 1
    assert softmax.source == f"{__file__}:{line}"
    assert views["linear_1"].inputs == (
        "layer_norm_1",
        "p_blocks_1_linear_weight",
        "p_blocks_1_linear_bias",
    )


def test_the_output_reads_what_is_returned() -> None:
    views = by_name()
    assert views["output"].op == "output"
    assert len(views["output"].inputs) == 1


def test_rewritten_nodes_name_their_rule() -> None:
    program = capture(Model().eval(), (torch.ones(2, 4),))
    node = next(n for n in program.graph.nodes if n.name == "softmax")
    node.meta["rewritten_by"] = ("FuseNorm", "FuseSoftmax")
    made = next(v for v in node_views(program) if v.name == "softmax")
    assert made.rewritten_by == ("FuseNorm", "FuseSoftmax")


def test_dynamo_paths_read_like_exported_ones() -> None:
    program = capture(Model().eval(), (torch.ones(2, 4),))
    node = next(n for n in program.graph.nodes if n.name == "softmax")
    for spelled, wanted in (
        ("L['self'].blocks.0", "blocks.0"),
        ("L['self']", ""),
        ("L['fn'].blocks[0].heads['key']", "blocks.0.heads.key"),
        ("_empty_nn_module_stack_from_metadata_hook", ""),
    ):
        node.meta["nn_module_stack"] = {"1": (spelled, Model)}
        made = next(v for v in node_views(program) if v.name == "softmax")
        assert made.module == wanted


def test_views_survive_json_and_make_a_page() -> None:
    views = list(by_name().values())
    report = Report("model", graph_before=views, graph_after=views)
    assert Report.from_json(report.to_json()).graph_before == views
    assert "blocks.0 … 2" in report.to_html().encode().decode("unicode_escape")
