"""Weights: shared, trained, written after the fact.

Every model must come out equal to eager; beyond that a test says which rewrite has to have happened
on it, or in which words the report refuses it.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trap_models import (
    Net,
    attend,
    gelu,
    hardswish,
    layer,
    optimized,
    reasons,
    rms,
    rules,
    settled,
    silu,
    soft,
)

import graphopt
from graphopt.errors import GraphoptError
from graphopt.presets import EXACT

# Weights with more than one reader.


def test_a_norm_is_not_folded_into_a_weight_that_another_layer_shares():
    first, second = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 3, 1)
    second.weight = first.weight
    parts = {"first": first, "second": second, "norm": settled(nn.BatchNorm2d(3))}
    model = Net(lambda net, x: net.norm(net.first(x)) + net.second(x.sin()), **parts)
    fast = optimized(model, torch.randn(2, 2, 4, 4))
    assert "NormAfterConv" not in rules(fast)
    assert "the weight is also used by" in reasons(fast)


def test_tied_embedding_and_head_around_a_norm():
    embed, head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
    head.weight = embed.weight
    parts = {"embed": embed, "norm": nn.LayerNorm(4), "head": head}
    model = Net(lambda net, ids: net.head(net.norm(net.embed(ids))), **parts)
    nn.init.normal_(model.norm.weight)
    fast = optimized(model, torch.randint(11, (2, 5)))
    assert "the weight is also used by `embedding`" in reasons(fast)


@pytest.mark.parametrize(
    "data",
    [
        lambda net, x: x @ net.layer.weight,
        lambda net, x: torch.cat([x, net.layer.weight], 0).sum(0),
    ],
    ids=["product", "list"],
)
def test_a_parameter_that_is_weight_and_data(data):
    def forward(net, x):
        return net.layer(net.norm(x)) + net.other(net.norm(x)).sin() + data(net, x)

    parts = {"layer": nn.Linear(4, 4), "other": nn.Linear(4, 4), "norm": nn.LayerNorm(4)}
    fast = optimized(Net(forward, **parts), torch.randn(3, 4))
    assert "also used by" in reasons(fast)
    assert not {"FoldAffine", "MergeSiblings"} & set(rules(fast))


@pytest.mark.parametrize(
    ("step", "training"),
    [*((name, False) for name in dict.fromkeys(EXACT)), ("exact", False), ("exact", True)],
)
def test_one_module_called_twice(step, training):
    def forward(net, x):
        images = x.view(3, 1, 2, 2)
        convolved = net.norm(net.conv(images)) + net.norm(net.conv(images.sin()))
        y = net.layer(net.affine(x)) + net.layer(net.affine(x.sin())) + net.other(net.affine(x))
        return silu(y) + silu(y.sin()), convolved

    parts = {"layer": nn.Linear(4, 4), "other": nn.Linear(4, 4), "affine": nn.LayerNorm(4)}
    parts |= {"conv": nn.Conv2d(1, 2, 1), "norm": settled(nn.BatchNorm2d(2))}
    model = Net(forward, **parts)
    nn.init.normal_(model.affine.weight)
    passes = step if step == "exact" else [step]
    fast = optimized(model, torch.randn(3, 4), passes=passes, training=training)
    assert {"layer.weight", "layer.bias", "conv.weight", "conv.bias"} <= fast.state_dict().keys()


# Training.


def everything(net: Any, x: Tensor) -> Tensor:
    """A bit of everything that some pass would fold or merge in eval mode."""
    images = net.norm(net.conv(x.view(-1, 1, 2, 4))).flatten(1)
    y = net.affine(x)
    q, k, v = net.q(y), net.k(y), net.v(y)
    y = attend(q[:, None], k[:, None], v[:, None])[:, 0] * (net.v.weight * 2).sum()
    return layer(gelu(y) + silu(x)) * rms(x) + hardswish(images) + soft(x) * 1


def whole_net(dtype: torch.dtype) -> Net:
    parts = {name: nn.Linear(8, 8) for name in "qkv"}
    parts |= {"conv": nn.Conv2d(1, 1, 3, padding=1, bias=False)}
    parts |= {"norm": nn.BatchNorm2d(1), "affine": nn.LayerNorm(8)}
    model = Net(everything, **parts).to(dtype)
    nn.init.normal_(model.affine.weight)
    return model


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    (model(x).double() ** 2).sum().backward()
    found = {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None for g in found.values())
    return found


@pytest.mark.parametrize("limits", [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=str)
def test_in_training_nothing_is_folded_and_gradients_are_those_of_eager(limits):
    dtype, limit = limits
    model = whole_net(dtype).train()
    twin, x = copy.deepcopy(model), torch.randn(5, 8, dtype=dtype)
    fast = graphopt.compile(model, example_inputs=(x,), measure=False)
    assert {"RecognizeAttention", "RecognizeGelu", "RecognizeSilu"} <= set(rules(fast))
    assert not [name for name in fast.state_dict() if "folded" in name]
    assert "may not be folded" in reasons(fast) or "FoldAffine" not in rules(fast)
    for batch in (x, torch.randn(5, 8, dtype=dtype)):
        made, wanted = gradients(fast, batch), gradients(twin, batch)
        assert made.keys() == wanted.keys()
        # Attention here looks at one key alone: what is left of q's and k's gradients is rounding.
        floor = 1e-2 * max(gradient.norm() for gradient in wanted.values())
        for name, gradient in wanted.items():
            error = (made[name] - gradient).norm() / gradient.norm().clamp(min=floor)
            assert error < limit, name
    torch.testing.assert_close(fast.state_dict(), twin.state_dict())


def test_a_step_of_an_optimizer_is_seen_by_the_trained_module():
    model = whole_net(torch.float64).train()
    x = torch.randn(5, 8, dtype=torch.float64)
    fast = graphopt.compile(model, example_inputs=(x,), measure=False)
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    gradients(fast, x)
    optimizer.step()
    torch.testing.assert_close(fast(x), copy.deepcopy(model)(x))


# Weights that change after the fact.


def folded_net() -> nn.Module:
    norm = settled(nn.BatchNorm2d(2))
    return nn.Sequential(nn.Conv2d(1, 2, 1), norm, nn.Flatten(), nn.Linear(8, 3)).eval()


def test_a_weight_that_was_not_folded_is_shared_with_the_original():
    model, x = folded_net(), torch.randn(2, 1, 2, 2)
    fast = optimized(model, x)
    with torch.no_grad():
        model[3].weight.mul_(2)
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.parametrize("name", ["0.weight", "1.running_var"])
def test_a_weight_that_was_folded_and_is_written_is_an_error(name):
    model, x = folded_net(), torch.randn(2, 1, 2, 2)
    fast = optimized(model, x)
    with torch.no_grad():
        model.state_dict()[name].mul_(2)
    with pytest.raises(GraphoptError, match=f"{name} was written after it was folded"):
        fast(x)


def test_a_weight_that_was_folded_beside_its_use_and_is_written_is_an_error():
    model = Net(lambda net, x: net.layer(x) * net.layer.weight.sum(), layer=nn.Linear(4, 4))
    fast = optimized(model, x := torch.randn(3, 4))
    assert "FoldCone" in rules(fast)
    with torch.no_grad():
        fast.layer.weight.mul_(2)
    with pytest.raises(GraphoptError, match=r"layer.weight was written"):
        fast(x)


def test_folded_tensors_are_all_in_the_state_dict():
    source, target, x = folded_net(), folded_net(), torch.randn(2, 1, 2, 2)
    first, second = optimized(source, x), optimized(target, x)
    assert not torch.allclose(first(x), second(x))
    second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second(x), first(x))
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        second.load_state_dict(source.state_dict())
