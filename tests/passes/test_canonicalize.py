"""Canonicalize on whole models, and what it must not do at the border of a program."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.canonicalize.identity import Call
from graphopt.pipeline import Context, run_pass
from graphopt.program import compute_nodes
from graphopt.report.model import Report

aten = torch.ops.aten


def canonicalized(model, args, kwargs=None, *, prove=True, **options):
    program = capture(model, args, kwargs, **options)
    context = Context.of(program, strict=True, measure=False)
    after = run_pass(program, Canonicalize(), context)
    context.report.whole.clear()
    assert not prove or certify(program, after, context, name="whole"), context.report.whole
    return program, after, context.report


def targets(program):
    return collections.Counter(str(n.target) for n in compute_nodes(program.graph))


def of(function, *inputs, training=False, **options):
    return canonicalized(Call(function).train(training), inputs, **options)


NOISE = (
    aten._assert_tensor_metadata.default,
    aten.clone.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.detach.default,
    aten.alias.default,
    aten.index.Tensor,
    aten.addmm.default,
)


def encoder(**options):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2, **options
    )
    return transformers.BertModel(config).eval()


def tokens(batch=2, length=6):
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.arange(batch * length).view(batch, length), "attention_mask": mask}


def test_a_bert_layer_is_left_with_what_it_computes():
    axes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("seq", min=2, max=64)}
    shapes = {"input_ids": axes, "attention_mask": axes}
    model = encoder(num_hidden_layers=2)
    _, after, _ = canonicalized(model, (), tokens(), dynamic_shapes=shapes)
    assert not any(targets(after)[str(op)] for op in NOISE), targets(after)
    layer = {"aten.linear.default": 6, "aten.layer_norm.default": 2, "aten.gelu.default": 1}
    layer |= {"aten.reshape.default": 4, "aten.transpose.int": 4}
    layer |= {"aten.scaled_dot_product_attention.default": 1}
    counted = targets(after)
    outside = {"aten.linear.default": 1, "aten.layer_norm.default": 1}
    for name, count in layer.items():
        assert counted[name] == 2 * count + outside.get(name, 0), name


def test_conv1d_of_gpt2_becomes_linear_on_tokens():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ids = {"input_ids": torch.arange(12).view(2, 6)}
    model = transformers.GPT2LMHeadModel(config).eval()
    before, after, _ = canonicalized(model, (), {**ids, "use_cache": False})
    assert targets(before)["aten.addmm.default"] == 8
    assert targets(after)["aten.linear.default"] == 9
    assert targets(after)["aten.reshape.default"] <= 8
    held = {k: v for k, v in after.state.items() if k.endswith("_folded")}
    assert len(held) == 8
    assert sum(t.numel() for t in after.state.values()) <= sum(
        t.numel() for t in before.state.values()
    )


def test_gpt2_trains_with_transposed_views_and_keeps_its_parameters():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    model = transformers.GPT2LMHeadModel(config).train()
    ids = torch.arange(12).view(2, 6)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    before, after, report = canonicalized(model, (), inputs)
    assert after.state.keys() == before.state.keys()
    assert targets(after)["aten.linear.default"] == 5
    assert all(w.gradient_error is not None for w in report.whole)


def test_an_all_true_mask_leaves_vision_attention():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    _, after, _ = canonicalized(model, (), {"pixel_values": torch.randn(2, 3, 16, 16)})
    (attention,) = after.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert attention.args[3:4] in ((), (None,))
    assert not targets(after)["aten.arange.default"]


def test_an_assert_is_no_user_of_the_logits():
    model = Call(lambda x: (y := x.sin()).float().exp() + y)
    _, after, report = canonicalized(model.eval(), (torch.randn(3),))
    (sine,) = after.graph.find_nodes(op="call_function", target=aten.sin.default)
    assert len(sine.users) == 2
    assert "MetadataAssert" in {a.rule for a in report.applied}


def test_a_reshape_that_copies_for_two_is_not_done_twice():
    _, after, _ = of(lambda x: ((y := x.mT.reshape(32, 6)).view(4, 48) + 1, y + 1),
                     torch.randn(4, 6, 8))  # fmt: skip
    shapes = [n.args[0].op for n in after.graph.find_nodes(
        op="call_function", target=aten.reshape.default)]  # fmt: skip
    copied = [n for n in compute_nodes(after.graph) if n.target is aten.clone.default]
    assert len(copied) + shapes.count("call_function") >= 2


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone(),
        lambda x: x.clone().view(-1),
        lambda x: (x.sin(), x.sin().clone()),
        lambda x: (y := x.sin(), y.clone()),
        lambda x: x * 1,
        lambda x: torch.nn.functional.dropout(x, 0.5, False).clone(),
        lambda x: x.to(x.dtype, copy=True),
    ],
)
def test_what_the_caller_may_write_into_stays_apart(function):
    x = torch.randn(3, 4)
    _, after, _ = of(function, x)
    outputs = after.run([x])
    memory = [o.untyped_storage().data_ptr() for o in (x, *outputs)]
    assert len(set(memory)) == len(memory)


def test_a_buffer_that_is_swapped_keeps_its_copies():
    class Swap(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("a", torch.zeros(3))
            self.register_buffer("b", torch.ones(3))

        def forward(self, x):
            held = self.a.clone()
            self.a.copy_(self.b)
            self.b.copy_(held)
            return x + self.a

    program = capture(Swap().eval(), (torch.randn(3),))
    after = run_pass(program, Canonicalize(), Context.of(program, strict=True, measure=False))
    results = after.run([torch.zeros(3)])
    buffers = {o.target: r for o, r in zip(after.outputs, results, strict=True) if o.target}
    assert torch.equal(buffers["a"], torch.ones(3))
    assert torch.equal(buffers["b"], torch.zeros(3))
    assert buffers["b"].data_ptr() != after.state["a"].data_ptr()


def test_detach_stays_where_a_parameter_may_be_trained_later():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.ones(3), requires_grad=False)

        def forward(self, x):
            return x * self.gate.detach()

    for training, kept in ((True, 1), (False, 0)):
        _, after, _ = canonicalized(Gated().train(training), (torch.randn(2, 3),))
        assert targets(after)["aten.detach.default"] == kept


def test_views_of_weights_stay_views():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.scale = nn.Parameter(torch.randn(8))

        def forward(self, ids):
            hidden = self.embed(ids) * self.scale.view(1, -1) / self.scale.view(-1, 1).mT
            return hidden @ self.embed.weight.t()

    before, after, _ = canonicalized(Tied().eval(), (torch.arange(5),))
    assert after.state.keys() == before.state.keys()
    assert targets(after)["aten.linear.default"] == 1


def test_canonical_is_a_fixpoint():
    program, after, _ = canonicalized(encoder(num_hidden_layers=1), (), tokens())
    context = Context.of(after, strict=True, measure=False)
    again = run_pass(after, Canonicalize(), context)
    assert again is after
    assert context.report.applied == []
    assert len(list(compute_nodes(after.graph))) < len(list(compute_nodes(program.graph)))


def variants():
    """Every example of every rule, once more in other dtypes, layouts and positions."""
    for rule in Canonicalize().rules():
        for example in rule.examples():
            yield pytest.param(example, id=f"{rule.name}-{example.name}")


def strided(value):
    """The same values in memory order of the last two axes swapped."""
    return value.mT.contiguous().mT if value.dim() > 1 else value


@pytest.mark.parametrize("example", variants())
def test_examples_in_other_layouts_and_dtypes(example):
    torch.manual_seed(1)
    module = example.module().train(example.training)
    inputs = example.inputs()
    floating = all(v.dtype == torch.float32 for v in inputs)
    if floating and any(v.dim() > 1 for v in inputs):
        check(module, [strided(v) for v in inputs])
    if floating:
        check(module.double(), [v.double() for v in inputs])


def check(module, inputs):
    """The program before is the judge; a view that these strides do not allow is no example."""
    try:
        module(*inputs)
    except RuntimeError as error:
        if "view size is not compatible" not in str(error):
            raise
        pytest.skip("no view in these strides")
    program = capture(module, tuple(inputs))
    context = Context.of(program, strict=True, measure=False)
    context.report = Report("variant")
    after = run_pass(program, Canonicalize(), context)
    assert certify(program, after, context, name="variant"), context.report.whole
