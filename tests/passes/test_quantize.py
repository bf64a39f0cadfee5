"""Quantized products end to end: errors within what is declared, sizes, files, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import RecipeError, VerificationError
from graphopt.passes import QuantizeMatmul
from graphopt.rewrite.passes import parse_pass

WIDTH = 64


class Block(nn.Module):
    """A residual MLP between two norms."""

    def __init__(self, outlier: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.last = nn.LayerNorm(WIDTH)
        if outlier:
            with torch.no_grad():
                self.up.weight[:, 5] *= outlier

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x + self.down(F.gelu(self.up(self.norm(x)))))


def quantized(model: nn.Module, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    passes = ["Canonicalize", QuantizeMatmul(**options)]
    return graphopt.compile(model.eval(), example_inputs=args, passes=passes, measure=False)


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


SCHEMES = [
    ({}, 0.02),
    ({"activations": None}, 0.01),
    ({"bits": 6, "activations": None}, 0.04),
    ({"bits": 4, "activations": None, "group_size": 32}, 0.12),
    ({"bits": 4, "activations": None, "group_size": 32, "symmetric": False}, 0.12),
    ({"bits": 3, "activations": None, "group_size": 32}, 0.25),
    ({"bits": 2, "activations": None, "group_size": 32}, 0.6),
    ({"bits": 4, "dtype": "nf4", "activations": None, "group_size": 64}, 0.12),
    ({"bits": 4, "dtype": "fp4", "activations": None, "group_size": 32}, 0.14),
    ({"dtype": "fp8"}, 0.06),
    ({"bits": 4, "dtype": "mxfp4", "activations": None}, 0.16),
    ({"bits": 4, "dtype": "nvfp4", "activations": None}, 0.14),
]


@pytest.mark.parametrize(("options", "most"), SCHEMES, ids=lambda v: str(v))
def test_every_scheme(options: dict[str, Any], most: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 9, WIDTH)
    fast = quantized(model, x, **options)
    assert [a.rule for a in fast.report.applied].count("QuantizeLinear") == 2
    assert fast.report.verified
    with torch.no_grad():
        off = error(fast(x), model.eval()(x))
    assert 1e-4 < off < most
    bits = options.get("bits", 8)
    weights = 4 * WIDTH * WIDTH
    held = sum(t.nbytes for n, t in fast.state_dict().items() if "weight_" in n)
    assert held < weights * (bits / 8 + 0.3)
    again = graphopt.load(graphopt.save(fast, tmp_path / "q.pt2"))
    assert torch.equal(again(x), fast(x))


def test_certificates_say_what_is_lost() -> None:
    fast = quantized(Block(), torch.randn(3, 9, WIDTH))
    found = [a.certificate for a in fast.report.applied if a.rule == "QuantizeLinear"]
    assert all(c.numeric == "lossy" and 0 < c.error < c.bound for c in found)
    assert all(0 < c.error < c.bound < 0.2 for c in fast.report.whole[1:])
    assert [layer.bits for layer in fast.report.quantization.layers] == [8, 8]
    assert not any("stored" in note for note in fast.report.notes)


def test_a_product_with_too_large_an_error_keeps_its_weight() -> None:
    """One input a thousand times the others: the scale of a whole channel is the outlier's."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 9, WIDTH)
    with torch.no_grad():
        model.up.weight[:, 5] *= 1000
        model.norm.weight[5] = 0.0
    fast = quantized(model, x, bits=4, activations=None)
    kept = [m for m in fast.report.missed if m.stage == "verify"]
    assert len(kept) == 1 and "error above the bound" in kept[0].reason
    assert [a.rule for a in fast.report.applied].count("QuantizeLinear") == 1
    assert fast.report.verified
    assert torch.equal(fast.state_dict()["up.weight"], model.up.weight)


