"""Activation checkpointing in Dynamo graphs: rewritten inside, recomputed in backward."""

from __future__ import annotations

import copy
import operator
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import graphopt
from graphopt import backend as backend_module
from graphopt.backend import Backend
from graphopt.errors import CaptureError
from graphopt.program import REGIONS
from graphopt.recipe import Options
from graphopt.recompute import Region, inlined, regrouped, runnable, take_regions

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

aten = torch.ops.aten
again = partial(checkpoint, use_reentrant=False)


class Net(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.function = function

    def block(self, x):
        return x + torch.sigmoid(self.b(F.gelu(self.a(self.norm(x)))))

    def forward(self, x):
        return self.function(self, x)


def one(m, x):
    return again(m.block, x)


def layers(m, x):
    for _ in range(3):
        x = again(m.block, x)
    return x.sin()


def reentrant(m, x):
    return checkpoint(m.block, x.sin(), use_reentrant=True)


def nested(m, x):
    return again(lambda y: again(m.block, y.tanh()).exp(), x)


def several_results(m, x):
    y, z, n = again(lambda v, k: (m.block(v), v * k, v.shape[0]), x, 3.0)
    return y * z + n


def without_gradients_inside(m, x):
    def part(y):
        with torch.no_grad():
            scale = m.a(y).abs().mean()
        return m.block(y) / scale

    return again(part, x)


def constants(m, x):
    wide = x * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    return again(lambda y: m.block(y) * torch.linspace(0, 1, 8), wide) + torch.tensor(2.0)


def in_place_inside(m, x):
    return again(lambda y: torch.relu_(m.a(y)).add_(1), x)


def save_products(ctx, op, *args, **kwargs):
    products = (aten.mm.default, aten.addmm.default, aten.linear.default)
    return CheckpointPolicy.MUST_SAVE if op in products else CheckpointPolicy.PREFER_RECOMPUTE


def selective(m, x):
    contexts = partial(create_selective_checkpoint_contexts, save_products)
    return again(m.block, x, context_fn=contexts)


FORMS = [
    one, layers, reentrant, nested, several_results, without_gradients_inside, in_place_inside,
    selective, constants,
]  # fmt: skip


def trained(net, x):
    x = x.detach().clone().requires_grad_()
    out = net(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in net.parameters())]


def assert_same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("target", ["torch", "inductor"])
@pytest.mark.parametrize("function", FORMS)
def test_regions_train_as_in_eager_mode(function, target):
    net = Net(function)
    twin, x = copy.deepcopy(net), torch.randn(6, 8)
    backend = Backend(Options(target=target, strict=True))
    compiled = torch.compile(twin, backend=backend)
    assert_same(trained(compiled, x), trained(net, x))
    assert [r.notes for r in backend.reports if "left" in str(r.notes)] == []


def saved_bytes(net, x):
    """What autograd keeps at the end of a forward pass, beside parameters and inputs."""
    kept = {}
    parameters = {p.data_ptr() for p in net.parameters()} | {x.data_ptr()}

    def note(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        net(x)
    return sum(t.nbytes for t in kept.values())


def test_less_is_kept_for_backward():
    class Deep(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.net, self.call = Net(None), call

        def forward(self, x):
            for _ in range(4):
                x = self.call(self.net.block, x)
            return x

    x = torch.randn(512, 8)
    kept = {}
    for name, call in {"all": lambda f, y: f(y), "inputs": again}.items():
        net = Deep(call)
        compiled = torch.compile(net, backend=Backend(Options(strict=True)))
        compiled(x)
        kept[name] = saved_bytes(compiled, x)
    assert kept["inputs"] <= 4 * x.nbytes < kept["all"] / 2


@pytest.mark.parametrize("refused", [False, True])
def test_a_dropout_draws_the_same_mask_again(refused, monkeypatch):
    """Torch's own eager backend draws another one."""
    if refused:

        def refuse(*_args):
            raise CaptureError("not this one")

        monkeypatch.setattr(backend_module, "program_from_dynamo", refuse)
    net = Net(lambda m, x: again(lambda y: F.dropout(y, 0.5, training=True).sin(), x))
    x = torch.ones(1000, requires_grad=True)
    backend = Backend()
    out = torch.compile(net, backend=backend)(x)
    out.sum().backward()
    mask = (out != 0).float()
    torch.testing.assert_close(x.grad, 2 * mask * torch.cos(2 * mask))
    assert ("left as it is" in str(backend.reports[0].notes)) is refused


class Head(nn.Module):
    def __init__(self, vocabulary=8000):
        super().__init__()
        self.body, self.head = nn.Linear(32, 32), nn.Linear(32, vocabulary, bias=False)

    def loss(self, h, target):
        return F.cross_entropy(self.head(self.body(h).tanh()), target)

    def forward(self, h, target):
        return again(self.loss, h, target)


def test_a_loss_head_inside_is_fused_and_kept():
    """Its products are not taken again in backward: there are no logits to save."""
    net, h, target = Head(), torch.randn(64, 32), torch.randint(8000, (64,))
    twin = copy.deepcopy(net)
    backend = Backend(Options(strict=True))
    compiled = torch.compile(twin, backend=backend)

    compiled(h, target)
    with profile() as profiled:
        loss = compiled(h, target)
        loss.backward()
    wanted = net(h, target)
    wanted.backward()
    torch.testing.assert_close(loss, wanted)
    assert_same([p.grad for p in twin.parameters()], [p.grad for p in net.parameters()])
    (report,) = backend.reports
    assert "FuseRowSummaries" in [a.rule for a in report.applied]
    calls = {event.key: event.count for event in profiled.key_averages()}
    assert calls["graphopt::chunked_rows_with_gradients"] == 1
    assert calls["aten::tanh"] == 2, "the rest of the region is recomputed"


def test_layers_of_hugging_face_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=4000, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    twin, ids = copy.deepcopy(model), torch.randint(4000, (2, 33))
    fast = graphopt.compile(twin, passes=["exact"])
    losses = [m(input_ids=ids, labels=ids).loss for m in (model, fast)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0])
    for found, wanted in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-4, atol=1e-6)
    rules = [a.rule for r in fast.reports for a in r.applied]
    assert "left as it is" not in str([r.notes for r in fast.reports])
    assert any("Attention" in rule or "RMS" in rule or "Rms" in rule for rule in rules), rules


