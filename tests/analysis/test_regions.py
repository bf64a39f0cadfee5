"""Regions against their definitions, on random graphs and on real ones."""

from __future__ import annotations

import random
from itertools import combinations, pairwise
from operator import getitem

import networkx as nx
import pytest
import torch
from analysis_models import bert, exported, llama, resnet
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, Node

from graphopt.analysis.flow import Flow, flow
from graphopt.analysis.regions import Region, grow, partition
from graphopt.errors import GraphoptError

aten = torch.ops.aten


@st.composite
def programs(draw: st.DrawFn) -> tuple[Flow, list[Node]]:
    """A random program of up to nine calls, each reading one or two earlier nodes."""
    graph = Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(draw(st.integers(1, 9))):
        read = draw(st.lists(st.sampled_from(nodes), min_size=1, max_size=2))
        op = aten.neg.default if len(read) == 1 else aten.add.Tensor
        nodes.append(graph.call_function(op, tuple(read)))
    graph.output(nodes[-1])
    return flow(graph), nodes[1:]


def convex_by_definition(view: Flow, nodes: frozenset[Node]) -> bool:
    return not any(
        set(path) - nodes for a in nodes for b in nodes for path in nx.all_simple_paths(view, a, b)
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs(), st.data())
def test_convexity_and_closure_agree_with_their_definitions(program, data) -> None:
    view, calls = program
    region = Region(frozenset(data.draw(st.sets(st.sampled_from(calls), min_size=1))))
    path = region.escape(view)
    assert (not path) == region.is_convex(view) == convex_by_definition(view, region.nodes)
    if path:
        assert all(view.has_edge(a, b) for a, b in pairwise(path))
        assert path[0] in region.nodes and path[-1] in region.nodes
        assert len(path) > 2 and not region.nodes & set(path[1:-1])
    closure = region.convex_closure(view)
    on_paths = {n for a in region.nodes for b in region.nodes for n in _between(view, a, b)}
    assert closure.nodes == region.nodes | on_paths
    assert closure.is_convex(view)


def _between(view: Flow, a: Node, b: Node) -> set[Node]:
    return {n for path in nx.all_simple_paths(view, a, b) for n in path}


@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs(), st.data())
def test_grow_is_convex_supported_and_cannot_be_extended(program, data) -> None:
    view, calls = program
    supported = data.draw(st.sets(st.sampled_from(calls), min_size=1))
    seed = Region(frozenset({data.draw(st.sampled_from(sorted(supported)))}))
    grown = grow(view, seed, supported.__contains__)
    assert seed.nodes <= grown.nodes <= supported and grown.is_convex(view)
    for node in supported - grown.nodes:
        if any(n in grown.nodes for n in nx.all_neighbors(view, node)):
            assert not Region(grown.nodes | {node}).is_convex(view)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(programs(), st.data())
def test_partition_is_complete_convex_schedulable_and_the_smallest(program, data) -> None:
    view, calls = program
    supported = data.draw(st.sets(st.sampled_from(calls)))
    regions = partition(view, supported.__contains__)
    assert sorted(n for r in regions for n in r.nodes) == sorted(supported)
    assert all(r.is_convex(view) for r in regions)
    for earlier, later in combinations(regions, 2):
        assert not any(nx.has_path(view, b, a) for a in earlier.nodes for b in later.nodes)
    assert len(regions) == max(_runs(path, supported) for path in _paths(view))


def _paths(view: Flow) -> list[list[Node]]:
    sinks = [n for n in view if not view.out_degree(n)]
    return [p for s in sinks for p in nx.all_simple_paths(view, next(iter(view)), s)]


def _runs(path: list[Node], supported: set[Node]) -> int:
    inside = [node in supported for node in path]
    return sum(now and not before for before, now in pairwise([False, *inside]))


def test_items_stay_with_the_operator_that_makes_the_tuple() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    parts = graph.call_function(aten.split.Tensor, (x, 2))
    first = graph.call_function(getitem, (parts, 0))
    done = graph.call_function(aten.neg.default, (first,))
    graph.output(done)
    (region,) = partition(flow(graph), lambda n: n is not first)
    assert region.nodes == {parts, first, done}
    (rest,) = partition(flow(graph), lambda n: n in (first, done))
    assert rest.nodes == {done}


def test_boundaries_are_ordered_and_attributes_are_not_inputs() -> None:
    graph = Graph()
    x, y, w = (graph.placeholder(name) for name in "xyw")
    table = graph.get_attr("table")
    a = graph.call_function(aten.mul.Tensor, (y, w))
    b = graph.call_function(aten.add.Tensor, (a, x))
    c = graph.call_function(aten.add.Tensor, (b, table))
    out = graph.output((a, c))
    region = Region(frozenset({c, a, b}))
    assert region.order == region.span == (a, b, c)
    assert region.inputs == (y, w, x)
    assert region.outputs == (a, c)
    with pytest.raises(GraphoptError, match="kind is output"):
        Region(frozenset({a, out}))


def test_nodes_of_two_graphs_make_no_region() -> None:
    nodes = []
    for _ in range(2):
        graph = Graph()
        nodes.append(graph.call_function(aten.neg.default, (graph.placeholder("x"),)))
    with pytest.raises(GraphoptError, match="more than one graph"):
        Region(frozenset(nodes))


def test_grow_refuses_a_seed_that_is_not_convex() -> None:
    graph = Graph()
    a = graph.call_function(aten.neg.default, (graph.placeholder("x"),))
    b = graph.call_function(aten.neg.default, (a,))
    c = graph.call_function(aten.neg.default, (b,))
    with pytest.raises(GraphoptError, match=f"{a.name} -> {b.name} -> {c.name}"):
        grow(flow(graph), Region(frozenset({a, c})), lambda n: True)


@pytest.mark.parametrize("build", [bert, llama, resnet])
def test_partition_of_a_real_model_around_one_operator(build) -> None:
    """Each unsupported operator on the main path cuts it once: layers + 1 regions."""
    program, _ = exported(build, 3)
    view = flow(program.graph, effects=True)
    ops = (aten.relu.default,) if build is resnet else (aten.scaled_dot_product_attention.default,)
    barriers = [n for n in view if n.target in ops]
    regions = partition(view, lambda n: n.target not in ops)
    assert len(regions) == len(barriers) + 1
    assert all(r.is_convex(view) for r in regions)
    whole = partition(view, lambda n: True)
    assert len(whole) == 1 and whole[0].inputs and not whole[0].escape(view)


def test_grow_takes_the_whole_supported_stretch_of_a_real_model() -> None:
    program, _ = exported(llama, 2)
    view = flow(program.graph)
    blocked = aten.scaled_dot_product_attention.default
    silu = next(n for n in view if n.target is aten.silu.default)
    grown = grow(view, Region(frozenset({silu})), lambda n: n.target is not blocked)
    assert grown.is_convex(view)
    assert len(grown.nodes) > 30
    for node in random.Random(0).sample(sorted(grown.nodes), 10):
        assert node.target is not blocked
