"""Scales and shifts of norms that make good what weights lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from generated.harness import Only, run_example
from test_quantize_learned import WIDTH, Layer, batches, compiled, error, prepared, stack
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import GraphoptError
from graphopt.kernels.quantized import QuantizedWeight, Scheme
from graphopt.passes import QuantizeMatmul
from graphopt.passes.quantize import tweaks
from graphopt.passes.quantize.learned import Reconstruction
from graphopt.passes.quantize.methods import methods
from graphopt.passes.quantize.norms import Affine, TweakNorm
from graphopt.passes.quantize.plan import Plan
from graphopt.passes.quantize.ranges import Ranges
from graphopt.passes.quantize.tweaks import Distribution, LearnedVector
from graphopt.passes.quantize.weights import QuantizeWeights
from graphopt.pipeline import Context, run_pass
from graphopt.rewrite.passes import parse_pass

THREE: dict[str, Any] = {"bits": 3, "group_size": 16}


def found(kind: torch.dtype = torch.float32) -> dict[str, Affine]:
    scale, shift = (torch.linspace(a, a + 0.02, 8).to(kind) for a in (1.0, 0.0))
    return {
        "norm.weight": Affine("changed", scale, shift),
        "rms.weight": Affine("changed", scale),
    }


@pytest.mark.parametrize("example", list(TweakNorm({}).examples()), ids=lambda e: e.name)
def test_norms_are_changed(example: Any) -> None:
    rule = TweakNorm(found(torch.bfloat16 if example.name == "half" else torch.float32))
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert len(outcome.report.applied) == 1
    assert outcome.sound
    changed = [n for n in outcome.after.state if n.endswith("_folded")]
    assert len(changed) == (1 if example.name == "rms norm" else 2)
    assert "changed" in outcome.report.notes[0]


@pytest.mark.parametrize("example", list(TweakNorm({}).near_misses()), ids=lambda e: e.name)
def test_norms_that_are_left_alone(example: Any) -> None:
    known = {} if example.name == "not calibrated" else found()
    outcome = run_example(example, Only(TweakNorm(known)))
    assert outcome.report.applied == []
    reasons = [m.reason for m in outcome.report.missed]
    assert any(example.reason in reason for reason in reasons), reasons


def test_a_change_that_is_no_tweak_is_taken_back() -> None:
    far = {"norm.weight": Affine("far", torch.full((8,), 1.5), torch.zeros(8))}
    example = next(iter(TweakNorm({}).examples()))
    program = capture(example.module().eval(), example.inputs())
    context = Context.of(program, measure=False)
    run_pass(program, Only(TweakNorm(far)), context)
    assert context.report.applied == []
    assert "allowed 0.1" in context.report.missed[0].reason


def alone(patch: pytest.MonkeyPatch, **options: Any) -> Any:
    """The same without a change of norms."""
    with patch.context() as inner:
        inner.setattr(tweaks, "SHARES", (0.0,))
        return compiled(stack(), batches(), **options)


@pytest.mark.parametrize(
    ("options", "most"),
    [(THREE, 0.99), ({"bits": 4, "group_size": 16}, 0.97), ({"bits": 4, "dtype": "nf4"}, 0.998)],
    ids=str,
)
def test_it_is_nearer_than_without(
    options: dict[str, Any], most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = alone(monkeypatch, method="rtn+norms", **options)
    assert not any(a.rule == "TweakNorm" for a in plain.report.applied)
    fast = compiled(stack(), batches(), method="rtn+norms", **options)
    rules = [a.rule for a in fast.report.applied]
    assert rules.count("TweakNorm") >= 1
    assert rules.count("QuantizeLinear") == 6
    assert fast.report.verified
    assert error(fast, stack()) < most * error(plain, stack())
    assert error(plain, stack()) < error(
        compiled(stack(), batches(), method="rtn", **options), stack()
    )
    assert any("means and variances of its block are off by" in n for n in fast.report.notes)
    last = [m for m in fast.report.missed if m.rule == "TweakNorm"][-1]
    assert "no scale" in last.reason  # the last norm has none


def off(model: Any, data: list[Tensor]) -> tuple[float, float]:
    """Means and variances of channels, and values, beside those of the float model."""
    exact, statistics, values = stack(1).layers[0], 0.0, 0.0
    with torch.no_grad():
        for x in data:
            made, wanted = model(x), exact(x)
            pairs = ((made.mean(0), wanted.mean(0)), (made.var(0), wanted.var(0)))
            statistics += sum(float((a - b).abs().mean()) for a, b in pairs)
            values += float((made - wanted).square().sum())
    return statistics, values


def test_means_and_variances_come_nearer_and_values_do_not_go_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of the first block of two, by hand, on calibration inputs."""
    fast = compiled(stack(), batches(), method="rtn+norms", **THREE)
    plain = alone(monkeypatch, method="rtn+norms", **THREE)
    found = []
    for made in (plain, fast):
        layer = stack(1).layers[0]
        state = made.program.state
        with torch.no_grad():
            for name in ("weight", "bias"):
                value = state.get(f"layers.0.norm.{name}_folded")
                if value is not None:
                    getattr(layer.norm, name).copy_(value)
            for name in ("gate", "up", "down"):
                getattr(layer, name).weight.copy_(dense(made, f"layers.0.{name}.weight"))
        found.append(off(layer, batches()))
    assert found[1][0] < 0.9 * found[0][0]
    assert found[1][1] < found[0][1]


