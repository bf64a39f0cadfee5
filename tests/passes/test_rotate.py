"""Rotations folded into weights: where they go, what stops them, and that nothing else changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from generated.harness import Only, run_example
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.passes import QuantizeMatmul
from graphopt.passes.quantize.hadamard import hadamard, rotation
from graphopt.passes.quantize.methods import Methods, methods
from graphopt.passes.quantize.rotation_examples import PostNorm, Text, layer_norm
from graphopt.passes.quantize.rotation_heads import RotateHeads
from graphopt.passes.quantize.rotation_stream import RotateStream
from graphopt.pipeline import Context, run_pass, state_bytes
from graphopt.program import Program
from graphopt.rewrite import Example, Rule

WORDS, WIDTH = 61, 48


def cases(kind: str) -> list[Any]:
    rules: tuple[Rule, ...] = (RotateStream(), RotateHeads())
    return [
        pytest.param(rule, example, id=f"{rule.name}-{example.name}")
        for rule in rules
        for example in getattr(rule, kind)()
    ]


@pytest.mark.parametrize(("rule", "example"), cases("examples"))
def test_examples_are_rewritten_and_verify(rule: Rule, example: Example) -> None:
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert len(outcome.report.applied) == example.count, outcome.report.missed
    assert outcome.sound, outcome.report.whole


@pytest.mark.parametrize(("rule", "example"), cases("near_misses"))
def test_near_misses_are_left_alone(rule: Rule, example: Example) -> None:
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert outcome.report.applied == []
    assert outcome.sound
    reasons = [m.reason for m in outcome.report.missed]
    assert not example.reason or any(example.reason in r for r in reasons), reasons


@pytest.mark.parametrize("order", [4, 12, 20, 24, 28, 36, 44, 52, 60, 76, 84, 100, 108, 180, 196])
def test_hadamard_matrices(order: int) -> None:
    """By both constructions of Paley, over fields of p and of p squared elements."""
    found = hadamard(order)
    assert found is not None
    assert torch.equal(found.abs(), torch.ones_like(found))
    assert torch.equal(found @ found.T, order * torch.eye(order, dtype=found.dtype))


def test_orders_without_a_construction() -> None:
    assert hadamard(92) is None
    assert hadamard(6) is None
    assert [rotation(n).exact for n in (1, 64, 576, 768, 896, 3584, 9, 18)] == [*[True] * 6, 0, 0]


@pytest.mark.parametrize("order", [1, 2, 9, 18, 36, 48, 64, 72, 576])
def test_rotations_are_orthogonal_and_spread_every_feature(order: int) -> None:
    found = rotation(order)
    matrix = found.matrix()
    one = torch.eye(order, dtype=torch.float64)
    assert (matrix @ matrix.T - one).abs().max() < 1e-12
    if found.exact:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5))
    values = torch.randn(3, order, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = torch.einsum("akb,kn->anb", values.double(), matrix)
    assert torch.equal(found(values, 1), exact.to(torch.bfloat16))  # rounded once


def test_names_of_methods() -> None:
    assert methods("rotate") == Methods("rtn", rotates=True)
    assert methods("rotate+awq+gptq") == Methods("gptq", "awq", rotates=True)
    assert not methods("gptq").rotates
    assert methods("rotate").calibrated == ()


class Wide(nn.Module):
    """Blocks whose products read some features with much larger weights than others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        for name, size in (("WIDTH", WIDTH), ("HEADS", 4), ("WORDS", WORDS)):
            monkeypatch.setattr(f"graphopt.passes.quantize.rotation_examples.{name}", size)
        torch.manual_seed(0)
        self.text = Text()
        with torch.no_grad():
            for block in self.text.blocks:
                for product in (block.q, block.k, block.v, block.gate, block.up):
                    product.weight[:, [3, 17]] *= 10

    def forward(self, ids: Tensor) -> Any:
        return self.text(ids)


def ids(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(WORDS, (4, 16), generator=generator) for _ in range(count)]


def quantized(model: nn.Module, *passes: Any, **options: Any) -> Any:
    step = QuantizeMatmul(**options)
    return graphopt.compile(
        model,
        example_inputs=(ids(1, 0)[0],),
        calibration=ids(6, 1),
        passes=[*(passes or ["Canonicalize"]), step],
        measure=False,
        strict=True,
    )


