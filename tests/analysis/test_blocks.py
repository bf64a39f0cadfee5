"""Layers of real models are found exactly, with their parameters, by structure alone."""

from __future__ import annotations

import random
import re
from typing import Any

import networkx as nx
import pytest
import torch
import transformers
from analysis_models import (
    TEXT,
    WIDTH,
    bert,
    capture,
    exported,
    gpt2,
    graph_of,
    ids,
    llama,
    resnet,
    t5,
    vit,
)
from counting import counted
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from graphopt.analysis.blocks import BlockGroup, find_blocks
from graphopt.analysis.flow import flow, leaves
from graphopt.analysis.splice import extract


def program(build: Any, layers: int) -> GraphModule:
    return graph_of(exported(build, layers)[0])


def without_paths(graph: Graph) -> Graph:
    for node in graph.nodes:
        node.meta.pop("nn_module_stack", None)
    return graph


def layer_of(node: Node, prefix: str) -> int | None:
    """The layer that the metadata gives, from paths such as ``encoder.layer.3.output``."""
    paths = [str(path) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    found = re.match(prefix + r"\.(\d+)(\.|$)", paths[-1]) if paths else None
    return int(found[1]) if found else None


def numbers(group: BlockGroup) -> set[tuple[str, ...]]:
    """The first number in the name of each parameter, by place."""
    return {tuple(re.findall(r"\d+", p.name)[0] for p in places) for places in group.parameters}


@pytest.mark.parametrize(
    ("build", "prefix", "each", "layers"),
    [
        (bert, "encoder.layer", 16, 2),
        (bert, "encoder.layer", 16, 12),
        (gpt2, "transformer.h", 12, 2),
        (gpt2, "transformer.h", 12, 12),
        (vit, "layers", 16, 2),
        (vit, "layers", 16, 12),
        (llama, "model.layers", 9, 2),
        (llama, "model.layers", 9, 4),
    ],
)
def test_the_layers_of_a_transformer_are_found_exactly(build, prefix, each, layers) -> None:
    graph = program(build, layers).graph
    truth: dict[int, set[Node]] = {}
    for node in graph.nodes:
        if (layer := layer_of(node, prefix)) is not None and node.users:
            truth.setdefault(layer, set()).add(node)
    assert len(truth) == layers
    (group,) = find_blocks(without_paths(graph))
    found = [{n for n in region.nodes if n.users} for region in group.instances]
    assert found == [truth[i] for i in range(layers)]
    assert all(len(region.outputs) == 1 for region in group.instances)
    assert len(group.parameters) == each
    for places in group.parameters:
        stems = {re.sub(r"\d+", "#", p.name, count=1) for p in places}
        assert len(stems) == 1
    assert numbers(group) == {tuple(map(str, range(layers)))}


@pytest.mark.parametrize("layers", [2, 4])
def test_encoder_and_decoder_layers_are_separate_groups(layers) -> None:
    """The first layers also compute the position bias that the others reuse."""
    graph = without_paths(program(t5, layers).graph)
    decoder, encoder = find_blocks(graph)
    for group, stack, each in ((decoder, "decoder", 13), (encoder, "encoder", 8)):
        assert len(group.instances) == layers
        assert len(group.parameters) == each
        assert all(p.name.startswith(f"p_{stack}") for places in group.parameters for p in places)
        assert numbers(group) == {tuple(map(str, range(layers)))}


@pytest.mark.parametrize("depth", [2, 4])
def test_residual_stages(depth) -> None:
    """The first block of the later stages is strided and stays outside."""
    graph = without_paths(program(resnet, depth).graph)
    groups = find_blocks(graph)
    sizes = [len(group.instances) for group in groups]
    assert sizes == [depth, *([depth - 1] * 2 if depth > 2 else [])]
    for group in groups:
        for region in group.instances:
            first, last = region.order[0].target, region.order[-1].target
            assert (first, last) == (torch.ops.aten.conv2d.default, torch.ops.aten.relu.default)
        assert len(group.parameters) == 10


def check(graph: Graph, groups: list[BlockGroup]) -> None:
    """What every answer has to satisfy, by networkx's own isomorphism search (VF2)."""
    view = flow(graph)
    seen: set[Node] = set()
    for group in groups:
        first = group.instances[0]
        for region, mapping in zip(group.instances, group.correspondence, strict=True):
            assert region.is_convex(view)
            assert len(region.inputs) == len(first.inputs)
            assert not seen & region.nodes
            seen |= region.nodes
            assert set(mapping) == region.nodes and set(mapping.values()) == first.nodes
            for a, b, positions in view.subgraph(region.nodes).edges(data="positions"):
                assert view.edges[mapping[a], mapping[b]]["positions"] == positions
            assert nx.is_isomorphic(
                _labelled(graph, region.nodes),
                _labelled(graph, first.nodes),
                node_match=lambda a, b: a == b,
                edge_match=lambda a, b: a == b,
            )


def _labelled(graph: Graph, nodes: frozenset[Node]) -> nx.DiGraph:
    part = nx.DiGraph(flow(graph).subgraph(nodes))
    for node in part:
        literals = [leaf for leaf in leaves(node) if not isinstance(leaf, Node)]
        shape = tree_map_only(Tensor, lambda t: (t.shape, t.dtype), node.meta.get("val"))
        part.nodes[node]["is"] = node.target, literals, shape
    return part


@pytest.mark.parametrize("build", [bert, gpt2, llama, t5, resnet])
def test_groups_are_isomorphic_disjoint_and_convex(build) -> None:
    graph = program(build, 4).graph
    groups = find_blocks(graph)
    assert {len(group.instances) for group in groups} == ({4, 3} if build is resnet else {4})
    check(graph, groups)


@torch.no_grad()
@pytest.mark.parametrize("build", [bert, llama, resnet])
def test_any_block_computes_the_first_one_with_its_inputs(build) -> None:
    for group in find_blocks(program(build, 4).graph):
        first, *others = group.instances
        given = [torch.rand_like(_real(node)) for node in first.inputs]
        expected = extract(first)(*given)
        for region in others:
            assert [_real(n).shape for n in region.inputs] == [g.shape for g in given]
            results = extract(region)(*given)
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def _real(node: Node) -> Tensor:
    val = node.meta["val"]
    floating = val.dtype if val.dtype.is_floating_point else torch.float32
    return torch.empty(val.shape, dtype=floating)


@pytest.mark.parametrize("build", [llama, t5, resnet])
def test_the_order_of_the_program_does_not_matter(build) -> None:
    graph = without_paths(program(build, 4).graph)
    expected = {frozenset(n.name for n in r.nodes) for g in find_blocks(graph) for r in g.instances}
    shuffled = _shuffled(graph, random.Random(1))
    found = {frozenset(n.name for n in r.nodes) for g in find_blocks(shuffled) for r in g.instances}
    assert found == expected


def _shuffled(graph: Graph, draw: random.Random) -> Graph:
    """The same program in another topological order, inputs first."""
    rank = {n: (n.op != "placeholder", draw.random()) for n in graph.nodes}
    copy, copies = Graph(), {}
    for node in nx.lexicographical_topological_sort(flow(graph), key=rank.__getitem__):
        if node.op != "output":
            copies[node] = copy.node_copy(node, copies.__getitem__)
    copy.output(tuple(copies[n] for n in graph.output_node().args[0]))
    return copy


class Mixer(nn.Module):
    """One kind of layer: normalise, project, act, add."""

    def __init__(self, act: Any) -> None:
        super().__init__()
        self.norm, self.project, self.act = nn.LayerNorm(8), nn.Linear(8, 8), act

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.project(self.norm(x))) * 0.5