def dense(made: Any, name: str) -> Tensor:
    state = made.program.state
    codes, scales = state[f"{name}_codes"], state[f"{name}_scales"]
    return QuantizedWeight(Scheme(3, group_size=16), _width(name), codes, scales).dequantize()


def _width(name: str) -> int:
    return 2 * WIDTH if "down" in name else WIDTH


def test_the_loss_is_that_of_the_paper() -> None:
    torch.manual_seed(0)
    wanted, made = torch.randn(9, 5), torch.randn(9, 5)
    engine = Distribution(lambda _i, _w: [made], {}, [(wanted,)], 1)
    unit = float(wanted.square().mean()) ** 0.5
    exact = (made.mean(0) - wanted.mean(0)).abs().mean() / unit
    exact += (made.var(0, correction=0) - wanted.var(0, correction=0)).abs().mean() / unit**2
    torch.testing.assert_close(engine._loss(0, {}), exact)


def test_what_takes_values_apart_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where squared error falls nowhere on the way, the norm stays, and it is said."""
    monkeypatch.setattr(tweaks, "SHARES", (0.0, 1e4))
    fast = compiled(stack(), batches(), method="gptq+norms", **THREE)
    assert not any(a.rule == "TweakNorm" for a in fast.report.applied)
    reasons = [m.reason for m in fast.report.missed if m.rule == "TweakNorm"]
    assert sum("takes values apart" in reason for reason in reasons) == 2
    plain = compiled(stack(), batches(), method="gptq", **THREE)
    x = batches(1)[0]
    assert torch.equal(fast(x), plain(x))


@pytest.mark.parametrize("method", ["gptq", "learned", "adaround", "outliers", "awq+lowrank"])
def test_it_goes_behind_other_methods(method: str) -> None:
    data, options = batches(4), {**THREE, "steps": 20}
    fast = compiled(stack(), data, method=f"{method}+norms", **options)
    assert fast.report.verified
    assert [a.rule for a in fast.report.applied].count("QuantizeLinear") == 6
    assert sum("off by" in note for note in fast.report.notes) >= 1


def test_what_stands_beside_codes_stays() -> None:
    plan = prepared(stack(), method="outliers+norms", steps=3)[0].run(lambda _text: None)
    assert len(plan.remainders) == 6
    assert all(plan.remainders.values())


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_with_quantized_activations(activations: str) -> None:
    options: dict[str, Any] = {"bits": 4, "activations": activations, "method": "rtn+norms"}
    fast = compiled(stack(), batches(4), steps=20, **options)
    assert fast.report.verified
    assert any(a.rule == "TweakNorm" for a in fast.report.applied)


def test_later_blocks_see_norms_that_were_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watched(Distribution):
        def learn(self) -> Any:
            with torch.no_grad():
                seen.append(self.forward(0, {n: w.read() for n, w in self.weights.items()})[0])
            return super().learn()

    monkeypatch.setattr(tweaks, "Distribution", Watched)
    plan = prepared(stack(), method="rtn+norms", steps=20)[0].run(lambda _text: None)
    changed, model = plan.norms["layers.0.norm.weight"], stack()
    assert changed.scale is not None and changed.shift is not None
    with torch.no_grad():
        model.layers[0].norm.weight.copy_(changed.scale)
        model.layers[0].norm.bias.copy_(changed.shift)
        for name, stored in plan.weights.items():
            model.get_parameter(name).copy_(stored.dequantize())
        exact = model.layers[1](model.layers[0](batches(2)[0]))
    torch.testing.assert_close(seen[1], exact)


def test_ranges_are_those_behind_changed_norms() -> None:
    calibration, program = prepared(stack(), method="rtn", bits=8, activations="static")
    del calibration
    stage = QuantizeMatmul(activations="static").stages()[-1]
    assert isinstance(stage, QuantizeWeights)
    samples = [[x] for x in batches(2)]
    twice = {
        f"layers.{i}.norm.weight": Affine("", torch.full((WIDTH,), 2.0), torch.zeros(WIDTH))
        for i in range(2)
    }
    found = [
        Ranges(program, stage.targets(program), samples, Plan(norms=norms), "minmax")
        .run(lambda _text: None)
        .inputs["layers.0.gate.weight"][0]
        for norms in ({}, twice)
    ]
    assert found[0] is not None and found[1] is not None
    assert found[1].scale == pytest.approx(2 * found[0].scale)


def test_what_is_kept_is_judged_on_other_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Watched(Reconstruction):
        def lost(self) -> float:
            seen.append(("judged", self.targets))
            return super().lost()

    class Learned(Distribution):
        def learn(self) -> Any:
            seen.append(("taught", self.targets))
            return super().learn()

    monkeypatch.setattr(tweaks, "Reconstruction", Watched)
    monkeypatch.setattr(tweaks, "Distribution", Learned)
    for count in (1, 5):
        seen.clear()
        prepared(stack(), batches(count), method="norms", steps=2)[0].run(lambda _text: None)
        exact = [stack().layers[0](x) for x in batches(count)]
        taught = next(targets for what, targets in seen if what == "taught")
        judged = next(targets for what, targets in seen if what == "judged")
        for found, wanted in ((taught, exact[::2]), (judged, exact[1::2] or exact)):
            assert len(found) == len(wanted)
            for (one,), other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other)


def test_scales_that_were_folded_are_named() -> None:
    fast = graphopt.compile(
        stack(),
        example_inputs=(batches(1)[0],),
        calibration=batches(2),
        passes=["FoldNormAffine", QuantizeMatmul(activations=None, method="norms", **THREE)],
        measure=False,
    )
    reasons = [m.reason for m in fast.report.missed if m.rule == "TweakNorm"]
    assert sum("folded into the layers" in reason for reason in reasons) == 2


@pytest.mark.parametrize("first", [True, False])
def test_preset_exact_goes_behind_it(first: bool) -> None:
    """As far as it would fold the scales away, also where it stands in front."""
    step = QuantizeMatmul(activations=None, method="rtn+norms", steps=20, **THREE)
    fast = graphopt.compile(
        stack(),
        example_inputs=(batches(1)[0],),
        calibration=batches(2),
        passes=["exact", step] if first else ["Canonicalize", step, "exact"],
        measure=False,
    )
    assert fast.report.verified
    assert any(a.rule == "TweakNorm" for a in fast.report.applied)
    assert any("norm.weight_folded" in name for name in fast.program.state)


class Spelled(Layer):
    """Its norm is written out, with a scale of one more than its weight."""

    def __init__(self) -> None:
        super().__init__()
        del self.norm
        self.scale = nn.Parameter(torch.zeros(WIDTH))

    def norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.scale)


class SpelledStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Spelled() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.sin()


def test_norms_that_are_written_out_are_found() -> None:
    torch.manual_seed(0)
    model = SpelledStack().eval()
    fast = compiled(model, batches(), method="rtn+norms", **THREE)
    rules = [a.rule for a in fast.report.applied]
    assert rules.count("FoldCone") == rules.count("RecognizeRMSNorm") == 2
    assert rules.count("TweakNorm") >= 1
    assert "layers.0.scale_folded_1" in fast.program.state


class Shared(SpelledStack):
    """One norm in two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = stack().layers
        self.layers[1].norm = self.layers[0].norm


