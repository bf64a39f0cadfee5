"""Reads and writes in place, and memory that callers can reach.

Every model must come out equal to eager; beyond that a test says which rewrite has to have happened
on it, or in which words the report refuses it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from trap_models import Net, aten, equal_to, fresh, optimized, rules, silu

import graphopt

# Reads and writes in place.

WRITES: dict[str, Callable[[Tensor], Any]] = {
    "whole": lambda h: h.add_(1),
    "view": lambda h: h.view(-1).add_(1),
    "slice": lambda h: h[:, 1:3].mul_(3),
    "transposed": lambda h: h.mT[1:].add_(1),
    "select": lambda h: h[0].zero_(),
    "assignment": lambda h: h.__setitem__((..., 0), 2.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_read_stays_on_its_side_of_a_write(write):
    def around(net, x):
        h = net.linear(x)
        before, gate = h * 2, h.sigmoid()
        write(h)
        return before, h * 2, h * gate

    fast = optimized(Net(around, linear=nn.Linear(4, 4)), torch.randn(3, 4))
    assert "RecognizeSilu" not in rules(fast)
    products = fast.program.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert sum(n.args[1] == 2 for n in products) == 2


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_buffer_is_read_before_and_after_it_is_written(write):
    def around(net, x):
        before = x * net.state.sigmoid()
        write(net.state)
        return before + net.state, x * net.state.sigmoid()

    fast = optimized(Net(around, state=torch.randn(3, 4)), torch.randn(3, 4))
    assert "FoldCone" not in rules(fast)


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_the_callers_tensor_is_written_and_the_example_is_not(write):
    def around(_, x):
        before = x * 2
        write(x)
        return before, x * 2

    model, example = Net(around).eval(), torch.ones(3, 4)
    fast = graphopt.compile(model, example_inputs=(example,), measure=False)
    assert torch.equal(example, torch.ones(3, 4))
    equal_to(model, fast, torch.randn(3, 4))


# Memory that callers can reach.


def reached(model: nn.Module, *inputs: Any) -> list[Any]:
    """What each result and input holds after the caller adds to the results one by one."""
    inputs = fresh(inputs)
    results = pytree.tree_leaves(model(*inputs))
    seen = []
    for result in results:
        result.add_(1)
        seen.append([t.clone() for t in (*results, *inputs)])
    return [*seen, [t.clone() for t in pytree.tree_leaves(model(*inputs))]]


SHARING: dict[str, Callable[[Any, Tensor], Any]] = {
    "input": lambda _, x: (x, x * 1),
    "views of the input": lambda _, x: (x.view(-1), x[0], x.t(), x + 0),
    "copies of the input": lambda _, x: (x.clone(), x.contiguous(), x.clone().view(-1)),
    "two names": lambda _, x: (y := x + 1, y),
    "value and view": lambda _, x: (y := silu(x), y.view(-1), y.t()),
    "equal values": lambda _, x: (x + 1, x + 1, 1 + x),
    "value and copy": lambda _, x: (y := x + 1, y.clone(), y * 1),
    "undeclared views": lambda _, x: (
        torch.einsum("ij->ji", x.clone()),
        x.clone().type_as(x),
        torch.broadcast_tensors(x.clone(), x[0])[0],
    ),
    "written input": lambda _, x: (x.mul_(2), x[1], x.t()),
    "input written through a view": lambda _, x: (x[0].mul_(2), x),
    "buffer": lambda net, x: (net.state, net.state * 1, net.state.clone()),
    "written buffer": lambda net, x: (net.state.add_(x), net.state[0]),
    "part of a written buffer": lambda net, x: net.state[0].mul_(2),
    "part of a write": lambda _, x: (y := x + 1, y[0].mul_(2), y),
    "constant": lambda net, x: (torch.ones(3).cumsum(0), net.state.sin()),
    "siblings": lambda net, x: (net.a(x), net.b(x)),
}


@pytest.mark.parametrize("function", SHARING.values(), ids=SHARING)
@pytest.mark.parametrize("rows", [1, 3])
def test_callers_who_write_into_results_see_what_eager_shows(function, rows):
    parts = {"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "state": torch.randn(rows, 3)}
    model = Net(function, **parts).eval().requires_grad_(False)
    twin, x = copy.deepcopy(model), torch.randn(rows, 3)
    if rows == 1 and function is SHARING["views of the input"]:
        x = x.repeat(3, 1)
    if rows == 1 and function is SHARING["written input"]:
        x = x.repeat(2, 1)
    fast = graphopt.compile(model, example_inputs=(x.clone(),), measure=False)
    torch.testing.assert_close(reached(fast, x), reached(twin, x))
