"""Costs against torch's own counter on real models, and against arithmetic on single calls."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from analysis_models import (
    bert,
    capture,
    exported,
    gpt2,
    graph_of,
    inputs_of,
    llama,
    resnet,
    t5,
    vit,
)
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from graphopt.analysis import roofline as roofline_module
from graphopt.analysis.cost import (
    Cost,
    Roofline,
    compute_dtype,
    estimate_seconds,
    hint,
    measure_roofline,
    node_cost,
    program_cost,
)
from graphopt.analysis.flops import UNBACKED, operator
from graphopt.analysis.flow import flow
from graphopt.analysis.regions import partition
from graphopt.analysis.splice import extract, replace_region

aten = torch.ops.aten
PRODUCTS = {"linear", "matmul", "conv2d", "addmm", "scaled_dot_product_attention"}


def call(target: Any, *args: Any, **kwargs: Any) -> Node:
    """A node that calls ``target`` on tensors of which only the shape, stride and dtype count."""
    graph = Graph()

    def node(value: Any) -> Any:
        if isinstance(value, Tensor):
            made = graph.placeholder("x")
            made.meta["val"] = value
            return made
        return [node(item) for item in value] if isinstance(value, list) else value

    called = graph.call_function(target, tuple(map(node, args)), kwargs)
    called.meta["val"] = target(*args, **kwargs)
    return called


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


INDEX = meta(6, dtype=torch.int64)


@torch.no_grad()
@pytest.mark.parametrize("build", [bert, gpt2, llama, vit, t5, resnet])
def test_products_count_what_torch_counts_in_eager_mode(build) -> None:
    program, user = exported(build)
    model, names = build(2).eval(), ("input_ids", "decoder_input_ids")
    given = dict(zip(names, user, strict=False)) if build is t5 else user
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**given) if build is t5 else model(*given)
    costs = program_cost(program.graph).nodes
    counted = sum(c.flops for n, c in costs.items() if operator(n) in PRODUCTS)
    assert counted == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("target", "args", "flops"),
    [
        (aten.linear.default, (meta(2, 3, 4), meta(5, 4), meta(5)), 2 * 2 * 3 * 4 * 5),
        (aten.matmul.default, (meta(2, 3, 4), meta(4, 5)), 2 * 2 * 3 * 4 * 5),
        (aten.matmul.default, (meta(3, 4), meta(4)), 2 * 3 * 4),
        (aten.mv.default, (meta(3, 4), meta(4)), 2 * 3 * 4),
        (aten.dot.default, (meta(4), meta(4)), 2 * 4),
        (aten.addmv.default, (meta(3), meta(3, 4), meta(4)), 2 * 3 * 4),
        (aten.einsum.default, ("bij,bjk->bik", [meta(2, 3, 4), meta(2, 4, 5)]), 2 * 120),
        (aten.conv2d.default, (meta(2, 3, 8, 8), meta(6, 3, 3, 3)), 2 * 2 * 6 * 36 * 27),
        (aten.conv1d.default, (meta(2, 4, 9), meta(4, 1, 3), None, [1], [0], [1], 4), 2 * 168),
        (aten._softmax.default, (meta(3, 4), 1, False), 5 * 12),
        (aten.layer_norm.default, (meta(3, 4), [4], meta(4), meta(4)), 7 * 12),
        (aten.add.Tensor, (meta(3, 1), meta(1, 4)), 12),
        (aten.sum.dim_IntList, (meta(3, 4), [1]), 12),
        (aten.gelu.default, (meta(3, 4),), 12),
        (aten.cat.default, ([meta(3, 4), meta(3, 4)],), 0),
        (aten.embedding.default, (meta(50, 4), meta(3, dtype=torch.int64)), 0),
        (aten.view.default, (meta(3, 4), [12]), 0),
    ],
)
def test_operations_of_single_calls(target, args, flops) -> None:
    assert node_cost(call(target, *args)).flops == flops


@pytest.mark.parametrize("heads", [4, 2])
def test_attention_is_two_products_also_with_grouped_heads(heads) -> None:
    q, kv = meta(2, 4, 7, 8), meta(2, heads, 9, 8)
    sdpa = aten.scaled_dot_product_attention.default
    assert node_cost(call(sdpa, q, kv, kv, enable_gqa=heads < 4)).flops == 2 * 2 * (
        2 * 4 * 7 * 9 * 8
    )


def test_an_integer_product_counts() -> None:
    node = call(aten._int_mm.default, meta(32, 16, dtype=torch.int8), meta(16, 8, dtype=torch.int8))
    assert node_cost(node) == Cost(2 * 32 * 16 * 8, 32 * 16 + 16 * 8, 32 * 8 * 4)


def test_broadcast_inputs_are_read_once_and_results_written_whole() -> None:
    node = call(aten.add.Tensor, meta(3, 1).expand(3, 1000), meta(1, 1000))
    assert node_cost(node) == Cost(3000, (3 + 1000) * 4, 3000 * 4)
    twice = call(aten.mul.Tensor, meta(5), meta(5))
    twice.args = (twice.args[0], twice.args[0])
    assert node_cost(twice).bytes_read == 5 * 4


@pytest.mark.parametrize(
    ("target", "args", "read"),
    [
        (aten.embedding.default, (meta(50000, 8), INDEX), 6 * 8 * 4 + 6 * 8),
        (aten.embedding.default, (meta(2, 8), INDEX), 2 * 8 * 4 + 6 * 8),
        (aten.index_select.default, (meta(500, 8), 0, INDEX), 6 * 8 * 4 + 6 * 8),
    ],
)
def test_a_table_is_read_only_where_it_is_looked_up(target, args, read) -> None:
    assert node_cost(call(target, *args)) == Cost(0, read, 6 * 8 * 4)


def test_views_are_free_and_copies_are_not() -> None:
    square = meta(4, 6)
    free = [
        call(aten.transpose.int, square, 0, 1),
        call(aten.reshape.default, square, [24]),
        call(aten.contiguous.default, square),
        call(aten.expand.default, meta(1, 6), [4, 6]),
        call(aten.split.Tensor, square, 2),
        call(aten.dropout.default, square, 0.1, False),
    ]
    assert [node_cost(node) for node in free] == [Cost()] * len(free)
    copies = [
        call(aten.reshape.default, square.t(), [24]),
        call(aten.contiguous.default, square.t()),
        call(aten.clone.default, square),
        call(aten.flatten.using_ints, square.t()),
    ]
    assert [node_cost(node) for node in copies] == [Cost(0, 96, 96)] * len(copies)
    assert node_cost(call(aten.to.dtype, square, torch.float16)) == Cost(0, 96, 48)
    assert node_cost(call(aten.empty_like.default, square)).bytes_written == 0


def test_items_of_a_tuple_are_free_and_the_tuple_is_not() -> None:
    program = capture(_Halves(), torch.rand(4, 8))
    costs = {n.name: c for n, c in program_cost(program.graph).nodes.items()}
    assert costs["topk"].bytes_written == 4 * 3 * (4 + 8)
    assert costs["getitem"] == Cost()


class _Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.topk(3).values


def test_live_memory_by_hand() -> None:
    """exp is dead once doubled; the transposed view keeps its base alive to the end."""

    class Steps(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = x.exp()
            b = a * 2
            c = b.t()
            d = b.sum()
            return d + 1, c.relu()

    found = program_cost(capture(Steps(), torch.rand(100, 10)).graph)
    assert found.held_bytes == 4000
    assert found.peak_bytes == 8000 + 4
    assert found.peak_node is not None and found.peak_node.name == "relu"
    assert found.total == sum(found.nodes.values(), Cost())


def test_peak_memory_agrees_with_running_the_program() -> None:
    """Results counted alive at each node, by storage, while the program runs."""
    program, user = exported(resnet)
    module = graph_of(program)
    values = inputs_of(program, *user)
    held = {v.untyped_storage().data_ptr() for v in values}
    watch = _Watch(module, held)
    with torch.no_grad():
        watch.run(*values)
    assert program_cost(module.graph).peak_bytes == watch.peak


class _Watch(Interpreter):
    """Runs a module, freeing values after their last use, and notes the most memory alive."""

    def __init__(self, module: GraphModule, held: set[int]) -> None:
        super().__init__(module)
        self.held, self.peak = held, 0

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        alive = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in tree_leaves([list(self.env.values()), made])
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.held
        }
        self.peak = max(self.peak, sum(alive.values()))
        return made


def test_symbolic_sizes_count_as_seen_or_as_given() -> None:
    fixed = program_cost(exported(llama)[0].graph)
    graph = exported(llama, dynamic=True)[0].graph
    assert program_cost(graph).total == fixed.total
    (ids,) = (n for n in graph.nodes if n.name == "input_ids")
    batch, length = (str(s) for s in ids.meta["val"].shape)
    doubled = program_cost(graph, {batch: 4})
    mine = next(n for n in graph.nodes if n.target is aten.linear.default)
    assert doubled.nodes[mine].flops == 2 * node_cost(mine).flops
    sdpa = next(n for n in graph.nodes if "dot_product" in n.name)
    assert node_cost(sdpa, {length: 70}).flops == 100 * node_cost(sdpa).flops
    assert doubled.peak_bytes > fixed.peak_bytes


def test_sizes_that_the_data_decides_have_a_stand_in() -> None:
    class Found(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.nonzero()[:, 0], torch.arange(x.shape[0])]) * 2

    free = ({0: Dim.DYNAMIC},)
    graph = capture(Found(), torch.rand(5), dynamic=free).graph
    doubled = next(n for n in graph.nodes if n.target is aten.mul.Tensor)
    size = doubled.meta["val"].shape[0]
    assert hint(size) == UNBACKED + 5 == node_cost(doubled).flops
    (unbacked,) = (str(s) for s in size.node.expr.free_symbols if str(s).startswith("u"))
    assert hint(size, {unbacked: 3}) == 8
    assert hint(7) == 7


def test_calls_of_graphs_cost_what_is_in_them() -> None:
    graph = graph_of(exported(bert)[0]).graph
    whole = program_cost(graph)
    (region,) = partition(flow(graph), lambda n: True)
    replace_region(graph, region, extract(region), inline=False)
    assert program_cost(graph).total == whole.total


def test_the_dearest_branch_of_a_conditional_counts() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda t: t @ t, lambda t: t + 1, (x,))

    graph = torch.export.export(Branch(), (torch.rand(8, 8),), strict=False).graph
    (branch,) = (n for n in graph.nodes if "cond" in str(n.target))
    assert node_cost(branch).flops == 2 * 8**3


ROOF = Roofline({"float32": 100.0, "bfloat16": 400.0}, bytes_per_s=10.0, launch_s=0.5)


def test_seconds_are_the_longer_of_computing_and_moving_and_a_launch() -> None:
    assert estimate_seconds(Cost(1000, 10, 10), ROOF) == 10 + 0.5
    assert estimate_seconds(Cost(1000, 10, 10), ROOF, torch.bfloat16) == 2.5 + 0.5
    assert estimate_seconds(Cost(1000, 300, 200), ROOF) == 50 + 0.5
    assert estimate_seconds(Cost(1000, 10, 10), ROOF, torch.float64) == 10 + 0.5
    assert estimate_seconds(Cost(), ROOF) == 0


def test_a_program_takes_the_sum_of_its_nodes_in_their_dtypes() -> None:
    half = call(aten.mm.default, *[meta(4, 4, dtype=torch.bfloat16)] * 2)
    assert compute_dtype(half) is torch.bfloat16
    index = call(aten.embedding.default, meta(9, 4), meta(3, dtype=torch.int64))
    assert compute_dtype(index) is torch.float32
    found = program_cost(half.graph)
    assert found.seconds(ROOF) == estimate_seconds(found.total, ROOF, torch.bfloat16)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Counts measurements, and replaces them."""
    calls: list[torch.device] = []

    def measure(device: torch.device) -> Roofline:
        calls.append(device)
        return ROOF

    monkeypatch.setattr(roofline_module, "_measure", measure)
    return calls