class Alternating(nn.Module):
    """Layers of kinds given by a string, each letter a kind."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        acts = {"a": torch.relu, "b": torch.tanh}
        self.layers = nn.Sequential(*(Mixer(acts[kind]) for kind in kinds))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.parametrize("paths", [True, False])
def test_alternating_kinds_of_layers_become_one_group_each(paths) -> None:
    graph = graph_of(capture(Alternating("aaabaaabaaab"), torch.rand(2, 8))).graph
    groups = find_blocks(graph if paths else without_paths(graph))
    assert sorted((len(g.instances), len(g.instances[0].nodes)) for g in groups) == [(3, 5), (9, 5)]
    check(graph, groups)
    several = max(groups, key=lambda g: len(g.instances))
    assert numbers(several) == {(*"0124568", "9", "10")}


def test_a_layer_that_reads_one_value_twice_is_not_like_one_that_reads_two() -> None:
    """Every layer also reads the first input, which to the first layer is the stream itself."""

    class Anchored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Mixer(torch.relu) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            stream = x.sin()
            start = stream
            for layer in self.layers:
                stream = layer(stream) + start
            return stream

    graph = graph_of(capture(Anchored(), torch.rand(2, 8))).graph
    (group,) = find_blocks(graph)
    assert numbers(group) == {("1", "2", "3")}
    check(graph, [group])


@pytest.mark.parametrize(("paths", "first"), [(True, "layer_norm"), (False, "linear")])
def test_module_paths_settle_where_a_block_begins(paths, first) -> None:
    """In a plain chain with a norm behind the last layer every cut is as narrow as any other."""
    layers = (
        nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
        for _ in range(3)
    )
    graph = graph_of(capture(nn.Sequential(*layers, nn.LayerNorm(8)), torch.rand(2, 8))).graph
    (group,) = find_blocks(graph if paths else without_paths(graph))
    assert [region.order[0].name.rstrip("_0123456789") for region in group.instances] == [first] * 3


def test_a_single_layer_and_parallel_branches_are_no_blocks() -> None:
    assert find_blocks(program(llama, 1).graph) == []
    single = graph_of(capture(Alternating("a"), torch.rand(2, 8))).graph
    assert find_blocks(single, min_nodes=1) == []


def test_the_least_size_is_respected() -> None:
    stack = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.ReLU())))
    graph = graph_of(capture(stack, torch.rand(2, 8)))
    assert find_blocks(graph.graph) == []
    (group,) = find_blocks(graph.graph, min_nodes=2)
    assert [n.name for n in group.instances[0].order] == ["linear", "relu"]
    assert len(group.instances) == 4 and len(group.parameters) == 2


def test_another_literal_or_shape_makes_another_layer() -> None:
    """Scaling by the layer's number is not the same function."""

    class Scaled(nn.Module):
        def __init__(self, scales: list[float]) -> None:
            super().__init__()
            self.scales = scales
            self.layers = nn.ModuleList(Mixer(torch.relu) for _ in scales)

        def forward(self, x: Tensor) -> Tensor:
            for layer, scale in zip(self.layers, self.scales, strict=True):
                x = x + layer(x) * scale
            return x

    same = graph_of(capture(Scaled([0.5, 0.5, 0.5]), torch.rand(2, 8))).graph
    assert [len(g.instances) for g in find_blocks(same)] == [3]
    other = graph_of(capture(Scaled([0.5, 0.25, 0.125]), torch.rand(2, 8))).graph
    groups = find_blocks(other)
    check(other, groups)
    multiplied = {
        n.args[1] for g in groups for r in g.instances for n in r.nodes if "mul" in n.name
    }
    assert multiplied <= {0.5}


