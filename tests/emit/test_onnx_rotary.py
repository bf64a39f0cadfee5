"""Rotary embeddings in ONNX files: one operator, on tables that all layers share."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.emit.onnx_rotary import ROTARY, with_rotary

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HEADS, WIDTH = 3, 8
AXES = ({2: "seq"},)


class Turned(nn.Module):
    """Two values turned by their positions, or by what is no rotary embedding."""

    def __init__(self, variant: str = "") -> None:
        super().__init__()
        self.variant = variant
        self.register_buffer("frequencies", 0.5 ** torch.arange(WIDTH // 2))

    def angles(self, x: Tensor) -> Tensor:
        angle = (torch.arange(x.shape[2])[:, None] + 3.0) * self.frequencies
        other = angle * 2 if self.variant == "other halves" else angle
        return torch.cat([angle, other], -1)[None]

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
        if self.variant == "swapped":
            first, second = second, first
        parts = [second, first] if self.variant == "not negated" else [-second, first]
        turned = torch.cat(parts, -1)
        if self.variant == "other value":
            turned = turned.sin()
        if self.variant == "commuted":
            return sin * turned + cos * x
        return x * cos - turned * sin if self.variant == "back" else x * cos + turned * sin

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angle = self.angles(x)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        if self.variant == "other angle":
            sin = (angle + 1).sin()[:, None]
        if self.variant == "a batch":
            cos = cos.expand(x.shape[0], 1, -1, -1) * 1.5
        return self.turn(x, cos, sin), self.turn(x.exp(), cos, sin)


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, HEADS, 5, WIDTH, dtype=dtype)


@pytest.mark.parametrize("variant", ["", "commuted"])
def test_one_operator(variant: str, tmp_path: Path) -> None:
    """On unseen lengths too, as the export compares them."""
    module = graphopt.compile(
        Turned(variant).eval(), example_inputs=(inputs(),), dynamic_shapes=AXES, measure=False
    )
    result = graphopt.export_onnx(module, tmp_path / "m.onnx", measure=False)
    nodes = list(onnx.load(result.path).graph.node)
    kinds = Counter(node.op_type for node in nodes)
    assert kinds["RotaryEmbedding"] == 2 == result.fusions["rotary_embedding"]
    assert not {"Neg", "Split"} & kinds.keys()
    tables = {tuple(node.input[2:]) for node in nodes if node.op_type == "RotaryEmbedding"}
    assert len(tables) == 1
    assert result.error < 2e-6


def test_the_standard_keeps_to_its_own(tmp_path: Path) -> None:
    module = graphopt.compile(Turned().eval(), example_inputs=(inputs(),), measure=False)
    result = graphopt.export_onnx(module, tmp_path / "m.onnx", fuse=False)
    kinds = Counter(node.op_type for node in onnx.load(result.path).graph.node)
    assert not kinds["RotaryEmbedding"] and kinds["Neg"] == 2


VARIANTS = [
    *("other halves", "swapped", "not negated", "other value", "back", "other angle", "a batch"),
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_no_rotary_embedding_stays(variant: str) -> None:
    program = canonical(Turned(variant), inputs())
    assert with_rotary(program) is program


def test_other_precisions_stay() -> None:
    program = canonical(Turned().double(), inputs(torch.float64))
    assert with_rotary(program) is program


def test_what_is_found_without_the_variant() -> None:
    twin = with_rotary(canonical(Turned(), inputs()))
    assert len(list(twin.graph.find_nodes(op="call_function", target=ROTARY))) == 2


def canonical(model: nn.Module, x: Tensor) -> Any:
    made = graphopt.compile(
        model.eval(), example_inputs=(x,), passes=["Canonicalize"], measure=False
    )
    return made.program


class InPart(Turned):
    """The rest of each head is not turned."""

    def forward(self, x: Tensor) -> Tensor:
        turned, _ = super().forward(x[..., :WIDTH])
        return torch.cat([turned, x[..., WIDTH:]], -1)


def test_heads_that_are_turned_in_part(tmp_path: Path) -> None:
    """ONNX Runtime does not load what onnxscript makes of them."""
    x = torch.cat([inputs(), inputs()[..., :4]], -1)
    module = graphopt.compile(
        InPart().eval(), example_inputs=(x,), dynamic_shapes=AXES, measure=False
    )
    result = graphopt.export_onnx(module, tmp_path / "m.onnx", measure=False)
    kinds = Counter(node.op_type for node in onnx.load(result.path).graph.node)
    assert kinds["RotaryEmbedding"] == 1
    assert result.error < 2e-6
