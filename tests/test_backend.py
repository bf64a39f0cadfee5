"""The Dynamo backend: gradients of eager mode, written buffers, dynamic sizes, graph breaks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backend import Backend
from graphopt.errors import RecipeError
from graphopt.recipe import Options

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Net(nn.Module):
    """Everything that is delicate: statistics, dropout, a counter, a stretch without gradients."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.1)
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        y = self.drop(self.norm(self.conv(x))).mean((2, 3))
        with torch.no_grad():
            target = self.q(y) * 2
        return torch.softmax(self.q(y) * self.k(y), -1) + target


def compare(eager, fast, model, x):
    results = []
    for run in (eager, fast):
        torch.manual_seed(1)
        out = run(x.clone())
        out.square().sum().backward()
        results.append(out.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)
    pairs = zip(eager.named_parameters(), model.named_parameters(), strict=True)
    for (name, a), (_, b) in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    for a, b in zip(eager.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_training_and_evaluation_follow_eager(training):
    model = Net().train(training)
    eager = copy.deepcopy(model)
    backend = Backend(Options(measure=False))
    fast = torch.compile(model, backend=backend)
    for batch in (2, 5, 7):
        compare(eager, fast, model, torch.randn(batch, 3, 8, 8))
    assert backend.reports and all(r.verified for r in backend.reports)
    assert any(a.rule == "MergeSiblings" for r in backend.reports for a in r.applied)


def test_parameters_may_change_after_compilation():
    model = Net().eval()
    fast = torch.compile(model, backend=Backend(Options(measure=False)))
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        fast(x)
        for p in model.parameters():
            p.mul_(1.5)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-6)


def test_by_name_and_with_options():
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(layer, backend="graphopt")(x), layer(x))
    torch._dynamo.reset()
    chosen = {"passes": ["Canonicalize"], "measure": False}
    torch.testing.assert_close(
        torch.compile(layer, backend="graphopt", options=chosen)(x), layer(x)
    )
    torch._dynamo.reset()
    with pytest.raises((RecipeError, torch._dynamo.exc.BackendCompilerFailed), match="pases"):
        torch.compile(layer, backend="graphopt", options={"pases": []})(x)


def test_a_graph_break_is_tolerated():
    def broken(x):
        y = x.sin()
        torch._dynamo.graph_break()
        return y.cos()

    backend = Backend()
    x = torch.randn(4)
    torch.testing.assert_close(torch.compile(broken, backend=backend)(x), broken(x))
    assert len(backend.reports) == 2


def test_compile_without_inputs_goes_through_dynamo():
    model = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
    fast = graphopt.compile(model)
    x = torch.randn(3, 4)
    torch.testing.assert_close(fast(x), model(x))
    assert fast.reports[0].verified


def test_hugging_face_training_and_generation():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    eager = copy.deepcopy(model)
    fast = graphopt.compile(model, measure=False)
    ids = torch.randint(64, (2, 9))
    losses = [m(input_ids=ids, labels=ids).loss for m in (eager, fast)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1])
    for (name, a), (_, b) in zip(eager.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert all(r.verified for r in fast.reports)
    trained = len(fast.reports)
    eager.eval(), fast.eval()
    wanted = eager.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    found = fast.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(wanted, found)
    assert len(fast.reports) > trained and all(r.verified for r in fast.reports)


def test_the_twin_shares_what_the_model_holds_and_leaves_its_calls_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    fast = graphopt.compile(model, measure=False)
    assert type(fast) is nn.Sequential and fast.state_dict().keys() == model.state_dict().keys()
    assert fast[0].weight is model[0].weight
    model(torch.randn(2, 4))
    assert not fast.reports
    x = torch.randn(64, 4)
    assert bool((fast(x) == 0).any()) and not bool((fast.eval()(x) == 0).any())
    assert len(fast.reports) == 2
