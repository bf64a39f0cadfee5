"""Views of contiguous tensors: the sizes torch gives, and no question about symbolic ones."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from graphopt.rewrite.views import is_packed, viewed


def symbolic(*hints):
    """A tensor all of whose sizes are symbols, and what is known of these."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(hints))
    return mode, mode.from_tensor(torch.empty(hints), symbolic_context=context), env


def shorter(tensor):
    """All but the last position of dim 1, which may be one or none."""
    return tensor[:, :-1].clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize(
    "sizes",
    [
        lambda a, b, c: [-1, c],
        lambda a, b, c: [-1],
        lambda a, b, c: [a, -1],
        lambda a, b, c: [a, b, c, 1],
        lambda a, b, c: [a * b, c],
        lambda a, b, c: [b, a, c],
        lambda a, b, c: [1, a * b * c],
    ],
)
def test_sizes_are_those_of_torch_and_nothing_is_asked(sizes):
    mode, tensor, env = symbolic(4, 6, 8)
    symbols = [size.node.expr for size in tensor.shape]
    with mode:
        tensor = shorter(tensor)
        made = viewed(tensor, sizes(*tensor.shape))
    assert made is not None
    assert is_packed(made)
    assert not env.guards
    for a, b, c in ((4, 5, 8), (3, 1, 2), (1, 1, 1)):
        wanted = torch.empty(a, b, c).view(sizes(a, b, c)).shape
        known = dict(zip(symbols, (a, b + 1, c), strict=True))
        assert [s if isinstance(s, int) else s.node.expr.subs(known) for s in made.shape] == [
            *wanted
        ]


def test_gaps_are_seen():
    mode, tensor, _ = symbolic(4, 6, 8)
    with mode:
        assert viewed(tensor[:, :-1], [-1]) is None
        assert viewed(tensor.transpose(0, 1), [-1]) is None
        assert is_packed(tensor)


def test_sizes_that_may_not_fit_are_left_to_torch():
    mode, tensor, _ = symbolic(4, 6, 8)
    a, b, c = tensor.shape
    with mode:
        assert viewed(tensor, [a, b]) is None
        assert viewed(tensor, [a * b * c * 2]) is None
        assert viewed(tensor, [-1, 3]) is None
