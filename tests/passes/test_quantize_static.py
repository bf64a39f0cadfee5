"""Static activations, end to end: calibrated, verified, saved, written, and what has no range."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from quantize_models import Experts
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.capture import capture
from graphopt.cli import main
from graphopt.errors import GraphoptError, RecipeError
from graphopt.kernels.quantized.activation_ranges import between
from graphopt.passes import QuantizeMatmul
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import convolution_examples, examples
from graphopt.passes.quantize.weights import QuantizeWeights
from graphopt.presets import resolve
from graphopt.rewrite import Example, arguments
from graphopt.rewrite.driver import apply_rules

WIDTH = 64
STATIC = QuantizeMatmul(activations="static")


class Layers(nn.Module):
    """A residual block; two products read one value."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x + self.down(F.gelu(self.left(x)) * self.right(x)), (WIDTH,))


def model() -> Layers:
    torch.manual_seed(0)
    return Layers().eval()


def batches(count: int = 4, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 16, WIDTH, generator=generator) for _ in range(count)]


def quantized(step: QuantizeMatmul = STATIC, module: Any = None, **options: Any) -> Any:
    given: dict[str, Any] = {"calibration": batches(), "measure": False, **options}
    given.setdefault("example_inputs", (batches(1)[0],))
    return graphopt.compile(module or model(), passes=["Canonicalize", step], **given)


def calls(fast: Any) -> list[dict[str, Any]]:
    nodes = [n for n in fast.program.graph.nodes if "quantized" in str(n.target)]
    return [arguments(node) for node in nodes]


def off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def test_each_product_has_the_range_of_its_input() -> None:
    fast, seen = quantized(QuantizeMatmul(activations="static", ranges="minmax")), batches()
    left, right, down = calls(fast)
    stacked = torch.cat(seen)
    given = between(float(stacked.min()), float(stacked.max()))
    assert (left["input_scale"], left["input_zero"]) == given
    assert (right["input_scale"], right["input_zero"]) == given  # one value has one scale
    with torch.no_grad():
        inner = torch.cat([F.gelu(fast_left(fast, x)) for x in seen])
    assert 0 < down["input_scale"] < 10 * float(inner.abs().max())
    assert fast.report.verified and not fast.report.missed
    layers = fast.report.quantization.layers
    assert [layer.activations for layer in layers] == ["static"] * 3
    assert all(layer.error and layer.error < 0.03 and not layer.note for layer in layers)
    x = batches(1, seed=7)[0]
    assert off(fast(x), model()(x)) < 0.02


def fast_left(_fast: Any, x: Tensor) -> Tensor:
    return model().left(x)


def test_it_is_what_the_definition_gives() -> None:
    """Weights as they are stored, inputs as codes stand for them, all in float64."""
    fast, x = quantized(), batches(1, seed=7)[0]
    held = dict(fast.program.state.items())

    def product(name: str, given: Tensor, call: dict[str, Any]) -> Tensor:
        codes, scales = held[f"{name}.weight_codes"], held[f"{name}.weight_scales"]
        weight = codes.double() * scales.double()
        code = (given / call["input_scale"]).round() + call["input_zero"]
        numbers = (code.clamp(0, 255) - call["input_zero"]) * call["input_scale"]
        return numbers @ weight.t() + held[f"{name}.bias"].double()

    left, right, down = calls(fast)
    wide = x.double()
    inner = F.gelu(product("left", wide, left)) * product("right", wide, right)
    wanted = F.layer_norm(wide + product("down", inner, down), (WIDTH,))
    assert off(fast(x).double(), wanted) < 2e-4  # a code may differ where a number is half way
    wrong = {**down, "input_scale": down["input_scale"] * 1.01}
    wanted = F.layer_norm(wide + product("down", inner, wrong), (WIDTH,))
    assert off(fast(x).double(), wanted) > 5e-4


