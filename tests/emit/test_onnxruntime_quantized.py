"""Quantized products in regions: in ONNX Runtime's own operators, held to what torch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.emit.ort.call import OrtRegion
from graphopt.passes import QuantizeMatmul

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(nn.functional.gelu(self.enter(x)))


def _compiled(step: QuantizeMatmul, **options: Any) -> tuple[nn.Module, Any]:
    model, x = Net().eval(), torch.randn(4, 16, 64)
    options = {"measure": False, "strict": True, "target": "onnxruntime", **options}
    dynamic = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)
    return model, graphopt.compile(
        model, example_inputs=(x,), dynamic_shapes=dynamic, passes=[step], **options
    )


@pytest.mark.parametrize(
    ("step", "operator"),
    [
        (QuantizeMatmul(bits=4, activations=None, group_size=32, head=True), "MatMulNBits"),
        (QuantizeMatmul(bits=8, head=True), None),
        (QuantizeMatmul(bits=4, dtype="nf4", activations=None, group_size=32, head=True), None),
    ],
)
def test_quantized_products_run_in_onnxruntime(step: QuantizeMatmul, operator: str | None) -> None:
    model, fast = _compiled(step)
    _, plain = _compiled(step, target="torch")
    (region,) = [m for m in fast.modules() if isinstance(m, OrtRegion)]
    (row,) = fast.report.partition.regions
    assert row.operators["graphopt.quantized_linear"] == 2 and row.notes
    kinds = [n.op_type for n in onnx.load_from_string(region.model.proto).graph.node]
    assert operator is None or kinds.count(operator) == 2
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        made, wanted, exact = fast(x), plain(x), model(x)
    assert (made - wanted).norm() <= 0.03 * wanted.norm()
    assert (made - exact).norm() <= 1.3 * (wanted - exact).norm() + 0.01 * exact.norm()