def test_a_scale_of_several_blocks_stays() -> None:
    torch.manual_seed(0)
    fast = compiled(Shared().eval(), batches(2), method="rtn+norms", steps=5, **THREE)
    assert any("several blocks" in m.reason for m in fast.report.missed)
    assert not any(a.rule == "TweakNorm" for a in fast.report.applied)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_vectors_are_read_as_they_are_stored(kind: torch.dtype) -> None:
    start = torch.linspace(0.5, 2, 7).to(kind)
    vector = LearnedVector(start, 1.0)
    assert torch.equal(vector.read(), start.float())
    for _ in range(10):
        vector.read().sum().backward()
        vector.descend(0.1)
    assert torch.equal(vector.read().detach(), vector.stored().float())
    assert vector.stored().dtype == kind
    assert (vector.stored() < start).all()
    assert vector.moves[0].abs().max() <= 10 * 0.1 * tweaks.SPEED * 1.01


def test_a_recipe_repeats_it_and_a_file_holds_it(tmp_path: Path) -> None:
    step = parse_pass("QuantizeMatmul:bits=3,activations=null,method=rtn+norms,steps=10,head=true")
    data = batches(2)

    def made(passes: Any) -> Any:
        return graphopt.compile(
            stack(), example_inputs=(data[0],), calibration=data, passes=passes, measure=False
        )

    one = made(["Canonicalize", step])
    assert any(a.rule == "TweakNorm" for a in one.report.applied)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "passes:\n- Canonicalize\n- QuantizeMatmul:\n    bits: 3\n    activations: null\n"
        "    method: rtn+norms\n    steps: 10\n    head: true\n"
    )
    two, third = made(str(recipe)), made(["Canonicalize", step])
    third.load_state_dict(one.state_dict())
    again = graphopt.load(graphopt.save(one, tmp_path / "q.pt2"))
    for other in (two, again, third):
        assert torch.equal(other(data[1]), one(data[1]))
    assert {*two.state_dict()} == {*one.state_dict()}


def test_a_later_write_to_a_norm_is_seen() -> None:
    model, data = stack(), batches(2)
    fast = compiled(model, data, method="rtn+norms", steps=10, **THREE)
    assert "layers.0.norm.weight_folded" in fast.program.state
    with torch.no_grad():
        model.layers[0].norm.weight.mul_(2)
    with pytest.raises(GraphoptError, match=r"norm\.weight was written after"):
        fast(data[0])


def test_names() -> None:
    assert methods("norms") == methods("rtn+norms")
    assert methods("gptq+norms").calibrated == ("gptq", "norms")
    assert methods("norms").by_blocks and not methods("gptq").by_blocks
    assert methods("norms+outliers").beside == ("outliers",)
    assert QuantizeMatmul(method="norms", importance="norm", steps=3).settings.steps == 3
