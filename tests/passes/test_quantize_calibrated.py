"""Methods that learn from calibration inputs, end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantize_models import Experts
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.capture import capture
from graphopt.errors import GraphoptError, RecipeError
from graphopt.passes import QuantizeMatmul
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize.methods import methods
from graphopt.passes.quantize.weights import QuantizeWeights
from graphopt.pipeline import state_bytes
from graphopt.presets import resolve
from graphopt.rewrite.driver import apply_rules
from graphopt.rewrite.passes import parse_pass

WIDTH = 64


class Layers(nn.Module):
    """Two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(F.gelu(up(x)))
        return F.layer_norm(x, (WIDTH,))


def model() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def batches(count: int = 6, seed: int = 1) -> list[Tensor]:
    """Their channels are correlated, and of unequal size."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.rand(WIDTH, generator=generator)
    generator.manual_seed(seed)
    return [torch.randn(4, 32, WIDTH, generator=generator) @ mix / 4 for _ in range(count)]


def quantized(**options: Any) -> Any:
    calibration = options.pop("calibration", None)
    passes = ["Canonicalize", QuantizeMatmul(activations=None, **options)]
    return graphopt.compile(
        model(),
        example_inputs=(batches(1)[0],),
        calibration=calibration,
        passes=passes,
        measure=False,
    )


def error(fast: Any) -> float:
    """On inputs that were not calibrated on."""
    with torch.no_grad():
        pairs = [(fast(x), model()(x)) for x in batches(3, seed=7)]
    return float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": 4, "group_size": 32, "symmetric": False},
        {"bits": 3, "group_size": 32},
        {"bits": 4, "dtype": "nf4", "group_size": 32},
    ],
    ids=str,
)
def test_gptq_is_nearer_than_rounding(options: dict[str, Any]) -> None:
    calibrated = quantized(method="gptq", calibration=batches(), **options)
    plain = quantized(**options)
    assert [a.rule for a in calibrated.report.applied].count("QuantizeLinear") >= 4
    assert error(calibrated) < 0.8 * error(plain)
    sizes = [state_bytes(f.program) for f in (calibrated, plain)]
    assert sizes[0] == sizes[1]


def test_later_weights_make_good_what_earlier_ones_lost() -> None:
    """Each weight is calibrated on what the quantized layers before it give."""
    program = capture(model(), (batches(1)[0],))
    apply_rules(program, list(Canonicalize().rules()))
    samples = [[b] for b in batches()]
    stage = QuantizeMatmul(bits=3, activations=None, method="gptq").stages()[-1]
    assert isinstance(stage, QuantizeWeights)
    learned = stage.calibrated(program, samples, lambda _text: None)
    assert isinstance(learned, QuantizeWeights)
    first = learned.plan.weights["ups.0.weight"].dequantize()
    program.state["ups.0.weight"] = first
    again = stage.calibrated(program, samples, lambda _text: None)
    assert isinstance(again, QuantizeWeights)
    one, two = (s.plan.weights["downs.0.weight"].dequantize() for s in (learned, again))
    apart = (one - two).abs() > 1e-6
    assert apart.float().mean() < 0.02  # a program that starts with the quantized weight agrees


def test_dynamic_activations_are_calibrated_with() -> None:
    fast = graphopt.compile(
        model(),
        example_inputs=(batches(1)[0],),
        calibration=batches(),
        passes=["Canonicalize", QuantizeMatmul(bits=4, group_size=32, method="gptq")],
        measure=False,
    )
    assert fast.report.verified
    assert {n.args[-1] for n in fast.program.graph.nodes if "quantized" in n.name} == {"dynamic"}


def test_without_calibration_it_says_what_to_do() -> None:
    with pytest.raises(GraphoptError, match="learns from calibration inputs; there are none") as e:
        quantized(bits=4, method="gptq")
    assert "calibration=" in str(e.value.fix)
    with pytest.raises(GraphoptError, match="none"):
        quantized(bits=4, method="gptq", calibration=[])


def test_calibration_that_does_not_fit() -> None:
    wrong = [*batches(5), torch.randn(4, 32, WIDTH + 1)]
    with pytest.raises(GraphoptError) as caught:
        quantized(bits=4, method="gptq", calibration=wrong)
    assert caught.value.where == "calibration[5]"
    bad = batches(6)
    bad[5][0, 0, 0] = torch.nan
    with pytest.raises(GraphoptError, match=r"calibration\[5\] gives NaN"):
        quantized(bits=4, method="gptq", calibration=bad)


def test_an_expert_that_saw_nothing_is_rounded_and_says_so() -> None:
    torch.manual_seed(0)
    positive = [torch.rand(16, WIDTH) for _ in range(3)]
    fast = graphopt.compile(
        Experts(WIDTH).eval(),
        example_inputs=(torch.randn(16, WIDTH),),
        calibration=positive,
        passes=["Canonicalize", QuantizeMatmul(bits=4, activations=None, method="gptq")],
        measure=False,
    )
    told = [note for note in fast.report.quantization.notes if "saw no calibration rows" in note]
    assert len(told) == 1
    assert "experts.1.weight" in told[0]


def test_names_of_methods() -> None:
    assert methods("gptq").rounding == methods(["gptq"]).rounding == "gptq"
    assert parse_pass("QuantizeMatmul:bits=4,activations=null,method=gptq").method == "gptq"
    for given, reason in (
        ("gptqq", "'gptqq' is not one of"),
        ("gptq+gptq", "twice"),
        (["rtn", "gptq"], "rtn and gptq both round"),
        ("gptq+learned+outliers", "learned learns codes alone"),
    ):
        with pytest.raises(ValueError, match=reason):
            methods(given)
    with pytest.raises(RecipeError, match="'awk' is not one of"):
        resolve([{"QuantizeMatmul": {"method": "awk"}}])
    with pytest.raises(RecipeError, match="symmetric=False"):
        resolve(["QuantizeMatmul:bits=4,activations=null,method=hqq"])


class Gated(nn.Module):
    """A gated block behind a norm, some of whose channels are much larger than others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        with torch.no_grad():
            self.norm.weight[::8] *= 30
            self.up.weight[::16] *= 20

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return F.layer_norm(x + self.down(F.silu(self.gate(y)) * self.up(y)), (WIDTH,))


