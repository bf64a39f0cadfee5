"""Cutting regions out and putting them back: the same bits, legal graphs, explained refusals."""

from __future__ import annotations

import random
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from analysis_models import bert, exported, graph_of, inputs_of, llama, resnet, t5
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from graphopt.analysis.flow import flow
from graphopt.analysis.regions import FIXED, Region, partition
from graphopt.analysis.splice import extract, replace_region
from graphopt.errors import GraphoptError, IllegalRewriteError

aten = torch.ops.aten
MODELS = [(bert, False), (llama, False), (llama, True), (resnet, False), (t5, False)]


def program(build: Callable[..., nn.Module], dynamic: bool) -> tuple[Any, list[torch.Tensor]]:
    found, user = exported(build, dynamic=dynamic)
    return found, inputs_of(found, *user)


def random_region(module: GraphModule, seed: int) -> Region:
    """The convex closure of two to four calls not far from each other."""
    draw = random.Random(seed)
    calls = [n for n in module.graph.nodes if n.op not in FIXED]
    start = draw.randrange(len(calls))
    near = calls[start : start + draw.choice([5, 20, 60])]
    picked = draw.sample(near, min(len(near), draw.choice([2, 3, 4])))
    return Region(frozenset(picked)).convex_closure(flow(module.graph, effects=True))


