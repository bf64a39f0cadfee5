"""Which calls may be shared or dropped."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from graphopt.analysis.purity import is_pure

aten = torch.ops.aten


def call(target, *args):
    graph = fx.Graph()
    return graph.call_function(target, (graph.placeholder("x"), *args))


@pytest.mark.parametrize(
    ("target", "args", "pure"),
    [
        (aten.add.Tensor, (1,), True),
        (operator.getitem, (0,), True),
        (aten.add_.Tensor, (1,), False),
        (aten.bernoulli.default, (), False),
        (aten.empty_like.default, (), False),
        (aten.zeros_like.default, (), True),
        (print, (), False),
    ],
)
def test_what_depends_on_its_arguments_alone(target, args, pure):
    assert is_pure(call(target, *args)) is pure


def test_writes_are_known_without_the_help_of_fx(monkeypatch):
    monkeypatch.setattr(fx.Node, "is_impure", lambda *_args, **_kwargs: False)
    assert is_pure(call(aten.add.Tensor, 1))
    assert not is_pure(call(aten.add_.Tensor, 1))
    assert not is_pure(call(aten.mul_.Scalar, 2))


def test_a_placeholder_is_no_call():
    assert not is_pure(fx.Graph().placeholder("x"))