def test_layers_with_masks_of_their_own_are_found() -> None:
    """Layers look through a window and at everything in turn; the masks are not corresponding."""
    config = transformers.Gemma2Config(
        vocab_size=61,
        num_hidden_layers=2,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        use_cache=False,
        **TEXT,
    )
    found = capture(transformers.Gemma2ForCausalLM(config), input_ids=ids())
    graph = without_paths(graph_of(found).graph)
    (group,) = find_blocks(graph)
    assert len(group.instances) == 2 and len(group.parameters) == 11
    check(graph, [group])


def test_layers_that_share_their_weights_are_blocks_with_shared_parameters() -> None:
    layer = Mixer(torch.relu)
    graph = graph_of(capture(nn.Sequential(layer, layer, layer), torch.rand(2, 8))).graph
    (group,) = find_blocks(graph)
    assert len(group.instances) == 3 and len(group.parameters) == 4
    assert all(len(set(places)) == 1 for places in group.parameters)


def test_albert_runs_one_layer_many_times() -> None:
    config = transformers.AlbertConfig(
        vocab_size=61,
        embedding_size=16,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    found = capture(transformers.AlbertModel(config), input_ids=ids())
    (group,) = find_blocks(graph_of(found).graph)
    assert len(group.instances) == 3
    assert all(len(set(places)) == 1 for places in group.parameters)


def test_steps_that_read_no_parameters_are_no_blocks() -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(4):
                x = torch.sin(torch.relu(torch.tanh(x) * 2) + x)
            return x

    assert find_blocks(graph_of(capture(Steps(), torch.rand(3))).graph, min_nodes=3) == []


def deepen(graph: Graph, group: BlockGroup, times: int) -> None:
    """Put copies of the first block behind the last, with parameters of their own."""
    first, last = group.instances[0], group.instances[-1]
    parameters = {places[0] for places in group.parameters}
    (stream,) = last.outputs
    body = extract(first).graph
    ending = [user for user in stream.users if user not in last.nodes]
    for copy in range(times):
        copies = dict(zip(body.find_nodes(op="placeholder"), first.inputs, strict=True))
        for inner, outer in copies.items():
            if outer in parameters:
                with graph.inserting_before(next(iter(graph.nodes))):
                    copies[inner] = graph.placeholder(f"{outer.name}_{copy}")
                copies[inner].meta = dict(outer.meta)
            elif outer is first.inputs[0]:
                copies[inner] = stream
        with graph.inserting_before(min(ending)):
            (stream,) = graph.graph_copy(body, copies)
    for node in ending:
        node.replace_input_with(last.outputs[0], stream)


def test_ten_times_as_deep_takes_about_ten_times_the_work() -> None:
    calls = {}
    for layers in (12, 120):
        graph = without_paths(program(llama, 2).graph)
        (group,) = find_blocks(graph)
        deepen(graph, group, layers - 2)
        graph.lint()
        (found,), calls[layers] = counted(lambda graph=graph: find_blocks(graph))
        assert len(found.instances) == layers
    assert len(graph.nodes) > 6000
    assert calls[120] < 15 * calls[12]
