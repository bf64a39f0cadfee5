"""Known traps of graph rewriters, end to end.

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
from torch.export import Dim
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import graphopt
from graphopt.errors import GraphoptError
from graphopt.presets import EXACT

aten = torch.ops.aten

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, torch.float64, *HALVES)


class One(nn.Module):
    """One input under a name, for dynamic shapes."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Any:
        return self.net(x)


class Net(nn.Module):
    """A forward function with the modules, parameters and buffers that it uses."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            plain = isinstance(part, Tensor) and not isinstance(part, nn.Parameter)
            self.register_buffer(name, part) if plain else setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def fresh(structure: Any) -> Any:
    """Copies that lie in memory as the originals do; gradients start anew."""
    memo: dict[int, Any] = {}

    def copied(tensor: Tensor) -> Tensor:
        return copy.deepcopy(tensor.detach(), memo).requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(Tensor, copied, structure)


def optimized(model: nn.Module, *inputs: Any, training: bool = False, **options: Any) -> Any:
    """The model compiled on copies of the inputs; compared with eager on the inputs twice.

    The second call sees the buffers that the first one left.
    """
    options = {"passes": "exact", "measure": False} | options
    twin = copy.deepcopy(model.train(training))
    fast = graphopt.compile(model, example_inputs=fresh(inputs), **options)
    assert fast.report.verified
    for _ in range(2):
        equal_to(twin, fast, *inputs)
    return fast


def equal_to(eager: nn.Module, fast: nn.Module, *inputs: Any) -> None:
    """The same values, kinds and strides; and the same values in the inputs afterwards."""
    given, taken = fresh(inputs), fresh(inputs)
    wanted, made = eager(*given), fast(*taken)
    for a, b in zip(
        pytree.tree_leaves((wanted, given)), pytree.tree_leaves((made, taken)), strict=True
    ):
        torch.testing.assert_close(b, a, equal_nan=True, check_stride=a.numel() > 0, **close(a))


def close(value: Tensor) -> dict[str, float]:
    limits = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    limit = limits.get(value.dtype, 1e-6 if value.is_complex() else 0.0)
    return {"rtol": limit, "atol": limit}


def rules(fast: Any) -> list[str]:
    return [applied.rule for applied in fast.report.applied]


def reasons(fast: Any) -> str:
    return "\n".join(f"{m.rule}: {m.reason}" for m in fast.report.missed)


def settled(norm: Any) -> Any:
    """A batch norm that has seen data."""
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    nn.init.normal_(norm.weight, 1.0)
    nn.init.normal_(norm.bias)
    return norm


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


def hardswish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def layer(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def soft(x: Tensor) -> Tensor:
    powers = (x - x.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT / 2, -1) @ v


def self_attend(x: Tensor) -> Tensor:
    heads = x.unsqueeze(1)
    return attend(heads, heads, heads).squeeze(1)


COMPOSITES = {
    "RecognizeSilu": silu,
    "RecognizeGelu": gelu,
    "RecognizeHardswish": hardswish,
    "RecognizeRMSNorm": rms,
    "RecognizeLayerNorm": layer,
    "RecognizeSoftmax": soft,
    "RecognizeAttention": self_attend,
}


# A wrong permutation whose shapes fit.


def test_permuted_key_with_one_batch_and_as_many_heads_as_tokens():
    q, k, v = torch.randn(3, 1, 5, 5, 8)
    wrong = Net(lambda _, q, k, v: torch.softmax(q @ k.permute(0, 2, 3, 1) / 8, -1) @ v)
    fast = optimized(wrong, q, k, v)
    assert "RecognizeAttention" not in rules(fast)
    assert "permuted differently" in reasons(fast)
    right = Net(lambda _, q, k, v: torch.softmax(q @ k.permute(0, 1, 3, 2) / 8, -1) @ v)
    assert "RecognizeAttention" in rules(optimized(right, q, k, v))


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
        for name, gradient in wanted.items():
            error = (made[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
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
