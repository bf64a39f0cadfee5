"""What the report says of quantized weights, against figures computed from the raw tensors."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.capture import capture
from graphopt.kernels.quantized import QuantizedWeight, Scheme
from graphopt.passes import QuantizeMatmul
from graphopt.quantized_outputs import is_logits, output_names
from graphopt.report import Quantization, QuantizedLayer, Report

WIDTH, CLASSES = 64, 12
FOUR = {"bits": 4, "group_size": 32, "activations": None}


class Net(nn.Module):
    """A table, an MLP between norms, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def state(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.norm(x + self.down(F.gelu(self.up(x))))

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        state = self.state(ids)
        return {"logits": self.head(state), "state": state}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def tokens(seed: int = 1, rows: int = 3) -> Tensor:
    return torch.randint(0, 40, (rows, 9), generator=torch.Generator().manual_seed(seed))


def quantized(model: nn.Module, *args: Any, **options: Any) -> Any:
    given = {k: options.pop(k) for k in ("calibration", "measure") if k in options}
    given = {"measure": False} | given
    passes = ["Canonicalize", QuantizeMatmul(**options)]
    return graphopt.compile(model, example_inputs=args, passes=passes, **given)


def told(fast: Any) -> Quantization:
    found = fast.report.quantization
    assert isinstance(found, Quantization)
    return found


def by_name(fast: Any) -> dict[str, QuantizedLayer]:
    return {name: layer for layer in told(fast).layers for name in layer.names}


def dense(fast: Any, name: str, shape: tuple[int, int], scheme: Scheme) -> Tensor:
    """A weight from what is stored."""
    kinds = ("codes", "scales", "zeros", "tensor_scale")
    parts = [fast.program.state.get(f"{name}_{kind}") for kind in kinds]
    return QuantizedWeight(scheme, shape[1], *parts).dequantize(torch.float64)


def read_by(model: nn.Module, name: str, inputs: list[Tensor]) -> list[Tensor]:
    """What a module is given, in float64."""
    seen: list[Tensor] = []
    module = model.get_submodule(name)
    hook = module.register_forward_pre_hook(lambda _module, given: seen.append(given[0].double()))
    with torch.no_grad():
        for one in inputs:
            model(one)
    hook.remove()
    return seen


def ratio(value: Tensor, exact: Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (value - exact).square().sum()))


@pytest.mark.parametrize("calibrated", [False, True])
def test_ratios_of_products(calibrated: bool) -> None:
    """On calibration inputs, taken together, if there are any."""
    model, ids = net(), tokens()
    batches = [tokens(5), tokens(6)]
    fast = quantized(model, ids, calibration=batches if calibrated else None, **FOUR)
    rows = by_name(fast)
    for name in ("up", "down"):
        layer = model.get_submodule(name)
        held = dense(fast, f"{name}.weight", layer.weight.shape, Scheme(4, group_size=32))
        x = torch.cat(read_by(model, name, batches if calibrated else [ids]))
        exact = x @ layer.weight.double().T + layer.bias.double()
        made = x @ held.T + layer.bias.double()
        found = rows[f"{name}.weight"]
        assert found.sqnr == pytest.approx(ratio(made, exact), abs=0.01)
        assert found.error == pytest.approx(10 ** (-found.sqnr / 20), rel=1e-6)
        cosine = F.cosine_similarity(made.ravel(), exact.ravel(), dim=0)
        assert found.cosine == pytest.approx(float(cosine), abs=1e-6)
    assert told(fast).inputs == ("calibration" if calibrated else "captured")


def test_dynamic_activations_count() -> None:
    model, ids = net(), tokens()
    floats = by_name(quantized(model, ids, activations=None))["up.weight"]
    both = by_name(quantized(model, ids))["up.weight"]
    assert (floats.activations, both.activations) == ("none", "dynamic")
    x = read_by(model, "up", [ids])[0]
    scale = x.abs().amax(-1, keepdim=True) / 127
    held = dense(quantized(model, ids), "up.weight", (96, WIDTH), Scheme(8))
    exact = x @ model.up.weight.double().T + model.up.bias
    made = (x / scale).round() * scale @ held.T + model.up.bias
    assert both.sqnr == pytest.approx(ratio(made, exact), abs=0.05)
    assert floats.sqnr > both.sqnr + 1


