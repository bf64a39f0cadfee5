"""Which nodes go to ONNX Runtime, in which regions, and what is said of the rest."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.emit.ort import models, regions
from graphopt.emit.ort.call import OrtRegion
from graphopt.emit.ort.programs import root_sizes
from graphopt.errors import ExportError, GraphoptError
from graphopt.report import Partition, TorchPart

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


@torch.library.custom_op("ort_tests::mirrored", mutates_args=())
def mirrored(x: Tensor) -> Tensor:
    """Rows in the other order: ONNX has no translation of it."""
    return x.flip(1)


@mirrored.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


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


DYNAMIC = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC},)


def compiled(model: nn.Module, *inputs: Any, **options: Any) -> Any:
    options = {"measure": False, "strict": True, **options}
    return graphopt.compile(model.eval(), example_inputs=inputs, target="onnxruntime", **options)


def in_regions(module: nn.Module) -> list[OrtRegion]:
    return [m for m in module.modules() if isinstance(m, OrtRegion)]


def part(found: Partition, word: str) -> TorchPart:
    return next(p for p in found.torch if word in p.reason)


def check(fast: nn.Module, model: nn.Module, *inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fast(*inputs), model(*inputs), rtol=1e-5, atol=1e-5)


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


class Scalars(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (x * scale).exp().sum(), scale + 1


def test_tensors_without_dimensions() -> None:
    model = Scalars()
    fast = compiled(model, torch.randn(3, 4), torch.tensor(0.5))
    assert in_regions(fast)
    check(fast, model, torch.randn(3, 4), torch.tensor(-0.25))


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


class Halves(nn.Module):
    """A slice that is empty for short inputs."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x * 2).tanh()[:, 3:].exp(), x.cumsum(-1)


@pytest.mark.parametrize("rows", [1, 5])
def test_results_that_are_empty(rows: int) -> None:
    model = Halves()
    fast = compiled(model, torch.randn(2, 3), dynamic_shapes=({0: Dim.DYNAMIC},))
    assert in_regions(fast)
    check(fast, model, torch.randn(rows, 3))


def test_inputs_that_are_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module takes none along a dynamic axis, as with every target; a region would."""
    model, x = Halves(), torch.randn(0, 3)
    fast = compiled(model, torch.randn(2, 3), dynamic_shapes=({0: Dim.DYNAMIC},))
    with pytest.raises(GraphoptError, match="at least 1"):
        fast(x)
    monkeypatch.setattr(OrtRegion, "_run", lambda *_values: pytest.fail("not in torch"))
    with torch.no_grad():
        torch.testing.assert_close(fast._graph(x), model(x))
    check(compiled(model, x), model, x)


class Views(nn.Module):
    """Outputs that show the memory of another output, and of the input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = x.exp() + 1
        v = y.transpose(0, 1)
        return y, v, x[1:], (v * v).sum(0)


def test_outputs_that_are_views_go_on_to_be() -> None:
    model, x = Views(), torch.randn(3, 5)
    fast = compiled(model, x)
    assert in_regions(fast)
    y, v, part_of_x, _ = fast(x)
    assert v.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
    assert part_of_x.data_ptr() == x[1:].data_ptr()
    assert v.stride() == (1, 5)
    check(fast, model, x)


class Channels(nn.Module):
    """A convolution whose result lies in memory with its channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


def test_results_lie_in_memory_as_those_of_torch() -> None:
    model = Channels().eval()
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    fast = compiled(model, x)
    assert in_regions(fast)
    with torch.no_grad():
        assert fast(x).stride() == model(x).stride()
    check(fast, model, x)


@torch.library.custom_op("ort_tests::both", mutates_args=())
def both(x: Tensor) -> list[Tensor]:
    """Two values, without a translation either."""
    return [x.flip(0), x.sin()]


@both.register_fake
def _(x: Tensor) -> list[Tensor]:
    return [torch.empty_like(x), torch.empty_like(x)]


class Items(nn.Module):
    """Items of tuples, some of which leave a region in the middle; others come before it."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = both(x)
        values, order = (x * 2 + y).sort(-1)
        first, second = values.exp().split([2, x.shape[1] - 2], 1)
        return mirrored(order).abs(), mirrored(second) + second.log1p(), first.exp()


def test_items_leave_regions() -> None:
    model = Items()
    fast = compiled(model, torch.randn(3, 6), dynamic_shapes=DYNAMIC)
    assert in_regions(fast)
    assert not any("aten.sort" in p.operators for p in fast.report.partition.torch)
    check(fast, model, torch.randn(4, 5))


class Longest(nn.Module):
    """Sizes that are the larger of two, and sizes of what is computed, on both sides of a cut."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        length = torch.sym_max(x.shape[1], y.shape[1])
        wide = torch.cat([x.exp(), y.exp()], 1)
        made = mirrored(wide) * wide.shape[1] + length
        return made.reshape(wide.shape[0] * wide.shape[1]).log(), torch.ones(length) * 2


def test_sizes_that_are_computed() -> None:
    model = Longest()
    dynamic = ({1: Dim.DYNAMIC}, {1: Dim.DYNAMIC})
    fast = compiled(model, torch.rand(3, 6), torch.rand(3, 4), dynamic_shapes=dynamic)
    assert len(in_regions(fast)) == 2
    for first, second in ((6, 4), (2, 9)):
        check(fast, model, torch.rand(3, first), torch.rand(3, second))


class Flat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mirrored(x.exp()).reshape(x.shape[0] * x.shape[1]) + x.shape[1]


def test_sizes_are_read_off_inputs_wherever_they_were_read() -> None:
    program = graphopt.compile(
        Flat().eval(), example_inputs=(torch.randn(2, 4),), dynamic_shapes=DYNAMIC, measure=False
    ).program
    made = next(n for n in program.graph.nodes if n.target is torch.ops.aten.exp.default)
    reads = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sym_size.int)
    for read in reads:  # as rules do that know a value and not where it comes from
        made.append(read)
        read.args = (made, read.args[1])
    product = next(n for n in program.graph.nodes if n.target is operator.mul)
    with program.graph.inserting_after(product):
        size = program.graph.call_function(torch.ops.aten.sym_numel.default, (made,))
    size.meta["val"] = product.meta["val"]
    product.replace_all_uses_with(size)
    program.graph.erase_node(product)
    root_sizes(program)
    program.lint()
    assert all(user.target is torch.ops.ort_tests.mirrored.default for user in made.users)
    x = torch.randn(3, 5)
    torch.testing.assert_close(program.run([x])[0], Flat()(x))


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


class Named(nn.Module):
    """Several outputs in a dict, one of them an input given back."""

    def forward(self, x: Tensor, ids: Tensor) -> dict[str, Any]:
        return {"big": x > 0, "x": x, "rows": x[ids], "n": x.shape[0]}


def test_structured_outputs() -> None:
    model, x, ids = Named(), torch.randn(5, 3), torch.tensor([0, 4])
    fast = compiled(model, x, ids, dynamic_shapes=({0: Dim.DYNAMIC}, None))
    assert in_regions(fast)
    made = fast(torch.ones(7, 3), ids)
    assert made["n"] == 7 and made["big"].dtype == torch.bool and made["big"].all()


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
