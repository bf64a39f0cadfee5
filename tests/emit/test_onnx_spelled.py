"""Attention with grouped heads as ONNX files have it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.emit.onnx_spelled import spelled_for_runtime

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


class Projected(nn.Module):
    """Attention behind keys and values, as decoders have it."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (HEADS * WIDTH, GROUPS * WIDTH, GROUPS * WIDTH)
        self.inner = nn.ModuleList(nn.Linear(16, size) for size in sizes)

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        rows, count = x.shape[:2]
        parts = (layer(x).view(rows, count, -1, WIDTH).transpose(1, 2) for layer in self.inner)
        query, key, value = parts
        keys, values = (torch.cat((past, t), 2) for t in (key, value))
        return nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)


def test_a_program_from_a_file_is_exported_as_before_it_was_saved(tmp_path: Path) -> None:
    """Its sizes may be 1, and no operator asks whether they are."""
    torch.manual_seed(0)
    given = torch.randn(3, 5, 16), torch.randn(3, GROUPS, 4, WIDTH)
    axes = ({0: "rows", 1: "new"}, {0: "rows", 2: "past"})
    module = graphopt.compile(
        Projected().eval(), example_inputs=given, dynamic_shapes=axes, measure=False
    )
    graphopt.save(module, tmp_path / "m.pt2")
    again = graphopt.load(tmp_path / "m.pt2")
    first = graphopt.export_onnx(module, tmp_path / "first.onnx", measure=False)
    second = graphopt.export_onnx(again, tmp_path / "second.onnx", measure=False)
    kinds = [
        Counter(n.op_type for n in onnx.load(r.path).graph.node if n.op_type != "Constant")
        for r in (first, second)
    ]
    assert kinds[0] == kinds[1] and second.error < 2e-6
    alone = [t[:1, :1] if t.dim() == 3 else t[:1, :, :1] for t in given]
    torch.testing.assert_close(again(*alone), module(*alone))
