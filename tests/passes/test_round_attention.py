"""RoundAttention as users meet it: compiled, saved, exported, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import graphopt
from graphopt.emit import spelled as spelling
from graphopt.emit.spelled import spelled
from graphopt.errors import RecipeError
from graphopt.kernels.rounded_attention import cast_before, rounded_attention
from graphopt.passes import QuantizeMatmul, RoundAttention
from graphopt.rewrite import make_pass
from graphopt.verify.unrounded import rounds, unrounded

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    def __init__(self, sure: float = 1.0) -> None:
        super().__init__()
        self.sure = sure
        self.inner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in self.inner[:3])
        made = F.scaled_dot_product_attention(q * self.sure, k, v, attn_mask=seen[:, None, None])
        return x + self.inner[3](made.transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    """Two blocks under one mask."""

    def __init__(self, sure: float = 1.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(sure) for _ in range(2))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, seen)
        return x


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def inputs() -> tuple[Tensor, Tensor]:
    seen = torch.arange(40)[None] < torch.tensor([40, 27, 3])[:, None]
    return torch.randn(3, 40, WIDTH), seen


def optimized(model: nn.Module, step: Any = None, **options: Any) -> Any:
    steps = ["exact", step or RoundAttention()]
    return graphopt.compile(
        model.eval(), example_inputs=inputs(), passes=steps, measure=False, **options
    )


def calls(module: Any, target: Any) -> list[fx.Node]:
    nodes: list[fx.Node] = module.program.graph.find_nodes(op="call_function", target=target)
    return nodes


def test_it_is_rounded_within_its_bound_and_the_report_says_so() -> None:
    torch.manual_seed(0)
    model, given = Encoder(), inputs()
    fast = optimized(model)
    assert len(calls(fast, rounded_attention)) == 2
    found, wanted = fast(*given), model(*given)
    assert 0 < float((found - wanted).norm() / wanted.norm()) < 4e-3
    losses = [c for c in fast.report.applied if c.rule == "RoundOperands"]
    assert len(losses) == 2 and all(0 < c.certificate.error < 0.02 for c in losses)


def test_attention_that_is_sure_is_kept() -> None:
    torch.manual_seed(0)
    fast = optimized(Encoder(sure=400.0))
    assert not calls(fast, rounded_attention)
    missed = [m for m in fast.report.missed if m.rule == "RoundOperands"]
    assert missed and all("0.02" in m.reason for m in missed)
    assert missed[0].option == "RoundAttention:tolerance"


def spelled_calls(fast: Any) -> int:
    graph = spelled(fast.program.graph_module).graph
    return len(graph.find_nodes(op="call_function", target=cast_before))


def test_inductor_rounds_where_operands_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimized(Encoder())
    dynamic = optimized(Encoder(), dynamic_shapes={"x": {1: "n"}, "seen": {1: "n"}})
    monkeypatch.setattr(spelling, "is_fast", lambda _: True)
    assert spelled_calls(fast) == 2
    assert spelled_calls(dynamic) == 0  # a call of few rows is not rounded
    monkeypatch.setattr(spelling, "is_fast", lambda _: False)
    assert spelled_calls(fast) == 0


def test_through_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spelling, "is_fast", lambda _: True)
    torch.manual_seed(0)
    model, given = Encoder(), inputs()
    fast = optimized(model, target="inductor")
    assert not any("torch target was kept" in note for note in fast.report.notes)
    wanted = model(*given)
    assert float((fast(*given) - wanted).norm() / wanted.norm()) < 4e-3


def test_saved_and_loaded(tmp_path: Path) -> None:
    fast, given = optimized(Encoder()), inputs()
    graphopt.save(fast, tmp_path / "m.pt2")
    again = graphopt.load(tmp_path / "m.pt2")
    assert torch.equal(again(*given), fast(*given))


def test_onnx_computes_on_operands_as_they_are(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, given = Encoder().eval(), inputs()
    graphopt.export_onnx(optimized(model), tmp_path / "m.onnx", measure=False)
    file = onnx.load(tmp_path / "m.onnx")
    assert not any(node.domain == "graphopt" for node in file.graph.node)
    session = runtime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    (made,) = session.run(None, dict(zip(names, (t.numpy() for t in given), strict=True)))
    torch.testing.assert_close(torch.from_numpy(made), model(*given), rtol=1e-5, atol=1e-5)


def test_with_quantized_products_it_is_what_rounds_besides() -> None:
    model = Encoder()
    step = QuantizeMatmul(activations=None, head=True)
    fast = graphopt.compile(
        model.eval(),
        example_inputs=inputs(),
        passes=["exact", step, RoundAttention()],
        measure=False,
    )
    assert rounds(fast.program.graph) and not rounds(unrounded(fast.program).graph)
    assert len(calls(fast, rounded_attention)) == 2


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"tolerance": 0}, {"tolerance": 1.5}])
def test_options_that_mean_nothing_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        make_pass("RoundAttention", options)