def error(fast: Any, model: nn.Module) -> float:
    with torch.no_grad():
        pairs = [(fast(x).double(), model(x).double()) for x in ids(3, 7)]
    return float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5


@pytest.mark.parametrize(
    ("options", "method", "most"),
    [
        ({"bits": 4, "activations": None}, "rtn", 0.8),
        ({"bits": 4}, "rtn", 0.8),
        ({"bits": 8}, "rtn", 0.8),
        ({"bits": 4, "activations": None}, "gptq", 0.6),
    ],
    ids=str,
)
def test_quantization_after_rotation_is_nearer(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], method: str, most: float
) -> None:
    model = Wide(monkeypatch).eval()
    plain = quantized(model, method=method, **options)
    turned = quantized(model, method=f"rotate+{method}", **options)
    assert turned.report.verified
    rules = Counter(a.rule for a in turned.report.applied)
    assert (rules["RotateStream"], rules["RotateHeads"], rules["QuantizeLinear"]) == (1, 2, 14)
    assert error(turned, model) < most * error(plain, model)


def test_behind_preset_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are recognised and projections merged before."""
    model = Wide(monkeypatch).eval()
    fast = quantized(model, "exact", bits=4, method="rotate")
    rules = Counter(a.rule for a in fast.report.applied)
    assert (rules["RotateStream"], rules["RotateHeads"], rules["QuantizeLinear"]) == (1, 2, 8)
    assert error(fast, model) < 0.8 * error(quantized(model, "exact", bits=4), model)


def test_it_is_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Wide(monkeypatch).eval()
    one, two = (quantized(model, bits=8, method="rotate").state_dict() for _ in range(2))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_what_is_not_quantized_is_not_rotated(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = quantized(Wide(monkeypatch).eval(), bits=8, method="rotate", skip="text")
    assert not [a.rule for a in fast.report.applied if a.rule.startswith("Rotate")]


def rotated(model: nn.Module, *, times: int = 1) -> tuple[Program, Program]:
    """A program with RMS norms, and what the rules make of it."""
    before = capture(model.eval(), (torch.randint(29, (2, 6)),))
    context = Context.of(before, strict=True, measure=False)
    for step in RotateStream().prepare():
        before = run_pass(before, step, context)
    after = before
    for _ in range(times):
        for rule in (RotateHeads(), RotateStream()):
            after = run_pass(after, Only(rule), context)
    return before, after


@pytest.mark.parametrize("tied", [False, True])
def test_no_weight_is_held_twice(tied: bool) -> None:
    torch.manual_seed(0)
    before, after = rotated(Text(tied=tied, blocks=4))
    added = state_bytes(after) - state_bytes(before)
    assert added == (2 * 12 * 12 * 4 if tied else 12 * 12 * 4)  # the rotation, back and forth
    names = [n for n in after.state if n.startswith("tokens")]
    assert names == (["tokens.weight"] if tied else ["tokens.weight_folded"])


def test_rotated_once() -> None:
    """Rules that look at what they made leave it alone."""
    torch.manual_seed(0)
    (_, once), (_, twice) = (rotated(Text(), times=n) for n in (1, 2))
    assert once.state.keys() == twice.state.keys()


class Sized(Text):
    """Sizes and factories read the stream, which needs no stream to stay."""

    def forward(self, ids: Tensor) -> Any:
        x = self.tokens(ids)
        places = x.new_ones(x.shape[:2])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) * places[..., None]


def test_readers_of_sizes_keep_nothing_alive() -> None:
    torch.manual_seed(0)
    _, after = rotated(Sized())
    assert "tokens.weight" not in after.state
    assert "tokens.weight_folded" in after.state


def test_a_post_norm_model_says_why() -> None:
    torch.manual_seed(0)
    fast = graphopt.compile(
        Text(lambda: PostNorm(layer_norm), layer_norm).eval(),
        example_inputs=(torch.randint(29, (2, 6)),),
        passes=["Canonicalize", QuantizeMatmul(method="rotate")],
        measure=False,
    )
    told = [m for m in fast.report.missed if m.rule == "RotateStream"]
    assert told
    assert all("reads the stream, and no rotation can be folded" in m.reason for m in told)
    assert Counter(a.rule for a in fast.report.applied)["RotateHeads"] == 2