OPTIONS: list[dict[str, Any]] = [
    {"ranges": "percentile"},
    {"bits": 4, "group_size": 32},
    {"bits": 4, "group_size": 32, "symmetric": False, "method": "gptq"},
    {"method": "smoothquant"},
    {"method": "outliers+lowrank"},
    {"bits": 4, "group_size": 32, "method": "rtn+learned", "steps": 3},
    {"bits": (4, 8), "size": "40%"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_methods_and_formats(options: dict[str, Any]) -> None:
    fast = quantized(QuantizeMatmul(activations="static", **options))
    assert fast.report.verified
    assert {call["activations"] for call in calls(fast)} == {"static"}
    x = batches(1, seed=7)[0]
    assert off(fast(x), model()(x)) < 0.1


def test_formats_by_name() -> None:
    step = QuantizeMatmul(
        layers={"down": {"activations": "static"}, "right": None}, ranges="minmax"
    )
    fast = quantized(step)
    assert [call["activations"] for call in calls(fast)] == ["dynamic", "static"]
    step = QuantizeMatmul(activations="static", layers={"down": {"activations": None}}, skip="left")
    assert [call["activations"] for call in calls(quantized(step))] == ["static", "none"]


def all_examples() -> Iterator[Example]:
    yield from examples.examples()
    yield from convolution_examples.examples()


@pytest.mark.parametrize("case", all_examples(), ids=lambda case: case.name)
def test_examples(case: Example) -> None:
    torch.manual_seed(0)
    module, inputs = case.module().eval(), case.inputs()
    program = capture(module, inputs, dynamic_shapes=case.dynamic_shapes)
    apply_rules(program, list(Canonicalize().rules()))
    stage = STATIC.stages()[-1]
    assert isinstance(stage, QuantizeWeights)
    learned = stage.calibrated(program, [list(inputs)], lambda _text: None)
    fast = graphopt.compile(
        module,
        example_inputs=inputs,
        dynamic_shapes=case.dynamic_shapes,
        calibration=[inputs],
        passes=["Canonicalize", STATIC],
        measure=False,
    )
    assert fast.report.verified
    grouped = {call["activations"] for call in calls(fast)} == {"none"}  # convolutions in groups
    assert grouped or sum(map(len, learned.plan.inputs.values())) >= len(calls(fast)) > 0
    with torch.no_grad():
        found, wanted = fast(*inputs), module(*inputs)
    for one, two in zip(
        (found,) if isinstance(found, Tensor) else found,
        (wanted,) if isinstance(wanted, Tensor) else wanted,
        strict=True,
    ):
        if one.is_floating_point():
            assert off(one.double(), two.double()) < 0.05


@pytest.mark.parametrize("case", examples.near_misses(), ids=lambda case: case.name)
def test_near_misses(case: Example) -> None:
    torch.manual_seed(0)
    module, inputs = case.module(), case.inputs()
    module.train(case.training)
    fast = graphopt.compile(
        module,
        example_inputs=inputs,
        calibration=[inputs],
        passes=["Canonicalize", STATIC],
        measure=False,
    )
    assert not calls(fast)
    if case.reason:
        assert any(case.reason in row.reason for row in fast.report.missed)


def test_it_is_saved_and_written(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    fast, x = quantized(), batches(1, seed=7)[0]
    graphopt.save(fast, tmp_path / "made.pt2")
    again = graphopt.load(tmp_path / "made.pt2")
    assert torch.equal(again(x), fast(x)) and again.report.verified
    for fuse in (True, False):
        file = tmp_path / f"{fuse}.onnx"
        graphopt.export_onnx(fast, file, fuse=fuse)
        (found,) = onnxruntime.InferenceSession(file).run(None, {"x": x.numpy()})
        assert off(torch.from_numpy(found), fast(x)) < 1e-3


def test_on_the_command_line_and_in_recipes(tmp_path: Path) -> None:
    spelled = "QuantizeMatmul:activations=static,ranges=minmax"
    (step,) = resolve([spelled])
    assert step == QuantizeMatmul(activations="static", ranges="minmax")
    fast = quantized(QuantizeMatmul(activations="static", ranges=99.9))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"passes": list(fast.report.recipe)}))
    steps = resolve(str(tmp_path / "recipe.yaml"))
    assert steps[-1] == QuantizeMatmul(activations="static", ranges=99.9)
    graphopt.save(graphopt.compile(model(), example_inputs=(batches(1)[0],)), tmp_path / "m.pt2")
    torch.save({"x": torch.cat(batches())}, tmp_path / "seen.pt")
    given = ["optimize", str(tmp_path / "m.pt2"), "--pass", spelled]
    with pytest.raises(SystemExit) as ended:
        main([*given, "-o", str(tmp_path / "o.pt2")])
    assert ended.value.code == 1
    assert not (tmp_path / "o.pt2").exists()
    calibrated = ["--calibration", str(tmp_path / "seen.pt"), "-o", str(tmp_path / "o.pt2")]
    main([*given, *calibrated])
    x = batches(1, seed=7)[0]
    assert off(graphopt.load(tmp_path / "o.pt2")(x), model()(x)) < 0.02