def test_a_whole_that_is_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each product is within its bound, and what they come to is not."""
    monkeypatch.setattr("graphopt.certify._loss", lambda *_given: 1e-3)
    with pytest.raises(VerificationError, match="error above the bound"):
        quantized(Block(), torch.randn(3, 9, WIDTH), activations=None)


def test_heads_are_quantized_when_asked() -> None:
    model, x = (
        nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)),
        torch.ones(4, WIDTH),
    )
    for head, count in ((False, 1), (True, 2)):
        fast = quantized(model, x, head=head)
        rules = [a.rule for a in fast.report.applied]
        assert rules.count("QuantizeLinear") == count
        missed = [m for m in fast.report.missed if m.rule == "QuantizeLinear"]
        assert [m.option for m in missed] == ["QuantizeMatmul:head=True"] * (2 - count)


def test_group_sizes_that_do_not_divide_are_named() -> None:
    fast = quantized(Block(), torch.randn(2, WIDTH), bits=4, activations=None, group_size=48)
    reasons = [m.reason for m in fast.report.missed]
    assert any("group_size 48 does not divide K = 64" in r for r in reasons)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 32, "activations": None}])
def test_through_inductor(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 9, WIDTH)
    passes = ["Canonicalize", QuantizeMatmul(**options)]
    model = Block().eval()
    plain, fast = (
        graphopt.compile(model, example_inputs=(x,), passes=passes, measure=False, target=target)
        for target in ("torch", "inductor")
    )
    assert not any("the torch target was kept" in note for note in fast.report.notes)
    with torch.no_grad():
        assert error(fast(x), plain(x)) < 1e-2
        assert error(fast(x), model(x)) < 0.12


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("QuantizeMatmul:bits=5", "int has 2, 3, 4, 6, 8 bits, not 5"),
        ("QuantizeMatmul:dtype=nf4", "nf4 has 4 bits, not 8"),
        ("QuantizeMatmul:dtype=nf4,bits=4", "give activations=None"),
        ("QuantizeMatmul:dtype=int4", "should be"),
        ("QuantizeMatmul:activations=some", "should be"),
        ("QuantizeMatmul:dtype=mxfp4,bits=4,activations=null,group_size=64", "groups of 32"),
    ],
)
def test_options_that_do_not_fit_are_errors(text: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        parse_pass(text)


def test_a_tolerance_lifts_what_keeps_a_weight() -> None:
    torch.manual_seed(0)
    model, x = Block(), torch.randn(3, 9, WIDTH)
    with torch.no_grad():
        model.up.weight[:, ::8] *= 15  # large weights of small inputs take the range
        model.norm.weight[::8] /= 30
    options: dict[str, Any] = {"bits": 4, "activations": None}
    kept = quantized(model, x, **options)
    missed = [m for m in kept.report.missed if "error above the bound" in m.reason]
    assert [m.option for m in missed] == ["QuantizeMatmul:tolerance"]
    assert [a.rule for a in kept.report.applied].count("QuantizeLinear") == 1
    lifted = quantized(model, x, **options, tolerance=0.9)
    assert [a.rule for a in lifted.report.applied].count("QuantizeLinear") == 2
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tolerance is a positive number"):
            QuantizeMatmul(tolerance=wrong)


def test_the_users_own_measure_decides_how_far_the_whole_may_go() -> None:
    """Layers that magnify errors, in 2 bits: nothing is left of the output."""
    torch.manual_seed(0)
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(8)])
    with torch.no_grad():
        for layer in deep:
            layer[0].weight.mul_(6)
    x = torch.randn(5, WIDTH)
    step = QuantizeMatmul(bits=2, group_size=32, activations=None, tolerance=0.9)
    with pytest.raises(VerificationError, match="error above the bound"):
        graphopt.compile(deep.eval(), example_inputs=(x,), passes=[step], measure=False)
    judged = graphopt.compile(
        deep.eval(),
        example_inputs=(x,),
        passes=[step],
        measure=False,
        quality=lambda module: float(module(x).std()),
        budget=0.5,
    )
    assert max(w.error for w in judged.report.whole) > 1
    with pytest.raises(VerificationError, match="quality fell"):
        graphopt.compile(
            deep.eval(),
            example_inputs=(x,),
            passes=[step],
            measure=False,
            quality=lambda module: -float((module(x) - deep(x)).norm()),
            budget=1e-3,
        )
