"""Attention with grouped heads as ONNX files have it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.emit import onnx_drafts
from graphopt.emit.onnx_spelled import spelled_attention, spelled_for_runtime
from graphopt.verify.timing import Pace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

HEADS, GROUPS, WIDTH = 6, 2, 8
AXES = ({2: "new"}, {2: "all"}, {2: "new", 3: "all"})


class Grouped(nn.Module):
    """Two attentions, one behind the other, under one mask."""

    def forward(self, query: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        for _ in range(2):
            query = nn.functional.scaled_dot_product_attention(
                query, keys, keys.sin(), mask, enable_gqa=True
            )
        return query


def inputs(new: int, every: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.ones(3, 1, new, every, dtype=torch.bool).triu(every - new + 1)
    numbers = torch.randn(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
    mask = ~hidden if dtype == torch.bool else numbers
    return torch.randn(3, HEADS, new, WIDTH), torch.randn(3, GROUPS, every, WIDTH), mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_grouped_heads_read_keys_where_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing is repeated; numbers for what a mask hides are made once for all."""
    given = inputs(4, 9, dtype)
    module = graphopt.compile(
        Grouped().eval(), example_inputs=given, dynamic_shapes=AXES, measure=False
    )
    result = graphopt.export_onnx(module, tmp_path / "m.onnx", measure=False)
    kinds = Counter(node.op_type for node in onnx.load(result.path).graph.node)
    assert not {"Expand", "Tile", "Attention", "MultiHeadAttention"} & kinds.keys()
    assert kinds["Softmax"] == 2 and kinds["Where"] == (dtype == torch.bool)
    assert result.error < 2e-6


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_what_is_hidden_counts_for_nothing(dtype: torch.dtype) -> None:
    query, keys, mask = inputs(4, 9, dtype)
    keys[:, :, -1] = 1e4  # seen by the last row alone
    program = capture(Grouped().eval(), (query, keys, mask))
    spelled = spelled_for_runtime(program)
    assert spelled is not program
    given = [query, keys, mask]
    torch.testing.assert_close(spelled.run(given)[0], program.run(given)[0], rtol=1e-5, atol=1e-5)


class Masked(nn.Module):
    """Attention with a mask over every head, from projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask)
        return out.transpose(1, 2).flatten(2)


def masked(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shown = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    shown[1, ..., 3:] = False
    mask = shown if dtype == torch.bool else torch.zeros(2, 1, 1, 5).masked_fill(~shown, -1e9)
    return torch.randn(2, 5, 8), mask


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_spelled_attention_gives_the_same(dtype: torch.dtype) -> None:
    given = masked(dtype)
    program = capture(Masked().eval(), given)
    spelled = spelled_attention(program)
    assert spelled is not None
    torch.testing.assert_close(spelled.run(given)[0], program.run(given)[0])


class Other(nn.Module):
    def __init__(self, variant: str) -> None:
        super().__init__()
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        attend = nn.functional.scaled_dot_product_attention
        if self.variant == "causal":
            return attend(x, x, x, is_causal=True)
        if self.variant == "three axes":
            return attend(x[0], x[0], x[0])
        keys = x[:, :1] if self.variant == "grouped" else x
        return attend(x, keys, keys, enable_gqa=self.variant == "grouped")


@pytest.mark.parametrize(
    ("variant", "fits"),
    [("", True), ("causal", False), ("three axes", False), ("grouped", False)],
)
def test_other_attention_is_left(variant: str, fits: bool) -> None:
    program = capture(Other(variant).eval(), (torch.randn(2, 2, 5, 4),))
    assert (spelled_attention(program) is not None) == fits


def test_the_faster_attention_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = masked(torch.bool)
    axes = ({0: "batch", 1: "seq"}, {0: "batch", 3: "seq"})
    module = graphopt.compile(
        Masked().eval(), example_inputs=given, dynamic_shapes=axes, measure=False
    )
    monkeypatch.setattr(onnx_drafts, "interleaved", lambda *_args, **_kw: Pace(1.0, 0.5))
    result = graphopt.export_onnx(module, tmp_path / "m.onnx")
    graph = onnx.load(result.path)
    kinds = Counter(node.op_type for node in graph.graph.node)
    assert kinds["Softmax"] == 1
    assert not {"Attention", "MultiHeadAttention", "Split"} & kinds.keys()
    assert not any("hidden" in entry.domain for entry in graph.opset_import)
    assert any("attention as products and a softmax: 2.00x" in note for note in result.notes)
