"""Embeddings, tied heads and weights that are skipped, end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from generated.harness import Only, run_example
from torch import Tensor, nn

import graphopt
from graphopt.errors import RecipeError
from graphopt.passes import QuantizeMatmul
from graphopt.rewrite.passes import parse_pass

WIDTH, WORDS = 64, 40


class Tied(nn.Module):
    """A table of words, two projections and a product of them, and the table as head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.words(indices)
        y = self.norm(x)
        return self.head(x + self.down(self.gate(y).sigmoid() * self.up(y)))


def quantized(model: nn.Module, *args: Any, preset: str = "Canonicalize", **options: Any) -> Any:
    passes = [preset, QuantizeMatmul(**options)]
    return graphopt.compile(model.eval(), example_inputs=args, passes=passes, measure=False)


def words() -> Tensor:
    return torch.randint(WORDS, (3, 9), generator=torch.Generator().manual_seed(0))


def missed(fast: Any) -> list[Any]:
    return [m for m in fast.report.missed if m.pass_name == "QuantizeMatmul"]


def kept(fast: Any) -> set[str]:
    """Names of float matrices that the result holds; a tied one has the name of the table."""
    state = fast.program.state
    found = {n for n, t in state.items() if t.dim() == 2 and n.endswith(".weight")}
    return found - {"head.weight"}


def _lookups(kind: str) -> list[Any]:
    rule = list(QuantizeMatmul(embeddings=True).rules())[-1]
    return [pytest.param(rule, e, id=e.name) for e in getattr(rule, kind)()]


@pytest.mark.parametrize(("rule", "example"), _lookups("examples"))
def test_lookups_are_rewritten_and_verify(rule: Any, example: Any) -> None:
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert [a.rule for a in outcome.report.applied].count("QuantizeEmbedding") == 1
    assert outcome.sound


@pytest.mark.parametrize(("rule", "example"), _lookups("near_misses"))
def test_other_lookups_are_left_alone_and_explained(rule: Any, example: Any) -> None:
    outcome = run_example(example, Only(rule), tuple(rule.prepare()))
    assert outcome.report.applied == [] and outcome.sound
    reasons = [m.reason for m in outcome.report.missed]
    assert not example.reason or any(example.reason in r for r in reasons), reasons


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_tied_head_is_stored_once(bits: int) -> None:
    torch.manual_seed(0)
    model, x = Tied(), words()
    options: dict[str, Any] = {"bits": bits} | ({} if bits == 8 else {"activations": None})
    fast = quantized(model, x, head=True, embeddings=True, group_size=16, **options)
    both = [a for a in fast.report.applied if len(a.removed) == 2]
    assert len(both) == 1 and fast.report.verified
    calls = [n for n in fast.program.graph.nodes if "quantized" in str(n.target)]
    readers = sorted(len(codes.users) for codes in {call.args[1] for call in calls})
    assert readers == [1, 1, 1, 2]
    assert not kept(fast)


def test_a_tied_head_is_calibrated_by_gptq_on_what_it_is_given() -> None:
    torch.manual_seed(0)
    model, x = Tied(), words()
    options = {"bits": 4, "activations": None, "group_size": 16, "head": True, "embeddings": True}
    fast = graphopt.compile(
        model.eval(),
        example_inputs=(x,),
        calibration=[torch.randint(WORDS, (3, 9)) for _ in range(4)],
        passes=["Canonicalize", QuantizeMatmul(method="gptq", **options)],
        measure=False,
    )
    assert [len(a.removed) for a in fast.report.applied].count(2) == 1 and not kept(fast)
    assert not any("rounded" in note for note in fast.report.quantization.notes)


@pytest.mark.parametrize(
    ("options", "option"),
    [
        ({}, "QuantizeMatmul:head=True,embeddings=True"),
        ({"head": True}, "QuantizeMatmul:embeddings=True"),
        ({"embeddings": True}, "QuantizeMatmul:head=True"),
    ],
)
def test_half_of_a_tied_head_is_refused(options: dict[str, Any], option: str) -> None:
    fast = quantized(Tied(), words(), **options)
    assert [m.option for m in missed(fast)] == [option]
    assert kept(fast) == {"words.weight"}


def test_a_weight_that_a_sum_reads_too_is_kept_whatever_the_options() -> None:
    class Summed(Tied):
        def forward(self, indices: Tensor) -> Tensor:
            return super().forward(indices) + self.words.weight.sum()

    fast = quantized(Summed(), words(), head=True, embeddings=True)
    assert ["`sum_1` reads the weight too" in m.reason for m in missed(fast)] == [True]
    assert [m.option for m in missed(fast)] == [None]


def test_a_layer_that_is_used_twice_is_stored_once() -> None:
    """The second product reads the first: they are rewritten together all the same."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.step(self.step(x).relu()).relu()

    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(5, WIDTH)
    fast = quantized(model, x)
    assert [len(a.removed) for a in fast.report.applied] == [2]
    with torch.no_grad():
        wanted = model(x)
        assert (fast(x) - wanted).norm() < 0.05 * wanted.norm()


PATTERNS = [
    ("down", {"down.weight"}),
    ("down.weight", {"down.weight"}),
    (["up", "gate"], {"gate.weight", "up.weight"}),
    ("*", {"gate.weight", "up.weight", "down.weight", "words.weight"}),
    ("?p.*", {"up.weight"}),
    ("head", {"words.weight"}),
    ("words", {"words.weight"}),
    ("norm", set()),
]


@pytest.mark.parametrize(("skip", "left"), PATTERNS, ids=[str(p) for p, _ in PATTERNS])
def test_weights_are_skipped_by_name(skip: Any, left: set[str]) -> None:
    fast = quantized(Tied(), words(), head=True, embeddings=True, skip=skip)
    assert kept(fast) == left
    assert all("is skipped by" in m.reason for m in missed(fast))
    assert all(m.option == "QuantizeMatmul:skip" for m in missed(fast))
    assert len(missed(fast)) == len(left)


@pytest.mark.parametrize("skip", ["gate", "up.weight"])
def test_merged_weights_are_found_by_each_of_their_names(skip: str) -> None:
    """The norm was folded into all of them, and lends them no name."""
    model, x = Tied(), words()
    fast = quantized(model, x, preset="exact", skip=("norm", skip), head=True, embeddings=True)
    (found,) = missed(fast)
    other = {"gate": "up.weight", "up.weight": "gate.weight"}[skip]
    assert f"is skipped by '{skip}', and `{other}` with it" in found.reason
    rules = [a.rule for a in fast.report.applied]
    assert rules.count("MergeSiblings") == 1 and rules.count("QuantizeLinear") == 2


def test_a_pattern_without_a_match_is_an_error() -> None:
    with pytest.raises(RecipeError, match="no weight or module of Tied is called 'dwon'"):
        quantized(Tied(), words(), skip=("up", "dwon"))
    with pytest.raises(RecipeError, match="nearest names are 'down'"):
        quantized(Tied(), words(), skip="dwon")


def test_skip_in_recipes_and_on_the_command_line() -> None:
    assert parse_pass("QuantizeMatmul:skip=[up,down],bits=4") == QuantizeMatmul(
        bits=4, skip=("up", "down")
    )
    assert parse_pass("QuantizeMatmul:skip=lm_head,embeddings=true").skip == ("lm_head",)
    assert QuantizeMatmul(**QuantizeMatmul(skip=["a"]).options()) == QuantizeMatmul(skip="a")
    with pytest.raises(RecipeError, match="skip is a sequence of patterns"):
        parse_pass("QuantizeMatmul:skip=[1]")
