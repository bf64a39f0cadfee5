"""AdaRound and FlexRound as methods: blocks come nearer, and what they go together with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_quantize_learned import batches, compiled, error, prepared, stack

import graphopt
from graphopt.kernels.quantized.adaround import AdaRound
from graphopt.kernels.quantized.flexround import FlexRound
from graphopt.passes import QuantizeMatmul
from graphopt.passes.quantize import blocks
from graphopt.passes.quantize.learned import Reconstruction
from graphopt.passes.quantize.methods import methods
from graphopt.rewrite.passes import parse_pass

NAMES = ("adaround", "flexround")


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3, "group_size": 16},
        {"bits": 2, "group_size": 16, "symmetric": False},
        {"bits": 4, "dtype": "nf4", "group_size": 16},
        {"bits": 4, "dtype": "mxfp4"},
        {"bits": 3, "activations": "dynamic"},
    ],
    ids=str,
)
def test_blocks_come_nearer(options: dict[str, Any]) -> None:
    plain = error(compiled(stack(), batches(), method="rtn", **options), stack())
    for method, most in (("adaround", 0.8), ("flexround", 0.9)):
        fast = compiled(stack(), batches(), method=method, **options)
        assert fast.report.verified
        assert [a.rule for a in fast.report.applied].count("QuantizeLinear") == 6
        assert error(fast, stack()) < most * plain, method
        told = [n for n in fast.report.quantization.notes if "before it was learned" in n]
        assert len(told) == 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_", ["hqq", "gptq", "awq", "rotate", "gptq+propagate"])
def test_other_methods_go_first(name: str, with_: str) -> None:
    options: dict[str, Any] = {"bits": 3, "group_size": 16, "symmetric": False, "steps": 50}
    both = compiled(stack(), batches(), method=f"{with_}+{name}", **options)
    options.pop("steps")
    alone = compiled(stack(), batches(), method=with_, **options)
    assert both.report.verified
    assert error(both, stack()) < 0.99 * error(alone, stack())


def test_gptq_is_where_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its codes, and not those that are nearest."""
    seen = []

    class Watched(Reconstruction):
        def learn(self) -> Any:
            if isinstance(next(iter(self.weights.values())), AdaRound | FlexRound):
                seen.extend(weight.read().detach() for weight in self.weights.values())
            return super().learn()

    monkeypatch.setattr(blocks, "Reconstruction", Watched)
    plan = prepared(stack(1), method="gptq+adaround", steps=1)[0].run(lambda _text: None)
    assert len(plan.weights) == 3
    other = prepared(stack(1), method="gptq+flexround", steps=1)[0].run(lambda _text: None)
    assert len(other.weights) == 3
    # inputs of all three are those of the float model and of GPTQ before anything is learned
    calibration, _ = prepared(stack(1), method="gptq+norms", steps=1)
    plain = calibration.run(lambda _text: None)
    for first, second, name in zip(seen[:3], seen[3:], plain.weights, strict=True):
        torch.testing.assert_close(first, plain.weights[name].dequantize())
        torch.testing.assert_close(second, plain.weights[name].dequantize())


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_repeats_it_and_a_file_holds_it(name: str, tmp_path: Path) -> None:
    step = parse_pass(f"QuantizeMatmul:bits=3,activations=null,method={name},steps=10,head=true")
    assert (step.method, step.steps) == (name, 10)
    data = batches(2)

    def made(passes: Any) -> Any:
        return graphopt.compile(
            stack(), example_inputs=(data[0],), calibration=data, passes=passes, measure=False
        )

    one = made(["Canonicalize", step])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"passes:\n- Canonicalize\n- QuantizeMatmul:\n{_yaml(step)}")
    two = made(str(recipe))
    again = graphopt.load(graphopt.save(one, tmp_path / "q.pt2"))
    third = made(["Canonicalize", step])
    third.load_state_dict(one.state_dict())
    for other in (two, again, third):
        assert torch.equal(other(data[1]), one(data[1]))
    for key, tensor in one.state_dict().items():
        assert torch.equal(two.state_dict()[key], tensor)


def _yaml(step: Any) -> str:
    given = {"bits": 3, "activations": "null", "method": step.method, "steps": 10, "head": "true"}
    return "".join(f"    {key}: {value}\n" for key, value in given.items())


def test_names() -> None:
    for name in NAMES:
        assert methods(name) == methods(f"rtn+{name}")
        assert methods(name).calibrated == (name,)
        assert methods(f"{name}+awq+gptq").calibrated == ("awq", "gptq", name)
        assert methods(f"propagate+{name}").rounding == "gptq"
        assert methods(name).learns_codes and methods(f"gptq+{name}").learns_codes
        for options, reason in (
            ({"method": f"{name}+learned"}, "both learn"),
            ({"method": f"{name}+outliers"}, f"{name} learns codes alone"),
            ({"method": f"{name}+lowrank"}, f"{name} learns codes alone"),
            ({"method": name, "steps": 0}, "at least one"),
        ):
            with pytest.raises(ValueError, match=reason):
                QuantizeMatmul(**options)
        QuantizeMatmul(dtype="mxfp4", bits=4, activations=None, method=f"gptq+{name}")
    assert not methods("learned").learns_codes
