"""What regions of ONNX Runtime hand out: items, views, empty tensors, computed sizes."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from ort_modules import DYNAMIC, check, compiled, in_regions, mirrored
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.emit.ort.call import OrtRegion
from graphopt.emit.ort.programs import root_sizes
from graphopt.errors import GraphoptError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Scalars(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        return (x * scale).exp().sum(), scale + 1


def test_tensors_without_dimensions() -> None:
    model = Scalars()
    fast = compiled(model, torch.randn(3, 4), torch.tensor(0.5))
    assert in_regions(fast)
    check(fast, model, torch.randn(3, 4), torch.tensor(-0.25))


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
