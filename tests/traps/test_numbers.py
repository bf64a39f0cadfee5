"""Sizes, kinds of numbers, spellings, layouts.

Every model must come out equal to eager; beyond that a test says which rewrite has to have happened
on it, or in which words the report refuses it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from trap_models import (
    COMPOSITES,
    FLOATS,
    HALVES,
    Net,
    One,
    close,
    equal_to,
    gelu,
    hardswish,
    layer,
    optimized,
    reasons,
    rms,
    rules,
    self_attend,
    settled,
    silu,
    soft,
)

import graphopt

# Sizes.


@pytest.mark.parametrize("example", [1, 3])
@pytest.mark.parametrize("dim", [Dim.AUTO, Dim.DYNAMIC], ids=["auto", "dynamic"])
def test_every_batch_size_after_one_example(dim, example):
    def forward(net, x):
        y = net.norm(x)
        return self_attend(net.a(y)) + gelu(net.b(y)) + rms(net.c(y))

    parts = {name: nn.Linear(4, 4) for name in "abc"}
    model = One(Net(forward, norm=nn.LayerNorm(4), **parts)).eval()
    twin = copy.deepcopy(model)
    fast = graphopt.compile(
        model,
        example_inputs=(torch.randn(example, 5, 4),),
        dynamic_shapes=({0: dim},),
        measure=False,
    )
    assert {"RecognizeAttention", "MergeSiblings", "RecognizeGelu"} <= set(rules(fast))
    for size in (1, 2, 5):
        equal_to(twin, fast, torch.randn(size, 5, 4))


# Kinds of numbers.

KINDS = {
    "int64": torch.tensor([[0, 1, 2], [-3, 4, 127]]),
    "uint8": torch.tensor([[0, 1, 2], [3, 4, 255]], dtype=torch.uint8),
    "bool": torch.tensor([[True, False, True]]),
    "complex": torch.tensor([[complex(-0.0, -1.0), complex(2.0, -0.0), complex(0, torch.inf)]]),
    "float": torch.tensor([[-0.0, 0.0, torch.nan], [torch.inf, -torch.inf, 1e-45]]),
}
ARITHMETIC: dict[str, Callable[[Tensor], Tensor]] = {
    "times one": lambda x: x * 1,
    "times 1.0": lambda x: x * 1.0,
    "over one": lambda x: x / 1,
    "plus zero": lambda x: x + 0,
    "plus 0.0": lambda x: x + 0.0,
    "minus zero": lambda x: x - 0,
    "squared": lambda x: x * x,
    "over eight": lambda x: x / 8,
    "to float": lambda x: x.abs().float(),
    "first power": lambda x: x**1,
    "root": lambda x: x.abs() ** 0.5,
    "silu": silu,
}


@pytest.mark.parametrize("kind", KINDS)
def test_identities_of_real_numbers_on_other_kinds(kind):
    """The reciprocal turns signs of zeros into signs of infinities."""
    x = KINDS[kind]
    known = {name: f for name, f in ARITHMETIC.items() if works(f, x)}
    assert len(known) > 5

    def forward(_, x):
        return {name: function(x).reciprocal() for name, function in known.items()}

    model = Net(forward).eval()
    fast = graphopt.compile(model, example_inputs=(torch.ones_like(x),), measure=False)
    for name, wanted in model(x).items():
        made = fast(x)[name]
        torch.testing.assert_close(made, wanted, equal_nan=True, msg=name, **close(wanted))


def works(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    try:
        function(x).reciprocal()
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("function", [silu, gelu, hardswish, rms, layer, soft])
def test_patterns_for_floats_on_integers(function):
    """Integers become floats somewhere inside; what reads the integers themselves must not go."""
    model = Net(lambda _, x: function(x if function in (silu, gelu, hardswish) else x.double()))
    fast = optimized(model, torch.arange(-4, 4).view(2, 4))
    assert not {"RecognizeSilu", "RecognizeGelu", "RecognizeHardswish"} & set(rules(fast))


# Spellings.

SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "divided": lambda s: s / 8,
    "multiplied": lambda s: s * 0.125,
    "swapped": lambda s: 0.125 * s,
    "method": lambda s: s.div(8),
    "function": lambda s: torch.mul(s, 0.125),
    "keyword": lambda s: torch.div(input=s, other=8),
    "sevenths": lambda s: s / 7,
    "times a seventh": lambda s: s * (1 / 7),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_scale_of_attention_in_every_spelling(scale):
    model = Net(lambda _, q, k, v: scale(q @ k.mT).softmax(-1) @ v)
    assert "RecognizeAttention" in rules(optimized(model, *torch.randn(3, 2, 3, 5, 8)))


def test_only_powers_of_two_have_an_exact_reciprocal():
    x = torch.randn(1000)
    eighths = optimized(Net(lambda _, x: (x / 8).sin() - (x * 0.125).sin()), x)
    assert "MergeEqual" in rules(eighths)
    sevenths = Net(lambda _, x: (x / 7, x * (1 / 7)))
    fast = optimized(sevenths, x)
    assert "DivPowerOfTwo" not in rules(fast)
    assert all(torch.equal(a, b) for a, b in zip(fast(x), sevenths(x), strict=True))
    assert not torch.equal(*fast(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sigmoid() * x,
        lambda x: torch.mul(x, torch.sigmoid(x)),
        lambda x: torch.mul(input=x.sigmoid(), other=x),
        lambda x: x.mul(torch.sigmoid(input=x)),
    ],
)
def test_silu_in_every_spelling(function):
    assert "RecognizeSilu" in rules(optimized(Net(lambda _, x: function(x)), torch.randn(3, 4)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 0.5 * x * torch.add(1, torch.erf(x / 2**0.5), alpha=2),
        lambda x: x * F.relu6(torch.add(x, 1.5, alpha=3)) / 6,
        lambda x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), x[..., :1], alpha=2)),
        lambda x: (
            torch.sub(x, x.mean(-1, keepdim=True), alpha=2)
            / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        ),
        lambda x: (e := x.exp()) / torch.add(e.sum(-1, keepdim=True), 1, alpha=2),
    ],
    ids=["gelu", "hardswish", "rms", "layer", "softmax"],
)
def test_alpha_is_not_overlooked(function):
    fast = optimized(Net(lambda _, x: function(x.abs())), torch.randn(3, 4))
    assert not set(COMPOSITES) & set(rules(fast))


# Layouts, sizes and dtypes of each composite.

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "sliced": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand(x.shape),
    "broadcast rows": lambda x: x[:, :1].expand(x.shape),
    "empty": lambda x: x[:0],
}


@pytest.mark.filterwarnings("ignore:var")  # of nothing
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(("rule", "function"), COMPOSITES.items(), ids=COMPOSITES)
def test_composites_on_odd_layouts(rule, function, layout):
    fast = optimized(Net(lambda _, x: function(x).sin()), layout(torch.randn(3, 5, 4)))
    kept = f"{rule}: cannot be built legally: the strides of an output of the model would change"
    assert rule in rules(fast) or kept in reasons(fast)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("rule", "function"), COMPOSITES.items(), ids=COMPOSITES)
def test_composites_in_every_float(rule, function, dtype):
    fast = optimized(Net(lambda _, x: function(x)), torch.randn(3, 5, 4, dtype=dtype))
    if dtype in HALVES and rule == "RecognizeRMSNorm":
        assert f"{rule}: the norm is computed in {dtype}" in reasons(fast)
    else:
        assert rule in rules(fast)


@pytest.mark.parametrize("pointwise", [silu, gelu, hardswish])
def test_channels_last_stays_channels_last(pointwise):
    model = Net(
        lambda net, x: pointwise(net.norm(net.conv(x))),
        conv=nn.Conv2d(3, 4, 1),
        norm=settled(nn.BatchNorm2d(4)),
    )
    x = torch.randn(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    assert "NormAfterConv" in rules(optimized(model, x))
