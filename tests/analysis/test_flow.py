"""The networkx view of a graph, against the definitions of what it is asked."""

from __future__ import annotations

from operator import getitem

import networkx as nx
import pytest
import torch
from analysis_models import bert, exported, resnet
from torch.fx import Graph, GraphModule, Node

from graphopt.analysis.flow import (
    between,
    dominators,
    flow,
    is_ordered,
    leaves,
    levels,
    mutates,
    reachable,
)

aten = torch.ops.aten


@pytest.fixture
def diamond() -> dict[str, Node]:
    """x -> a -> (b, c) -> d -> out, with a weight read by c."""
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    a = graph.call_function(aten.relu.default, (x,))
    b = graph.call_function(aten.neg.default, (a,))
    c = graph.call_function(aten.mul.Tensor, (a, w))
    d = graph.call_function(aten.cat.default, ([b, c, b], 1))
    out = graph.output((d,))
    return {"x": x, "w": w, "a": a, "b": b, "c": c, "d": d, "out": out}


def test_edges_carry_the_positions_of_the_producer(diamond: dict[str, Node]) -> None:
    n = diamond
    view = flow(n["x"].graph)
    assert list(view) == list(n["x"].graph.nodes)
    edges = {(u.name, v.name): p for u, v, p in view.edges(data="positions")}
    d = n["d"].name
    assert edges[n["b"].name, d] == (0, 2)
    assert edges[n["c"].name, d] == (1,)
    assert edges["w", n["c"].name] == (1,)


def test_leaves_open_lists_and_slices_and_sort_keywords() -> None:
    graph = Graph()
    x, i = graph.placeholder("x"), graph.placeholder("i")
    node = graph.call_function(
        getitem, (x, (slice(i, None), [2, x])), {"zeta": 1, "alpha": {"k": i}}
    )
    assert leaves(node) == (x, i, None, None, 2, x, i, 1)
    assert flow(graph).edges[i, node]["positions"] == (1, 6)


def test_a_slice_of_the_program_has_only_its_own_edges(diamond: dict[str, Node]) -> None:
    n = diamond
    view = flow([n["b"], n["c"], n["d"]])
    assert set(view) == {n["b"], n["c"], n["d"]}
    assert set(view.edges) == {(n["b"], n["d"]), (n["c"], n["d"])}


def test_reachability(diamond: dict[str, Node]) -> None:
    n = diamond
    view = flow(n["x"].graph)
    assert reachable(view, [n["b"]]) == {n["b"], n["d"], n["out"]}
    assert reachable(view, [n["c"]], backward=True) == {n["c"], n["a"], n["x"], n["w"]}
    assert between(view, [n["a"]], [n["c"]]) == {n["a"], n["c"]}
    assert between(view, [n["c"]], [n["a"]]) == set()
    assert reachable(view, []) == set()


def test_levels_put_producers_first(diamond: dict[str, Node]) -> None:
    n = diamond
    names = [{node.name for node in level} for level in levels(flow(n["x"].graph))]
    assert names[0] == {"x", "w"}
    assert names[2] == {n["b"].name, n["c"].name}


def test_dominators_from_all_inputs_and_from_the_data_alone(diamond: dict[str, Node]) -> None:
    n = diamond
    view = flow(n["x"].graph)
    everything = dominators(view)
    assert everything[n["a"]] is n["x"] and everything[n["x"]] is None
    assert everything[n["c"]] is None and everything[n["d"]] is None
    data = dominators(view, [n["x"]])
    assert data[n["c"]] is n["a"] and data[n["d"]] is n["a"] and n["w"] not in data


@pytest.mark.parametrize("build", [bert, resnet])
def test_dominators_agree_with_their_definition(build) -> None:
    """d dominates n exactly when removing d cuts n off from every source."""
    program, _ = exported(build)
    view = flow(program.graph)
    found = dominators(view)
    sources = [node for node in view if not view.in_degree(node)]
    for node, parent in list(found.items())[::7]:
        cut = {
            d
            for d in reachable(view, [node], backward=True) - {node}
            if node not in _reached_without(view, sources, d)
        }
        chain = set()
        while parent is not None:
            chain.add(parent)
            parent = found[parent]
        assert chain == cut


def _reached_without(view: nx.DiGraph, sources: list[Node], removed: Node) -> set[Node]:
    rest = nx.restricted_view(view, [removed], [])
    return reachable(rest, [s for s in sources if s is not removed])


def test_effects_chain_random_operators_only() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.native_dropout.default, (x, 0.5, True))
    plain = graph.call_function(aten.relu.default, (x,))
    second = graph.call_function(aten.rand_like.default, (x,))
    graph.output((first, plain, second))
    view = flow(graph, effects=True)
    assert view.edges[first, second]["positions"] == ()
    assert not view.has_edge(plain, second) and not flow(graph).has_edge(first, second)
    assert [is_ordered(n) for n in (first, plain, second)] == [True, False, True]


def test_calls_are_ordered_when_what_they_run_is_random_or_unseen() -> None:
    inner = Graph()
    inner.output(inner.call_function(aten.rand_like.default, (inner.placeholder("x"),)))
    still = Graph()
    still.output(still.call_function(aten.relu.default, (still.placeholder("x"),)))
    root = torch.nn.Module()
    root.random, root.still = GraphModule({}, inner), GraphModule({}, still)
    root.opaque = torch.nn.Dropout()
    graph = Graph()
    x = graph.placeholder("x")
    calls = {name: graph.call_module(name, (x,)) for name in ("random", "still", "opaque")}
    graph.output(tuple(calls.values()))
    GraphModule(root, graph)
    assert {name: is_ordered(node) for name, node in calls.items()} == {
        "random": True,
        "still": False,
        "opaque": True,
    }


def test_branches_of_a_conditional_are_looked_into() -> None:
    class Branch(torch.nn.Module):
        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda t: t.sin(), lambda t: t.cos(), (x,))

    program = torch.export.export(Branch(), (torch.rand(3),), strict=False)
    (call,) = (n for n in program.graph.nodes if "cond" in str(n.target))
    assert not is_ordered(call) and not mutates(call)
    branch = program.graph_module.get_submodule(str(call.args[1].target))
    (inner,) = (
        n for n in branch.graph.nodes if n.op == "call_function" and n.target is not getitem
    )
    inner.target = aten.rand_like.default
    assert is_ordered(call)
    inner.target = aten.sin_.default
    assert mutates(call)


def test_writes_in_place_are_seen() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    nodes = [
        graph.call_function(aten.add_.Tensor, (x, 1)),
        graph.call_method("add_", (x, 1)),
        graph.call_function(aten.add.Tensor, (x, 1)),
        graph.call_method("__add__", (x, 1)),
    ]
    assert [mutates(n) for n in nodes] == [True, True, False, False]