@pytest.mark.parametrize("reentrant", [False, True])
def test_exported_graphs_say_that_they_keep_activations(reentrant):
    net = Net(lambda m, x: checkpoint(m.block, x, use_reentrant=reentrant)).train()
    x = torch.randn(6, 8, requires_grad=True)
    fast = graphopt.compile(net, example_inputs=(x,), passes="exact")
    assert any("activations are kept" in note for note in fast.report.notes)
    plain = graphopt.compile(Net(Net.block).train(), example_inputs=(x,), passes="exact")
    assert not any("activations are kept" in note for note in plain.report.notes)


# Regrouping.


def crossed():
    """Two regions, each of which reads what the other made first."""
    graph, here, there = fx.Graph(), Region({}, None), Region({}, None)
    x = graph.placeholder("x")

    def node(region, *args):
        made = graph.call_function(torch.add, args)
        made.meta["val"] = torch.empty(3)
        if region is not None:
            made.meta[REGIONS] = (region,)
        return made

    a = node(here, x, x)
    b = node(there, x, 1)
    outside = node(None, a, b)
    c = node(here, a, b)
    d = node(there, b, a)
    e = node(here, outside, c)
    f = node(there, d, e)
    graph.output((e, f, outside))
    return fx.GraphModule(nn.Module(), graph)


def test_regions_that_read_each_other_come_apart():
    module, x = crossed(), torch.randn(3)
    made = regrouped(module)
    calls = made.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
    )
    inside = [len(list(getattr(made, c.args[0].target).graph.nodes)) for c in calls]
    assert len(calls) >= 3, "one unit of each would depend on the other"
    assert sum(inside) > len(calls), inside
    for found, wanted in zip(runnable(made)(x), module(x), strict=True):
        assert torch.equal(found, wanted)


def test_graphs_without_regions_stay_what_they_are():
    module = fx.symbolic_trace(nn.Linear(2, 2))
    assert regrouped(module) is module
    assert runnable(module) is module


def holding(value):
    root = nn.Module()
    root.held = torch.full((3,), value)
    return root


def test_what_graphs_hold_goes_along():
    inner = fx.Graph()
    y = inner.placeholder("y")
    inner.output((inner.call_function(torch.mul, (y, inner.get_attr("held"))),))
    root = holding(2.0)
    root.body = fx.GraphModule(holding(3.0), inner)
    outer = fx.Graph()
    x = outer.placeholder("x")
    shifted = outer.call_function(torch.add, (x, outer.get_attr("held")))
    call = outer.call_function(
        torch.ops.higher_order.tag_activation_checkpoint, (outer.get_attr("body"), shifted), {}
    )
    outer.output((outer.call_function(operator.getitem, (call, 0)),))
    module, given = fx.GraphModule(root, outer), torch.randn(3)
    flat = inlined(module)
    assert not flat.graph.find_nodes(
        op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint
    )
    for made in (flat, runnable(module)):
        assert torch.equal(made(given)[0], (given + 2) * 3)
    take_regions(flat.graph)
    for node in flat.graph.nodes:
        node.meta["val"] = given
    again_grouped = regrouped(flat)
    assert again_grouped is not flat
    assert torch.equal(runnable(again_grouped)(given)[0], (given + 2) * 3)
