"""Which nodes go to ONNX Runtime, in which regions, and what is said of the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ort_modules import DYNAMIC, check, compiled, in_regions, mirrored, part
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.emit.ort import models, regions
from graphopt.errors import ExportError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Cut(nn.Module):
    """Two linear layers around an operator that has no translation; a sum goes past it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = self.enter(x).relu()
        after = self.leave(mirrored(before) + before)
        return after, before.sum(-1) + x.shape[1]


def test_an_operator_without_translation_parts_two_regions() -> None:
    model = Cut()
    fast = compiled(model, torch.randn(2, 4, 8), dynamic_shapes=DYNAMIC)
    found = fast.report.partition
    assert len(in_regions(fast)) == len(found.regions) == 2
    assert found.providers == ("CPUExecutionProvider",)
    left = part(found, "no translation")
    assert left.operators == {"ort_tests.mirrored": 1}
    assert left.source and "test_onnxruntime_partition.py" in left.source
    for shape in ((2, 4, 8), (3, 7, 8), (1, 1, 8)):
        check(fast, model, torch.randn(shape))


def test_a_model_that_translates_is_translated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    best = models.best_draft
    monkeypatch.setattr(models, "best_draft", lambda *a, **k: seen.append(a) or best(*a, **k))
    compiled(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(2, 8))
    assert len(seen) == 1


def test_a_region_that_is_refused_as_a_whole_alone_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(program: Any, *args: Any, **options: Any) -> Any:
        if len([n for n in program.graph.nodes if n.op == "call_function"]) > 1:
            raise ExportError("not together")
        return models.translate_region(program, *args, **options)

    monkeypatch.setattr(regions, "translate_region", refuse)
    model = Cut()
    fast = compiled(model, torch.randn(2, 4, 8))
    assert not in_regions(fast)
    assert part(fast.report.partition, "not together").operators["aten.linear"] == 2
    check(fast, model, torch.randn(2, 4, 8))


class Polar(nn.Module):
    """Complex numbers between real ones."""

    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2).exp()
        z = torch.complex(y, x).abs()
        return z.log1p().cumsum(-1)


def test_complex_numbers_stay_in_torch() -> None:
    model, x = Polar(), torch.randn(3, 5)
    fast = compiled(model, x)
    found = part(fast.report.partition, "complex")
    assert found.operators == {"aten.complex": 1, "aten.abs": 1}
    assert len(in_regions(fast)) == 2
    check(fast, model, x)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x).tanh()
        return self.enter(h + torch.rand_like(h)).tanh()


def test_random_operators_draw_from_the_generator_of_torch() -> None:
    model, x = Random(), torch.randn(2, 8)
    fast = compiled(model, x)
    assert part(fast.report.partition, "random numbers").operators == {"aten.rand_like": 1}
    with torch.no_grad():
        torch.manual_seed(3)
        made = fast(x)
        torch.manual_seed(3)
        torch.testing.assert_close(made, model(x), rtol=1e-5, atol=1e-6)


class Attention(nn.Module):
    """Attention, whose operator could draw a dropout mask and does not."""

    def forward(self, q: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_attention_without_dropout_draws_nothing() -> None:
    model, q = Attention(), torch.randn(2, 3, 5, 4)
    fast = compiled(model, q)
    assert len(in_regions(fast)) == 1
    check(fast, model, q)


class Counter(nn.Module):
    """Counts its calls and keeps the last mean: buffers that are written."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("last", torch.zeros(8))
        self.enter = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last.copy_(x.mean(0))
        return self.enter(x) + self.last + self.calls.sum()


def test_written_buffers_are_written_and_read_anew() -> None:
    model, twin = Counter(), Counter()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(4, 8)
    fast = compiled(model, x)
    assert len(in_regions(fast)) == 1
    before = model.calls.clone()
    with torch.no_grad():
        for step in range(1, 4):
            y = torch.randn(4, 8)
            twin.calls.copy_(model.calls)
            torch.testing.assert_close(fast(y), twin(y), rtol=1e-5, atol=1e-6)
            assert torch.equal(model.calls, before + step)
            torch.testing.assert_close(model.last, y.mean(0))


class Tied(nn.Module):
    """One weight for the embedding and the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = torch.where(keep.unsqueeze(-1), self.table(ids), 0.0)
        return self.head(h), ids + 1, keep.any(-1)


def test_tied_weights_are_held_once_and_types_stay() -> None:
    model = Tied()
    ids, keep = torch.randint(50, (2, 6)), torch.rand(2, 6) > 0.3
    fast = compiled(model, ids, keep, dynamic_shapes=({1: Dim.DYNAMIC}, {1: Dim.DYNAMIC}))
    (region,) = in_regions(fast)
    held = {w.data_ptr() for w in region.model.weights.values()}
    assert held == {model.table.weight.data_ptr()}
    (row,) = fast.report.partition.regions
    assert row.shared_bytes == model.table.weight.nbytes and row.own_bytes == 0
    check(fast, model, ids, keep)
    check(fast, model, torch.randint(50, (2, 3)), torch.rand(2, 3) > 0.3)


class Found(nn.Module):
    """Sizes that values decide, between products."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.enter(x).relu()
        return h[h.sum(-1) > 0.5].mul(2), self.leave(h)


def test_sizes_that_values_decide_stay_in_torch() -> None:
    model = Found()
    fast = compiled(model, torch.randn(6, 8))
    assert in_regions(fast) and part(fast.report.partition, "depend on values")
    for x in (torch.randn(6, 8), torch.zeros(6, 8) - 5):
        check(fast, model, x)


class Chain(nn.Module):
    """Regions that read each other's results, past what stands between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        total = x
        for layer in self.layers:
            x = mirrored(layer(x).tanh()) + x
            total = total + x
        return total


def test_regions_read_each_other() -> None:
    model, x = Chain(), torch.randn(2, 8)
    fast = compiled(model, x)
    assert len(in_regions(fast)) == 5
    check(fast, model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_what_has_no_kernel_for_a_dtype_stays_in_torch(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    model, x = model.eval().to(dtype), torch.randn(3, 8, dtype=dtype)
    fast = compiled(model, x, strict=False)
    assert fast(x).dtype is dtype
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=2e-2, atol=2e-2)
    assert fast.report.partition is not None or fast.report.notes


def test_the_reason_of_a_missing_kernel_is_that_of_onnxruntime() -> None:
    class Erf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.erf(x * 2).exp()

    fast = compiled(Erf(), torch.randn(3, dtype=torch.float64))
    left = [p for p in fast.report.partition.torch if "ONNX Runtime does not take it" in p.reason]
    assert left and "aten.erf" in left[0].operators


@pytest.mark.parametrize("show", ["to_json", "to_html"])
def test_reports_show_the_partition(show: str) -> None:
    report = compiled(Cut(), torch.randn(2, 4, 8)).report
    text = getattr(report, show)()
    assert "ort_tests.mirrored" in text and "no translation" in text and "onnxruntime_1" in text
    again = graphopt.Report.from_json(report.to_json())
    assert again.partition == report.partition


def test_the_terminal_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    compiled(Cut(), torch.randn(2, 4, 8)).report.print()
    shown = capsys.readouterr().out
    assert "ONNX Runtime: CPUExecutionProvider" in shown
    assert "2 regions with" in shown and "no translation" in shown and "onnxruntime_0" in shown