def test_outputs_of_the_model() -> None:
    model, ids = net(), tokens()
    fast = quantized(model, ids, head=True, **FOUR)
    with torch.no_grad():
        made, exact = fast(ids), net().double()(ids)
    rows = {row.name: row for row in told(fast).outputs}
    assert list(rows) == ["logits", "state"]
    for name, row in rows.items():
        value = made[name].double()
        assert row.sqnr == pytest.approx(ratio(value, exact[name]), abs=1e-3)
        assert row.shape == tuple(value.shape)
    logs = made["logits"].double().log_softmax(-1), exact["logits"].log_softmax(-1)
    wanted = F.kl_div(*logs, log_target=True, reduction="none").sum(-1).mean()
    assert rows["logits"].divergence == pytest.approx(float(wanted), rel=1e-3)
    assert rows["state"].divergence is None


def test_sizes() -> None:
    model, ids = net(), tokens()
    fast = quantized(model, ids, head=True, embeddings=True, **FOUR)
    found = told(fast)
    assert [layer.names[0] for layer in found.layers] == [
        "words.weight", "up.weight", "down.weight", "head.weight",
    ]  # fmt: skip
    for layer in found.layers:
        count = math.prod(layer.shape)
        assert layer.bytes_before == 4 * count
        assert count / 2 < layer.bytes_after <= count / 2 + 4 * count / 32
    assert found.bytes_before == sum(t.nbytes for t in model.state_dict().values())
    saved = sum(layer.bytes_before - layer.bytes_after for layer in found.layers)
    assert found.bytes_before - found.bytes_after == saved
    assert found.floats == ()


def test_a_tied_table_is_one_row() -> None:
    model, ids = net(), tokens()
    model.head = nn.Linear(WIDTH, 40, bias=False)
    model.head.weight = model.words.weight
    fast = quantized(model, ids, head=True, embeddings=True, **FOUR)
    row = by_name(fast)["words.weight"]
    assert set(row.names) == {"words.weight", "head.weight"}
    assert set(row.operators) == {"linear", "embedding"}
    assert [layer.names for layer in told(fast).layers].count(row.names) == 1


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (self.gate(x).sigmoid() * self.up(x)).sin()


def test_merged_weights_have_every_name() -> None:
    torch.manual_seed(0)
    fast = graphopt.compile(
        Gated().eval(),
        example_inputs=(torch.randn(4, WIDTH),),
        passes=["Canonicalize", "MergeProjections", QuantizeMatmul(activations=None)],
        measure=False,
    )
    (layer,) = told(fast).layers
    assert set(layer.names) == {"gate.weight", "up.weight"}
    assert layer.shape == (2 * WIDTH, WIDTH)


def test_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()).eval()
    fast = quantized(model, torch.randn(2, 8, 7, 7), activations=None)
    (layer,) = told(fast).layers
    assert (layer.operators, layer.shape, layer.names) == (("conv",), (16, 8, 3, 3), ("0.weight",))
    assert layer.bytes_before == 4 * 16 * 8 * 9
    assert layer.sqnr is not None and 35 < layer.sqnr < 60


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, 24) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight).sin()


def test_experts() -> None:
    torch.manual_seed(0)
    fast = quantized(Experts().eval(), torch.randn(3, 5, WIDTH), activations=None)
    (layer,) = told(fast).layers
    assert (layer.operators, layer.shape, layer.names) == (
        ("experts",),
        (3, WIDTH, 24),
        ("weight",),
    )


def test_what_is_left_in_floats_says_why() -> None:
    model, ids = net(), tokens()
    fast = quantized(model, ids, skip="up", **FOUR)
    rows = {row.names[0]: row for row in told(fast).floats}
    assert list(rows) == ["words.weight", "up.weight", "head.weight"]
    assert [layer.names for layer in told(fast).layers] == [("down.weight",)]
    assert "tables are quantized where that is asked for" in rows["words.weight"].reason
    assert rows["words.weight"].option == "QuantizeMatmul:embeddings=True"
    assert rows["up.weight"].reason == "`up.weight` is skipped by 'up'"
    assert rows["head.weight"].option == "QuantizeMatmul:head=True"
    assert rows["head.weight"].bytes == 4 * WIDTH * CLASSES