def same_bits(left: Any, right: Any) -> bool:
    pairs = zip(tree_leaves(left), tree_leaves(right), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


class Recorder(Interpreter):
    """Runs a module and keeps every node's value."""

    def run_node(self, n: Node) -> Any:
        self.seen = getattr(self, "seen", {})
        self.seen[n] = super().run_node(n)
        return self.seen[n]


@torch.no_grad()
@pytest.mark.parametrize(("build", "dynamic"), MODELS)
def test_an_extracted_region_computes_what_it_computed(build, dynamic) -> None:
    found, values = program(build, dynamic)
    module = graph_of(found)
    recorder = Recorder(module)
    recorder.run(*values)
    for seed in range(6):
        region = random_region(module, seed)
        cut = extract(region)
        cut.graph.lint()
        results = cut(*(recorder.seen[n] for n in region.inputs))
        assert same_bits(results, [recorder.seen[n] for n in region.outputs])
        for inner, outer in zip(cut.graph.find_nodes(op="placeholder"), region.inputs, strict=True):
            assert inner.meta["val"] is outer.meta["val"]


@torch.no_grad()
@pytest.mark.parametrize("inline", [True, False])
@pytest.mark.parametrize(("build", "dynamic"), MODELS)
def test_putting_regions_back_changes_nothing(build, dynamic, inline) -> None:
    """Six random regions one after the other in the same graph, some across earlier ones."""
    found, values = program(build, dynamic)
    module = graph_of(found)
    expected = module(*values)
    for seed in range(6):
        region = random_region(module, seed)
        new = replace_region(module.graph, region, extract(region), inline=inline)
        assert len(new) == len(region.outputs)
        module.graph.lint()
        module.recompile()
        assert same_bits(module(*values), expected), seed
    if inline:
        assert len(module.graph.nodes) == len(found.graph.nodes)
    for node in module.graph.nodes:
        assert "val" in node.meta or not node.users


@torch.no_grad()
def test_sizes_enter_as_integers_and_other_sizes_still_fit() -> None:
    found, _ = program(llama, True)
    module = graph_of(found)
    (sdpa, *_) = (n for n in module.graph.nodes if "dot_product" in str(n.target))
    view = sdpa.next
    assert "view" in str(view.target)
    region = Region(frozenset({sdpa, view}))
    sizes = [n for n in region.inputs if isinstance(n.meta["val"], torch.SymInt)]
    assert len(sizes) == 2
    expected = module(*inputs_of(found, torch.arange(15).reshape(3, 5)))
    replace_region(module.graph, region, extract(region), inline=False)
    module.recompile()
    assert same_bits(module(*inputs_of(found, torch.arange(15).reshape(3, 5))), expected)


@torch.no_grad()
def test_a_partition_becomes_calls_of_modules() -> None:
    """What a lowering does: every stage is one call, the rest stays."""
    found, values = program(bert, False)
    module = graph_of(found)
    expected = module(*values)
    softmax = aten.scaled_dot_product_attention.default
    stages = partition(flow(module.graph, effects=True), lambda n: n.target is not softmax)
    for stage in stages:
        replace_region(module.graph, stage, extract(stage), inline=False, name="stage")
    module.graph.lint()
    module.recompile()
    assert same_bits(module(*values), expected)
    calls = module.graph.find_nodes(op="call_module")
    assert [c.target for c in calls] == ["stage", "stage_1", "stage_2"]
    others = {n.target for n in module.graph.nodes if n.op == "call_function"}
    assert others == {softmax, getitem}


def late_input() -> tuple[GraphModule, dict[str, Node]]:
    """a, then y that reads a, then z from another input, then b that reads z."""
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    a = graph.call_function(aten.relu.default, (x,))
    y = graph.call_function(aten.sigmoid.default, (a,))
    y2 = graph.call_function(aten.mul.Tensor, (y, w))
    z = graph.call_function(aten.tanh.default, (w,))
    b = graph.call_function(aten.neg.default, (z,))
    graph.output((y2, b))
    return GraphModule({}, graph), {"a": a, "y": y, "y2": y2, "z": z, "b": b}


def test_users_of_an_early_output_move_behind_a_late_input() -> None:
    module, n = late_input()
    x, w = torch.randn(3), torch.randn(3)
    expected = module(x, w)
    region = Region(frozenset({n["a"], n["b"]}))
    replace_region(module.graph, region, extract(region), inline=False)
    module.graph.lint()
    module.recompile()
    assert same_bits(module(x, w), expected)
    order = [node.name for node in module.graph.nodes]
    assert order.index(n["z"].name) < order.index("region") < order.index(n["y"].name)
    assert order.index(n["y"].name) < order.index(n["y2"].name)


def test_a_region_that_is_not_convex_is_refused_with_the_path() -> None:
    module, n = late_input()
    before = str(module.graph)
    region = Region(frozenset({n["a"], n["y2"]}))
    with pytest.raises(IllegalRewriteError, match=f"{n['a']} -> {n['y']} -> {n['y2']}"):
        replace_region(module.graph, region, extract(region))
    assert str(module.graph) == before


def test_nothing_moves_across_a_write_in_place() -> None:
    module, n = late_input()
    with module.graph.inserting_before(n["z"]):
        module.graph.call_function(aten.add_.Tensor, (n["y"], 1))
    before = str(module.graph)
    region = Region(frozenset({n["a"], n["b"]}))
    with pytest.raises(IllegalRewriteError, match="writes in place"):
        replace_region(module.graph, region, extract(region))
    assert str(module.graph) == before


def test_random_operators_keep_their_order() -> None:
    """Moving one draw behind a region must not let another draw overtake it."""
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    a = graph.call_function(aten.relu.default, (x,))
    first = graph.call_function(aten.rand_like.default, (a,))
    second = graph.call_function(aten.rand_like.default, (w,))
    b = graph.call_function(aten.neg.default, (w,))
    graph.output((first, second, b))
    module = GraphModule({}, graph)
    given = torch.rand(4), torch.rand(4)
    torch.manual_seed(1)
    expected = module(*given)
    region = Region(frozenset({a, b}))
    replace_region(graph, region, extract(region))
    module.recompile()
    torch.manual_seed(1)
    assert same_bits(module(*given), expected)
    names = [node.name for node in graph.nodes]
    assert names.index(b.name + "_1") < names.index(first.name) < names.index(second.name)


def test_a_region_between_two_draws_that_holds_them_is_not_convex() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    draws = [graph.call_function(aten.rand_like.default, (x,)) for _ in range(3)]
    graph.output(tuple(draws))
    module = GraphModule({}, graph)
    region = Region(frozenset({draws[0], draws[2]}))
    with pytest.raises(IllegalRewriteError, match="not convex"):
        replace_region(module.graph, region, extract(region))


def test_replacements_that_do_not_fit_are_refused() -> None:
    module, n = late_input()
    for node in n.values():
        node.meta["val"] = torch.empty(3)
    before = str(module.graph)
    region = Region(frozenset({n["a"]}))

    def refused(submodule: nn.Module, says: str, **options: Any) -> None:
        with pytest.raises(IllegalRewriteError, match=says):
            replace_region(module.graph, region, submodule, **options)
        assert str(module.graph) == before

    refused(nn.ReLU(), "has no graph to inline")
    refused(extract(Region(frozenset({n["y2"]}))), "takes 1 values and returns 1.*takes 2")
    half = extract(region)
    half.graph.output_node().args[0][0].meta["val"] = torch.empty(3, dtype=torch.float16)
    refused(half, "float32 tensor with 1 dims.*float16", inline=False)
    bare = extract(region)
    bare.graph.output_node().args = (bare.graph.output_node().args[0][0],)
    refused(bare, "return a tuple")
    constant = extract(region)
    constant.graph.output_node().args = ((1,),)
    refused(constant, "constants")


def test_stale_foreign_and_empty_regions_are_refused() -> None:
    module, n = late_input()
    _foreign_module, m = late_input()
    foreign = Region(frozenset({m["a"]}))
    with pytest.raises(IllegalRewriteError, match="not a part"):
        replace_region(module.graph, foreign, extract(foreign))
    region = Region(frozenset({n["a"]}))
    cut = extract(region)
    replace_region(module.graph, region, cut)
    with pytest.raises(IllegalRewriteError, match="not a part"):
        replace_region(module.graph, region, cut)
    with pytest.raises(GraphoptError, match="empty region"):
        extract(Region(frozenset()))
    with pytest.raises(IllegalRewriteError, match="no module owns"):
        graph = Graph()
        node = graph.call_function(aten.neg.default, (graph.placeholder("x"),))
        replace_region(graph, Region(frozenset({node})), cut)


def test_attributes_and_submodules_travel_with_an_inlined_region() -> None:
    """The inlined module's attributes keep their names where free, and are never overwritten."""
    module, n = late_input()
    module.register_buffer("table", torch.full((3,), 7.0))
    region = Region(frozenset({n["a"]}))
    body = Graph()
    x = body.placeholder("x")
    shifted = body.call_function(aten.add.Tensor, (x, body.get_attr("table")))
    weighted = body.call_function(aten.mul.Tensor, (shifted, body.get_attr("inner.weight")))
    body.output((body.call_module("inner", (weighted,)),))
    root = nn.Module()
    root.register_buffer("table", torch.tensor([1.0, 2.0, 3.0]))
    root.inner = nn.PReLU()
    submodule = GraphModule(root, body)
    x, w = torch.randn(3), torch.randn(3)
    replace_region(module.graph, region, submodule)
    module.graph.lint()
    module.recompile()
    (expected,) = submodule(x)
    assert torch.equal(module(x, w)[0], expected.sigmoid() * w)
    assert torch.equal(module.table, torch.full((3,), 7.0))
    assert "table_1" in dict(module.named_buffers()) and "inner" in dict(module.named_modules())
    again = extract(Region(frozenset(k for k in module.graph.nodes if k.op == "call_module")))
    assert again.inner is module.inner


def test_an_input_may_be_returned_as_it_is() -> None:
    module, n = late_input()
    region = Region(frozenset({n["a"]}))
    body = Graph()
    body.output((body.placeholder("x"),))
    (stands_for,) = replace_region(module.graph, region, GraphModule({}, body))
    module.recompile()
    x, w = torch.randn(3), torch.randn(3)
    assert stands_for.op == "placeholder"
    assert torch.equal(module(x, w)[0], x.sigmoid() * w)
