"""What lies around a match: permutations, neighbours, further readers.

Every model must come out equal to eager; beyond that a test says which rewrite has to have happened
on it, or in which words the report refuses it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trap_models import COMPOSITES, Net, optimized, reasons, rules, settled, silu

import graphopt

# A wrong permutation whose shapes fit.


def test_permuted_key_with_one_batch_and_as_many_heads_as_tokens():
    q, k, v = torch.randn(3, 1, 5, 5, 8)
    wrong = Net(lambda _, q, k, v: torch.softmax(q @ k.permute(0, 2, 3, 1) / 8, -1) @ v)
    fast = optimized(wrong, q, k, v)
    assert "RecognizeAttention" not in rules(fast)
    assert "permuted differently" in reasons(fast)
    right = Net(lambda _, q, k, v: torch.softmax(q @ k.permute(0, 1, 3, 2) / 8, -1) @ v)
    assert "RecognizeAttention" in rules(optimized(right, q, k, v))


# Matches that touch each other.


@pytest.mark.parametrize(("rule", "function"), COMPOSITES.items(), ids=COMPOSITES)
def test_matches_side_by_side_in_a_list_and_feeding_each_other(rule, function):
    x = torch.randn(2, 5, 4)
    listed = Net(lambda _, x: torch.cat([function(x), function(x.sin())], -1))
    assert rules(optimized(listed, x)).count(rule) == 2
    stacked = Net(lambda _, x: torch.stack([y := function(x + 1), function(y), y]))
    assert rules(optimized(stacked, x)).count(rule) == 2


def test_siblings_whose_second_comes_late():
    def late(net, x):
        first = net.a(x).sin().cumsum(-1)
        return first * net.b(x).cos()

    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4, bias=False)}
    assert "MergeSiblings" in rules(optimized(Net(late, **parts), torch.randn(3, 4)))


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (lambda net, x, y: F.linear(x, net.b.weight, y.mean(0)), "depends on a value"),
        (lambda net, x, y: net.b(x + y), ""),
        (lambda net, x, y: F.linear(x, net.b.weight * y.mean()), ""),
    ],
    ids=["late bias", "late input", "late weight"],
)
def test_siblings_that_need_each_other_are_not_merged(second, reason):
    def forward(net, x):
        y = net.a(x)
        return y.sin() + second(net, x, y)

    parts = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    fast = optimized(Net(forward, **parts), torch.randn(3, 4))
    assert "MergeSiblings" not in rules(fast)
    assert reason in reasons(fast)


# Values that are needed elsewhere.


def test_logits_that_a_pattern_consumes_and_the_model_returns():
    def scores_too(_, q, k, v):
        scores = q @ k.mT / 8
        return torch.softmax(scores, -1) @ v, scores

    fast = optimized(Net(scores_too), *torch.randn(3, 2, 3, 5, 8))
    assert "RecognizeAttention" not in rules(fast)
    assert "also an output of the model" in reasons(fast)


@pytest.mark.parametrize(
    ("inner", "forward"),
    [
        ("NormAfterConv", lambda net, x: (net.norm(y := net.conv(x)), y)),
        ("RecognizeSilu", lambda net, x: ((y := net.conv(x)) * (s := y.sigmoid()), s)),
    ],
)
def test_inner_values_that_escape(inner, forward):
    model = Net(forward, conv=nn.Conv2d(2, 3, 1), norm=settled(nn.BatchNorm2d(3)))
    fast = optimized(model, torch.randn(2, 2, 4, 4))
    assert inner not in rules(fast)
    assert f"{inner}: the intermediate" in reasons(fast)
    assert "also an output of the model" in reasons(fast)


def test_asserts_that_cannot_fail_do_not_stand_in_the_way():
    def checked(_, x):
        gate = x.sigmoid()
        torch._check(gate.shape[0] < 100)
        return x * gate.to(torch.float32)

    assert "RecognizeSilu" in rules(optimized(Net(checked), torch.randn(3, 4)))


def test_an_assert_on_the_result_of_a_match_stays():
    def checked(_, x):
        y = silu(x)
        torch._assert_async(y.isfinite().all(), "must be finite")
        return y + 1

    fast = optimized(Net(checked), torch.randn(3, 4))
    assert "RecognizeSilu" in rules(fast)
    with pytest.raises(RuntimeError, match="must be finite"):
        fast(torch.full((3, 4), torch.nan))


def test_an_assert_on_an_inner_value_keeps_the_value():
    def checked(_, x):
        gate = x.sigmoid()
        torch._assert_async(gate.isfinite().all(), "must be finite")
        return x * gate

    fast = optimized(Net(checked), torch.randn(3, 4))
    assert "RecognizeSilu: the intermediate `sigmoid`" in reasons(fast)
    with pytest.raises(RuntimeError, match="must be finite"):
        fast(torch.full((3, 4), torch.nan))


# Near misses of attention.


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda q, k, v: torch.softmax(q @ k.mT, -1) / 8 @ v, "scaled after the softmax"),
        (lambda q, k, v: torch.softmax(q @ k.mT / 8, -1).tril() @ v, "applied after the softmax"),
        (
            lambda q, k, v: torch.softmax((q @ k.mT + k.sum(-1)[..., None]) / 8, -1) @ v,
            "the mask is scaled together with the scores",
        ),
        (lambda q, k, v: torch.softmax(q @ k.mT / 8, -2) @ v, "not over the keys"),
    ],
    ids=["scale after softmax", "mask after softmax", "mask before scale", "over queries"],
)
def test_attention_that_only_looks_like_it(function, words):
    fast = optimized(Net(lambda _, *qkv: function(*qkv)), *torch.randn(3, 2, 3, 5, 8))
    assert "RecognizeAttention" not in rules(fast)
    assert words in reasons(fast)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_dropout_inside_attention(training):
    model = Net(
        lambda net, q, k, v: net.drop(torch.softmax(q @ k.mT / 8, -1)) @ v, drop=nn.Dropout(0.5)
    ).train(training)
    q, k, v = torch.randn(3, 2, 3, 5, 8)
    fast = graphopt.compile(copy.deepcopy(model), example_inputs=(q, k, v), measure=False)
    assert fast.report.verified
    assert ("RecognizeAttention" in rules(fast)) is not training
    assert ("dropout (p=0.5) acts on the weights" in reasons(fast)) is training
    results = []
    for module in (model, fast):
        torch.manual_seed(3)
        results.append(module(q, k, v))
    torch.testing.assert_close(*results)
