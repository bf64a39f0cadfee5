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
