"""Weights learned block by block."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantize_models import Experts
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.passes import QuantizeMatmul
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import blocks
from graphopt.passes.quantize.blocks import BlockCalibration
from graphopt.passes.quantize.learned import Reconstruction
from graphopt.passes.quantize.methods import methods
from graphopt.passes.quantize.weights import QuantizeWeights
from graphopt.program import Program
from graphopt.rewrite.driver import apply_rules
from graphopt.rewrite.passes import parse_pass

WIDTH = 32


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(3 * self.gate(y)) * self.up(y))


class Stack(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.layer_norm(x, (WIDTH,))


def stack(depth: int = 2) -> Stack:
    torch.manual_seed(0)
    return Stack(depth).eval()


def batches(count: int = 8, seed: int = 1, rows: tuple[int, ...] = (128,)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.rand(WIDTH, generator=generator)
    generator.manual_seed(seed)
    sizes = (rows[i % len(rows)] for i in range(count))
    return [torch.randn(size, WIDTH, generator=generator) @ mix / 4 for size in sizes]


def compiled(model: nn.Module, data: list[Any], **options: Any) -> Any:
    options = {"activations": None, **options}
    dynamic = options.pop("dynamic_shapes", None)
    calibrates = bool(methods(options["method"]).calibrated)
    return graphopt.compile(
        model,
        example_inputs=(data[0],),
        dynamic_shapes=dynamic,
        calibration=data if calibrates else None,
        passes=["Canonicalize", QuantizeMatmul(**options)],
        measure=False,
    )


def error(fast: Any, model: nn.Module) -> float:
    """On inputs that were not calibrated on."""
    with torch.no_grad():
        pairs = [(fast(x), model(x)) for x in batches(4, seed=7)]
    return float(sum((a - b).float().square().sum() for a, b in pairs)) ** 0.5


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "group_size": 16},
        {"bits": 2, "group_size": 16, "symmetric": False},
        {"bits": 4, "dtype": "nf4", "group_size": 16},
        {"bits": 3, "activations": "dynamic"},
    ],
    ids=str,
)
def test_blocks_come_nearer(options: dict[str, Any]) -> None:
    kinds = ("rtn", "rtn+learned", "gptq", "learned")
    found = {}
    for method in kinds:
        fast = compiled(stack(), batches(), method=method, **options)
        assert [a.rule for a in fast.report.applied].count("QuantizeLinear") == 6
        found[method] = error(fast, stack())
    assert found["rtn+learned"] < 0.85 * found["rtn"], found
    assert found["learned"] < 0.99 * found["gptq"], found
    told = [n for n in fast.report.quantization.notes if "before it was learned" in n]
    assert len(told) == 6


def prepared(
    model: nn.Module, data: list[Tensor] | None = None, example: Any = None, **options: Any
) -> tuple[BlockCalibration, Program]:
    data = data or batches(2)
    program = capture(model, example or (data[0],))
    apply_rules(program, list(Canonicalize().rules()))
    step = QuantizeMatmul(
        **{"bits": 3, "activations": None, "method": "learned", "head": True, **options}
    )
    stage = step.stages()[-1]
    assert isinstance(stage, QuantizeWeights)
    samples = [[b] for b in data]
    return BlockCalibration(program, stage.matches(program), samples, stage.settings), program


def test_targets_are_of_the_float_model_and_inputs_of_the_quantized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    class Watched(Reconstruction):
        def learn(self) -> Any:
            numbers = {n: torch.zeros_like(w.read()) for n, w in self.weights.items()}
            with torch.no_grad():
                seen.append(([t[0] for t in self.targets], self.forward(0, numbers)[0]))
            return super().learn()

    monkeypatch.setattr(blocks, "Reconstruction", Watched)
    calibration, program = prepared(stack())
    plan = calibration.run(lambda _text: None)
    small, x = stack(), batches(2)
    with torch.no_grad():
        firsts = [stack().layers[0](b) for b in x]
        for name in ("gate", "up", "down"):
            numbers = plan.weights[f"layers.0.{name}.weight"].dequantize()
            getattr(small.layers[0], name).weight.copy_(numbers)
        for index in range(2):
            torch.testing.assert_close(seen[0][0][index], firsts[index])
            torch.testing.assert_close(seen[1][0][index], stack().layers[1](firsts[index]))
        given = small.layers[0](x[0])  # a block without weights adds the bias of its last product
        torch.testing.assert_close(seen[1][1], given + small.layers[1].down.bias)
    for name, tensor in stack().state_dict().items():
        assert torch.equal(program.state[name], tensor)


def test_the_same_each_time_and_random_numbers_are_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    plans = []
    for _ in range(2):
        calibration, _ = prepared(stack(), steps=5)
        torch.set_rng_state(before)
        plans.append(calibration.run(lambda _text: None))
        assert torch.equal(torch.get_rng_state(), before)
        torch.randn(3)
    for name, one in plans[0].weights.items():
        for key, tensor in one.tensors.items():
            assert torch.equal(tensor, plans[1].weights[name].tensors[key])


def test_half_precision_and_samples_of_different_lengths() -> None:
    data = [b.bfloat16() for b in batches(4, rows=(64, 7, 128))]
    model = stack().bfloat16()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    options: dict[str, Any] = {"bits": 3, "group_size": 16, "dynamic_shapes": dynamic}
    fast = compiled(model, data, method="rtn+learned", steps=20, **options)
    assert sum("before it was learned" in n for n in fast.report.quantization.notes) == 6
    assert fast(data[1]).dtype == torch.bfloat16
    plain = compiled(model, data, method="rtn", **options)
    with torch.no_grad():
        found = [
            sum(float((f(x) - model(x)).float().square().sum()) for x in data)
            for f in (fast, plain)
        ]
    assert found[0] < found[1]


def test_an_expert_that_saw_nothing_is_rounded() -> None:
    torch.manual_seed(0)
    data = [torch.rand(16, WIDTH) for _ in range(3)]
    calibration, _ = prepared(Experts(WIDTH).eval(), data, (torch.randn(16, WIDTH),), steps=5)
    plan = calibration.run(lambda _text: None)
    assert set(plan.weights) == {"experts.0.weight", "experts.1.weight"}
    assert "saw no calibration rows" in plan.notes["experts.1.weight"]
    assert "before it was learned" in plan.notes["experts.0.weight"]


class Twice(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.own(self.shared(self.shared(x).sin()))) * 2


def test_a_weight_of_several_blocks_is_not_learned() -> None:
    torch.manual_seed(0)
    plan = prepared(Twice().eval(), steps=5)[0].run(lambda _text: None)
    assert "several blocks" in plan.notes["shared.weight"]
    assert "before it was learned" in plan.notes["own.weight"]


def test_a_block_without_a_gradient_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: Any) -> Any:
        raise RuntimeError("derivative for aten::some is not implemented")

    monkeypatch.setattr(blocks.Reconstruction, "learn", refuse)
    plan = prepared(stack(), steps=5)[0].run(lambda _text: None)
    assert len(plan.weights) == 6
    assert all("derivative for aten::some" in note for note in plan.notes.values())


def test_inputs_that_hold_nan_are_named() -> None:
    data = batches(3)
    data[2][0, 0] = torch.nan
    with pytest.raises(GraphoptError, match=r"calibration\[2\] gives NaN"):
        compiled(stack(), data, method="learned", bits=3)
    with pytest.raises(GraphoptError, match="gptq and learned learns from calibration inputs"):
        graphopt.compile(
            stack(), example_inputs=(data[0],), passes=[QuantizeMatmul(method="learned")]
        )


def test_options() -> None:
    assert methods("learned") == methods("gptq+learned")
    assert methods("awq+learned").calibrated == ("awq", "gptq", "learned")
    assert parse_pass("QuantizeMatmul:method=learned,steps=20").steps == 20
    assert QuantizeMatmul(method="learned").settings.steps == 100
    for options, reason in (
        ({"steps": 20}, "steps are those of"),
        ({"steps": 0, "method": "learned"}, "at least one"),
        ({"dtype": "mxfp4", "bits": 4, "activations": None, "method": "learned"}, "rtn.learned"),
    ):
        with pytest.raises(ValueError, match=reason):
            QuantizeMatmul(**options)
    QuantizeMatmul(dtype="mxfp4", bits=4, activations=None, method="rtn+learned")