def test_without_calibration_it_says_what_to_pass() -> None:
    with pytest.raises(GraphoptError, match="activations='static' learns from") as caught:
        quantized(calibration=None)
    assert "calibration=[inputs, ...]" in str(caught.value)
    assert "activations='dynamic'" in str(caught.value)


def test_numbers_that_are_not_finite_are_named() -> None:
    seen = batches()
    seen[2][0, 0, 0] = torch.nan
    with pytest.raises(GraphoptError, match=r"calibration\[2\] gives NaN or infinity at `linear`"):
        quantized(calibration=seen)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_experts_that_are_never_asked_have_rows_of_their_own(method: str) -> None:
    torch.manual_seed(0)
    module = Experts(WIDTH).eval()
    seen, example = [torch.rand(8, WIDTH) for _ in range(3)], torch.rand(8, WIDTH)
    example[:4, 0] -= 1  # for the second
    fast = quantized(
        QuantizeMatmul(activations="static", method=method, tolerance=0.3),  # 0 to 1 is narrow
        module,
        example_inputs=(example,),
        calibration=seen,
    )
    asked, never = fast.report.quantization.layers
    assert [layer.activations for layer in (asked, never)] == ["static", "dynamic"]
    assert "calibration inputs show no range there" in never.note and not asked.note


def test_inputs_that_are_always_zero_have_rows_of_their_own() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x).tanh() + self.last((x - 100).relu()).tanh()

    fast = quantized(module=Silent().eval())
    assert [layer.activations for layer in fast.report.quantization.layers] == ["static", "dynamic"]
    assert fast.report.verified


def test_inputs_beyond_what_was_calibrated_are_kept_in_float_or_saturate() -> None:
    """Inputs at hand that are ten times as large as those of calibration show what it costs."""
    small = [x / 10 for x in batches()]
    fast = quantized(
        QuantizeMatmul(activations="static", skip=("right", "down")), calibration=small
    )
    assert not calls(fast)
    row = next(r for r in fast.report.missed if r.weights and "left.weight" in r.weights)
    assert "static range" in row.reason
    fast = quantized(QuantizeMatmul(activations="static", tolerance=2.0))
    assert fast(batches(1)[0] * 1e4).isfinite().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ranges": "minmax"}, "ranges are those of activations='static'"),
        ({"activations": "static", "ranges": "most"}, "not one of mse, minmax, percentile"),
        ({"activations": "static", "ranges": 12.0}, "no percentile between 50 and 100"),
        ({"activations": "static", "dtype": "fp8"}, "fp8 weights have no static activations"),
        ({"activations": "static", "bits": 4, "dtype": "nf4"}, "nf4 weights have no static"),
        ({"layers": {"a": {"activations": "fixed"}}}, "should be 'dynamic', 'static' or None"),
    ],
    ids=str,
)
def test_options_that_do_not_go_together(options: dict[str, Any], told: str) -> None:
    with pytest.raises((ValueError, RecipeError), match=told):
        QuantizeMatmul(**options)
