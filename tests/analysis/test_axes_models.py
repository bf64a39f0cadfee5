"""Real architectures: nothing unknown, and one sample of the batch changes its own slices only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from axis_check import differs
from axis_graphs import capture, inputs, result
from counting import counted
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Interpreter, Node
from torch.utils._pytree import tree_leaves

from graphopt.analysis.axes import AxisFlow, index_map, trace_axis

IDS = torch.arange(36).view(3, 12) * 7 % 89 + 2
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "vocab_size": 97, "pad_token_id": 0,
}  # fmt: skip
VISION = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
MASKED = {"input_ids": IDS, "attention_mask": (torch.arange(12) < 9).long().expand(3, 12).clone()}
LABELLED = {"input_ids": IDS, "labels": IDS + 0, "use_cache": False}
GPT2 = hf.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=97, pad_token_id=0)
T5 = hf.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=97)
T5.decoder_start_token_id = 0
EXPERTS = {"num_key_value_heads": 2, "num_local_experts": 4}

MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "bert": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT)), MASKED),
    "gpt2 classifier": (lambda: hf.GPT2ForSequenceClassification(GPT2),
                        {"input_ids": IDS, "use_cache": False}),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_key_value_heads=2)), LABELLED),
    "t5": (lambda: hf.T5ForConditionalGeneration(T5), LABELLED),
    "vit": (lambda: hf.ViTForImageClassification(hf.ViTConfig(**VISION)), {"pixel_values": PIXELS}),
    "convnext": (lambda: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)),
        {"pixel_values": PIXELS}),
    "resnet": (lambda: hf.ResNetForImageClassification(
        hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
        {"pixel_values": PIXELS}),
    "swin": (lambda: hf.SwinForImageClassification(
        hf.SwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 2], num_heads=[2, 4],
                      window_size=4)), {"pixel_values": PIXELS}),
    "mixtral": (lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, **EXPERTS)),
                {"input_ids": IDS, "use_cache": False}),
    "mamba": (lambda: hf.MambaForCausalLM(
        hf.MambaConfig(hidden_size=16, num_hidden_layers=2, vocab_size=97, state_size=4)),
        {"input_ids": IDS, "use_cache": False}),
}  # fmt: skip


class Record(Interpreter):
    """Runs a graph and keeps the value of every node."""

    def run_node(self, n: Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]

    def record(self, args: list[Any]) -> dict[Node, Any]:
        self.values: dict[Node, Any] = {}
        with torch.no_grad():
            self.run(*args, enable_io_processing=False)
        return self.values


def _flat_inputs(program: ExportedProgram, user: dict[str, Any]) -> list[Any]:
    given = iter(tree_leaves(user))
    stored = {**program.state_dict, **program.constants}
    return [
        next(given) if spec.kind is InputKind.USER_INPUT else stored[spec.target]
        for spec in program.graph_signature.input_specs
    ]


@functools.cache
def _capture(name: str) -> tuple[ExportedProgram, dict[str, Any]]:
    build, kwargs = MODELS[name]
    torch.manual_seed(0)
    exported = torch.export.export(build().eval(), (), kwargs, strict=False)
    return exported.run_decompositions({}), kwargs


def _flow(program: ExportedProgram, dim: int) -> AxisFlow:
    names = program.graph_signature.user_inputs
    nodes = {node.name: node for node in program.graph.nodes}
    seeds = [nodes[name] for name in names if name in nodes and nodes[name].meta["val"] is not None]
    first, *rest = [n for n in seeds if isinstance(n.meta["val"], Tensor)]
    return trace_axis(first, dim, dict.fromkeys(rest, dim))


def _changed(value: Any, index: int) -> Any:
    """Other tokens, pixels or mask bits in one sample of the batch."""
    if not isinstance(value, Tensor):
        return value
    top = 0 if value.is_floating_point() else 1 if value.max() <= 1 else 96
    value = value.clone()
    value[index] = top - value[index]
    return value


@pytest.mark.parametrize("name", MODELS)
def test_one_sample_of_the_batch_changes_its_own_slices(name: str) -> None:
    program, kwargs = _capture(name)
    flow = _flow(program, 0)
    assert not flow.unknown
    recorder = Record(program.graph_module)
    before = dict(recorder.record(_flat_inputs(program, kwargs)))
    other = {key: _changed(value, 1) for key, value in kwargs.items()}
    after = recorder.record(_flat_inputs(program, other))
    for node, value in before.items():
        if isinstance(value, Tensor) and node.target is not torch.ops.aten.empty_like.default:
            _assert_contained(flow, node, differs(value, after[node]))
    assert sum(flow.placement(node) is not None for node in before) > 20


def _assert_contained(flow: AxisFlow, node: Node, moved: Tensor) -> None:
    place = flow.placement(node)
    if place is not None:
        inside = index_map(place, moved.dim()) == 1
        assert not (moved & ~inside).any(), f"{node} placed as {place} changed elsewhere"
    elif not flow.depends(node):
        assert not moved.any(), f"{node} is called free of the batch"


@pytest.mark.parametrize("name", ["bert", "vit", "llama", "mamba"])
def test_classifier_or_logits_keep_the_batch_apart(name: str) -> None:
    program, _ = _capture(name)
    flow = _flow(program, 0)
    *_, logits = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
    assert flow.placement(logits).dim == 0
    assert all(mix.kind == "reduce" for mix in flow.mixes.values())  # the loss, if there is one


def test_tokens_meet_in_attention_only() -> None:
    program, _ = _capture("bert")
    flow = _flow(program, 1)
    attention = torch.ops.aten.scaled_dot_product_attention.default
    assert [node.target for node in flow.mixes] == [attention, attention]
    assert all([p.dim for p in flow.places(node)] == [2] for node in flow.mixes)


def test_batch_norm_in_training_mixes_the_batch() -> None:
    build, kwargs = MODELS["resnet"]
    exported = torch.export.export(build().train(), (), kwargs, strict=False)
    flow = _flow(exported.run_decompositions({}), 0)
    assert not flow.unknown
    assert {mix.kind for mix in flow.mixes.values()} == {"normalise"}


def test_dynamic_batch_and_length_stay_known() -> None:
    build, kwargs = MODELS["llama"]
    kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
    shapes = dict.fromkeys(kwargs) | {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    exported = torch.export.export(build().eval(), (), kwargs, dynamic_shapes=shapes, strict=False)
    program = exported.run_decompositions({})
    for dim in (0, 1):
        flow = _flow(program, dim)
        assert not flow.unknown
        *_, logits = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default]
        assert [place.dim for place in flow.places(logits)] == [dim]


def _layer(t: Tensor, w: Tensor) -> Tensor:
    heads = (t @ w).view(*t.shape[:2], 2, 4).transpose(1, 2)
    return t + (heads.softmax(-1).transpose(1, 2).flatten(2) * 2).relu()


def _deep(depth: int, dynamic: Any) -> tuple[Graph, Node]:
    """One captured layer, put after itself ``depth`` times."""
    layer = capture(_layer, torch.randn(3, 5, 8), torch.randn(8, 8), dynamic=dynamic)
    (t, w), deep = inputs(layer), Graph()
    copies = {node: deep.node_copy(node) for node in (t, w)}
    start, here = copies[t], copies[t]
    for _ in range(depth):
        done = deep.graph_copy(layer, {t: here, w: copies[w]})
        here = done[0]  # type: ignore[index]
    deep.output((here,))
    return deep, start


@pytest.mark.parametrize("dynamic", [None, ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, None)])
def test_work_is_linear_in_the_graph(dynamic: Any) -> None:
    calls = {}
    for depth in (30, 300):
        deep, start = _deep(depth, dynamic)
        flow, calls[depth] = counted(lambda start=start: trace_axis(start, 1))
        assert not flow.unknown and not flow.mixes
        assert flow.placement(result(deep)) is not None
    assert len(deep.nodes) > 2500
    assert 8 * calls[30] < calls[300] < 12 * calls[30]