def test_what_was_taken_back_says_why() -> None:
    """One input a thousand times the others, which is never seen: its group loses all else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 32), nn.Tanh()).eval()
    with torch.no_grad():
        model[1].weight[:, 5] *= 1000
        model[0].weight[5] = 0.0
    found = told(quantized(model, torch.randn(4, WIDTH), bits=4, activations=None))
    assert found.layers == () and found.outputs == ()
    (row,) = found.floats
    assert (row.names, row.stage) == (("1.weight",), "verify")
    assert row.option == "QuantizeMatmul:tolerance" and "error above the bound" in row.reason


def test_a_weight_that_no_rule_looks_at() -> None:
    """A buffer is a weight only where a rule takes it for one."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.table = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(4, WIDTH))
            self.register_buffer("mask", torch.rand(4, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return (self.linear(x) * self.table + self.mask).sin()

    torch.manual_seed(0)
    fast = quantized(Scaled().eval(), torch.randn(4, WIDTH), activations=None)
    (row,) = told(fast).floats
    assert row.names == ("table",)
    assert row.reason == "no rule looks at what `aten.mul.Tensor` reads"


def test_exact_weights() -> None:
    """Integers up to 127 are what int8 stores."""
    layer = nn.Linear(WIDTH, 8)
    codes = torch.randint(-9, 10, (8, WIDTH), generator=torch.Generator().manual_seed(0))
    codes[:, 0] = 127
    with torch.no_grad():
        layer.weight.copy_(codes)
        layer.bias.zero_()
    model = nn.Sequential(layer, nn.ReLU()).eval()
    fast = quantized(model, torch.ones(2, WIDTH), activations=None)
    (row,) = told(fast).layers
    assert (row.error, row.sqnr) == (0.0, None)
    assert row.cosine == pytest.approx(1.0)
    report = Report.from_json(fast.report.to_json())
    assert report.quantization == fast.report.quantization
    assert not any("null" in note for note in report.notes)


def test_remarks_of_methods_stand_with_their_weights() -> None:
    fast = quantized(net(), tokens(), **FOUR, method="lowrank", rank=2)
    rows = by_name(fast)
    assert rows["up.weight"].bytes_beside == 2 * 2 * (96 + WIDTH)  # rank 2, in float16
    assert f"{rows['up.weight'].bytes_beside} bytes" in rows["up.weight"].note
    assert not any("bytes" in note for note in fast.report.notes)


def test_time_is_measured_where_it_is_asked_for() -> None:
    timed, plain = (told(quantized(net(), tokens(), **FOUR, measure=m)) for m in (True, False))
    assert timed.seconds_before and timed.seconds_after
    assert (plain.seconds_before, plain.seconds_after) == (None, None)


def test_exact_passes_quantize_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    assert graphopt.explain(model, example_inputs=(torch.ones(2, 4),)).quantization is None


class Pair(NamedTuple):
    start_logits: Tensor
    pooled: Tensor


class Returns(nn.Module):
    """What a function makes of two products."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 5), nn.Linear(8, 1)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.first(x), self.second(x))


RETURNS = [
    (lambda a, _b: a, [""], [True]),
    (lambda a, b: (a, b), ["", ""], [True, False]),
    (lambda a, _b: a.log_softmax(-1), [""], [True]),
    (lambda a, _b: a.softmax(-1), [""], [False]),
    (lambda a, _b: a.unflatten(0, (1, -1)), [""], [True]),
    (lambda a, b: {"embedding": a, "logits": b}, ["embedding", "logits"], [False, False]),
    (lambda a, _b: {"head": (a.tanh(), a)}, ["head.0", "head.1"], [False, False]),
    (lambda a, _b: {"out": {"logits": a.tanh()}}, ["out.logits"], [True]),
    (lambda a, b: Pair(a.tanh(), b), ["start_logits", "pooled"], [True, False]),
    (lambda a, _b: a.argmax(-1), [""], [False]),
]


@pytest.mark.parametrize(("function", "names", "logits"), RETURNS)
def test_which_outputs_are_logits(function: Any, names: list[str], logits: list[bool]) -> None:
    program = capture(Returns(function).eval(), (torch.ones(2, 8),))
    assert output_names(program) == names
    pairs = zip(program.user_outputs(), names, strict=True)
    assert [is_logits(*pair) for pair in pairs] == logits