@pytest.mark.parametrize("method", ["awq", "smoothquant", "awq+gptq"])
def test_factors_between_layers_help(method: str) -> None:
    torch.manual_seed(0)
    gated = Gated().eval()
    options: dict[str, Any] = {"bits": 4, "group_size": 32, "activations": None}
    if method == "smoothquant":
        options = {"bits": 8, "activations": "dynamic"}
    found = {}
    for name in ("rtn", method):
        fast = graphopt.compile(
            gated,
            example_inputs=(batches(1)[0],),
            calibration=batches(),
            passes=["Canonicalize", QuantizeMatmul(method=name, **options)],
            measure=False,
        )
        with torch.no_grad():
            pairs = [(fast(x), gated(x)) for x in batches(3, seed=7)]
        found[name] = float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5
    rules = [a.rule for a in fast.report.applied]
    assert (rules.count("ScaleChannels"), rules.count("QuantizeLinear")) == (2, 3)
    assert found[method] < 0.75 * found["rtn"], found


def test_channels_that_cannot_be_scaled_say_why() -> None:
    fast = quantized(bits=4, method="awq", calibration=batches())
    told = [m for m in fast.report.missed if m.rule == "ScaleChannels"]
    assert len(told) == 4
    assert sum("aten.gelu: " in m.reason for m in told) == 2
    assert all("no factors come from there" in m.reason for m in told)


def test_half_precision_takes_powers_of_two() -> None:
    torch.manual_seed(0)
    gated = Gated().bfloat16().eval()
    data = [b.bfloat16() for b in batches()]
    fast = graphopt.compile(
        gated,
        example_inputs=(data[0],),
        calibration=data,
        passes=[
            "Canonicalize",
            QuantizeMatmul(bits=4, group_size=32, activations=None, method="awq"),
        ],
        measure=False,
    )
    assert [a.rule for a in fast.report.applied].count("ScaleChannels") == 2
    ratio = (fast.state_dict()["norm.weight_folded"] / gated.norm.weight).float().log2()
    assert torch.equal(ratio, ratio.round())
    assert ratio.unique().numel() > 1
