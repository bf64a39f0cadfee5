"""Operators that read memory as it lies: calls with another memory layout are right or refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import GraphoptError


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv, self.table = nn.Conv2d(3, 4, 3), nn.Embedding(16, 8)
        self.linear = nn.Linear(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def windows(m, x):
    return x.contiguous().as_strided((x.shape[0] - 2, 3), (1, 1)) * 2


def strided_features(m, x):
    return m.conv(x).contiguous().as_strided((2, 4, 36), (144, 36, 1)).sum(-1)


def complex_product(m, x):
    return torch.view_as_real(torch.view_as_complex(x.contiguous()) * 1j)


def bits(m, x):
    return x.contiguous().view(torch.int16) + 1


def rotary(m, x):
    """The layout of token ids does not reach the operator."""
    return torch.view_as_real(torch.view_as_complex(m.table(x).view(*x.shape, 4, 2)) * 1j)


def projected(m, x):
    return m.linear(x + 1).as_strided((5, 3), (8, 1))


def ordinary(m, x):
    return x.contiguous().reshape(-1) * 2


def same_width(m, x):
    return x.contiguous().view(torch.int32) + 1


def compiled(function, x, **options):
    model = Model(function).eval()
    return model, graphopt.compile(model, example_inputs=(x,), measure=False, **options)


COLUMN = torch.randn(10, 2)
IMAGE = torch.randn(2, 3, 8, 8)
CASES = {
    "windows": (windows, torch.randn(10), COLUMN[:, 0]),
    "channels_last": (strided_features, IMAGE, IMAGE.to(memory_format=torch.channels_last)),
    "complex": (complex_product, torch.randn(4, 2), torch.randn(2, 4).t()),
    "bits": (bits, torch.randn(4, 2), torch.randn(2, 4).t()),
}


@pytest.mark.parametrize("passes", ["exact", "none"])
@pytest.mark.parametrize("name", CASES)
def test_another_layout_is_refused_with_what_to_do(name, passes, caplog):
    function, example, other = CASES[name]
    model, fast = compiled(function, example, passes=passes)
    torch.testing.assert_close(fast(example), model(example))
    with pytest.raises(GraphoptError, match="reads memory as it lies") as caught:
        fast(other)
    assert caught.value.what.startswith(f"x has strides {tuple(other.stride())}")
    assert not [r for r in caplog.records if r.levelname == "ERROR"]
    assert __file__ in caught.value.what and "x.contiguous()" in caught.value.fix
    torch.testing.assert_close(fast(other.contiguous()), model(other), rtol=1e-4, atol=1e-5)


def test_a_program_captured_in_another_layout_takes_that_layout():
    model, fast = compiled(windows, COLUMN[:, 0])
    other = torch.randn(10, 2)[:, 1]
    torch.testing.assert_close(fast(other), model(other))
    torch.testing.assert_close(fast(torch.ones(10)), model(torch.ones(10)))


def test_layouts_that_do_not_reach_the_operator_are_let_through():
    ids = torch.randint(16, (3, 6))
    model, fast = compiled(rotary, ids)
    for other in (torch.randint(16, (3, 9))[:, :6], torch.randint(16, (6, 3)).t()):
        torch.testing.assert_close(fast(other), model(other))
    model, fast = compiled(projected, torch.randn(5, 8))
    for other in (torch.randn(5, 16)[:, ::2], torch.randn(8, 5).t()):
        torch.testing.assert_close(fast(other), model(other))


def test_dynamic_sizes():
    model, fast = compiled(windows, torch.randn(10), dynamic_shapes=({0: "n"},))
    for size in (10, 13):
        x = torch.randn(size)
        torch.testing.assert_close(fast(x), model(x))
        with pytest.raises(GraphoptError, match="reads memory as it lies"):
            fast(torch.randn(size, 2)[:, 1])


def test_ordinary_models_take_every_layout_unseen():
    for function, passes in ((ordinary, "exact"), (ordinary, "none"), (same_width, "exact")):
        model, fast = compiled(function, torch.randn(4, 6), passes=passes)
        other = torch.randn(6, 4).t()
        torch.testing.assert_close(fast(other), model(other))
        assert not fast._guard.layouts.captured