def test_a_roofline_is_measured_once(tmp_path: Path, slow: list[torch.device]) -> None:
    path = tmp_path / "cache" / "roofline.json"
    assert [measure_roofline(path=path) for _ in range(3)] == [ROOF] * 3
    assert len(slow) == 1
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    measure_roofline(path=path, refresh=True)
    assert len(slow) == 2
    (key,) = json.loads(path.read_text())
    assert torch.__version__ in key and f"{torch.get_num_threads()} threads" in key


def test_other_threads_are_another_entry(tmp_path: Path, slow, monkeypatch) -> None:
    path = tmp_path / "roofline.json"
    measure_roofline(path=path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    measure_roofline(path=path)
    assert len(slow) == 2 and len(json.loads(path.read_text())) == 2


@pytest.mark.parametrize("text", ["", "{", "[]", '{"KEY": 3}', '{"KEY": {"flops_per_s": {}}}'])
def test_a_damaged_cache_is_measured_again(tmp_path: Path, slow, text: str) -> None:
    path = tmp_path / "roofline.json"
    path.write_text(text.replace("KEY", roofline_module._key(torch.device("cpu"))))
    assert measure_roofline(path=path) == ROOF
    assert measure_roofline(path=path) == ROOF
    assert len(slow) == 1


def test_the_cache_is_the_users_own_by_default(tmp_path: Path, slow, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure_roofline()
    assert (tmp_path / "graphopt" / "roofline.json").exists()


def test_this_machine_has_a_plausible_roofline(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(roofline_module, "LARGEST", 512)
    monkeypatch.setattr(roofline_module, "COPIED", 2**22)
    found = measure_roofline(path=tmp_path / "roofline.json")
    assert 1e8 < found.rate() < 1e16
    assert 1e7 < found.bytes_per_s < 1e14
    assert 1e-8 < found.launch_s < 1e-2
    assert measure_roofline(path=tmp_path / "roofline.json") == found
