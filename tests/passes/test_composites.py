"""Composites on real models and on the awkward cases that rules' own examples do not reach."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from generated.harness import run_example
from models.huggingface import ENTRIES
from models.plain import ENTRIES as PLAIN
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.errors import VerificationError
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.composites import RecognizeComposites, attention
from graphopt.passes.composites.attention_examples import LOWEST, case, hidden, scores
from graphopt.pipeline import Context, run_pass

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


def _recognised(model, args=(), kwargs=None, **options):
    program = capture(model, args, kwargs or {})
    context = Context.of(program, strict=True, measure=False)
    ready = run_pass(program, Canonicalize(), context)
    context.report.applied.clear()
    context.report.missed.clear()
    after = run_pass(ready, RecognizeComposites(**options), context)
    rules = [a.rule for a in context.report.applied]
    reasons = [m.reason for m in context.report.missed]
    return after, rules, reasons, certify(program, after, context, name="whole")


def _long(*values):
    return pytest.param(*values, marks=pytest.mark.sweep)


def _only(program, target):
    return list(program.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("llama", {"RecognizeRMSNorm": 5, "ShareGroupedHeads": 2}),
        _long("gemma", {"RecognizeRMSNorm": 5, "ShareGroupedHeads": 2}),
        _long("t5", {"RecognizeRMSNorm": 12}),
        ("gpt2", {"RecognizeGelu": 2}),
        ("bloom", {"RecognizeAttention": 2, "RecognizeGelu": 2}),
        _long("gptj", {"RecognizeAttention": 2, "RecognizeGelu": 2}),
    ],
)
def test_counts_on_known_models(name, counts):
    entry = ENTRIES[name]
    _, rules, _, sound = _recognised(entry.build(), (), entry.inputs())
    assert {r: rules.count(r) for r in rules} == counts
    assert sound


@pytest.mark.parametrize(
    ("name", "count"), [("bert", 2), ("vit", 2), _long("opt", 2), _long("whisper", 6)]
)
def test_eager_attention_of_hugging_face_models(name, count):
    entry = ENTRIES[name]
    model = entry.build()
    model.set_attn_implementation("eager")
    after, rules, _, sound = _recognised(model, (), entry.inputs())
    assert rules.count("RecognizeAttention") == len(_only(after, SDPA)) == count
    assert sound


@pytest.mark.parametrize("name", [n for n in PLAIN if n.startswith("attention-")])
def test_hand_written_attention_of_the_zoo(name):
    entry = PLAIN[name]
    _, rules, reasons, sound = _recognised(entry.build(), (), entry.inputs())
    assert sound
    left_alone = entry.family == "near-miss" and name != "attention-wrong-size"
    kept = left_alone or name == "attention-grouped"
    assert rules.count("RecognizeAttention") == (not kept)
    assert not kept or reasons


def test_permuted_key_where_heads_equal_tokens_is_not_taken_as_transposed():
    """B=1, H=S: the shapes of a wrong permutation fit."""
    entry = PLAIN["attention-key-untransposed"]
    _, rules, reasons, sound = _recognised(entry.build(), (), entry.inputs())
    assert rules == [] and sound
    assert any("permuted differently" in r for r in reasons)


class _Hidden(nn.Module):
    def forward(self, q, k, v, m):
        return hidden(q, k, v, m)


def test_rows_that_see_nothing_stay_nan():
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    seen = torch.rand(2, 1, 5, 5) > 0.3
    seen[0, 0, 2] = False
    after, rules, _, _ = _recognised(_Hidden().eval(), (q, k, v, seen))
    assert rules == ["RecognizeAttention"]
    (made,) = after.run((q, k, v, seen))
    torch.testing.assert_close(made, hidden(q, k, v, seen), equal_nan=True)
    assert bool(made[0, :, 2].isnan().all()) and not bool(made[1].isnan().any())


def test_assuming_visible_rows_spares_the_guard():
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    guarded, *_ = _recognised(_Hidden().eval(), (q, k, v, seen))
    bare, *_ = _recognised(_Hidden().eval(), (q, k, v, seen), assume_visible=True)
    assert _only(guarded, aten.masked_fill.Scalar) and not _only(bare, aten.masked_fill.Scalar)


class _Lowest(nn.Module):
    def forward(self, q, k, v, m):
        return scores(q, k).masked_fill(~m, LOWEST).softmax(-1) @ v


def test_training_under_a_mask_of_unknown_values_needs_the_option():
    """The fused backward is wrong in rows hidden by huge finite values."""
    q, k, v = torch.randn(3, 2, 3, 5, 4)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    _, rules, reasons, _ = _recognised(_Lowest().train(), (q, k, v, seen))
    assert rules == [] and any("gradient is wrong" in r for r in reasons)
    _, rules, _, sound = _recognised(_Lowest().train(), (q, k, v, seen), assume_visible=True)
    assert rules == ["RecognizeAttention"] and sound


def test_a_provable_triangle_becomes_causal_and_a_shifted_one_does_not():
    for shift, causal in ((1, True), (2, False)):
        mask = torch.full((5, 5), -math.inf).triu(shift)

        class Masked(nn.Module):
            def forward(self, q, k, v, mask=mask):
                return (scores(q, k) + mask).softmax(-1) @ v

        after, _, _, sound = _recognised(Masked().eval(), tuple(torch.randn(3, 2, 3, 5, 4)))
        (node,) = _only(after, SDPA)
        assert node.kwargs["is_causal"] is causal and sound


def test_the_layout_of_a_returned_value_is_kept():
    q, k, v = (torch.randn(2, 5, 3, 4).transpose(1, 2) for _ in range(3))

    class Plain(nn.Module):
        def forward(self, q, k, v):
            return scores(q, k).softmax(-1) @ v

    after, rules, _, _ = _recognised(Plain().eval(), (q, k, v))
    (made,) = after.run((q, k, v))
    assert rules == ["RecognizeAttention"]
    assert made.stride() == Plain()(q, k, v).stride()


@pytest.mark.parametrize("wrong", ["scale", "key"])
def test_a_broken_rule_is_caught(monkeypatch, wrong):
    read = attention.RecognizeAttention._read

    def broken(self, *args):
        found = read(self, *args)
        if not isinstance(found, attention.Attention):
            return found
        if wrong == "scale":
            return replace(found, scale=found.scale * 1.01)
        return replace(found, key=found.query)

    monkeypatch.setattr(attention.RecognizeAttention, "_read", broken)
    plain = case("divided", lambda q, k, v: scores(q, k).softmax(-1) @ v)
    with pytest.raises(VerificationError, match="RecognizeAttention"):
        run_example(plain, RecognizeComposites(), (Canonicalize(),))


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v


def test_a_refused_rewrite_fixes_no_axis() -> None:
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    axes = ({0: "batch"}, {0: "batch"}, {0: "batch", 3: "width"})
    fast = graphopt.compile(
        Attend().eval(), example_inputs=(q, k, v), dynamic_shapes=axes, measure=False
    )
    assert any("would demand" in missed.reason for missed in fast.report.missed)
    q, k, v = torch.randn(4, 3, 5, 8), torch.randn(4, 3, 5, 8), torch.randn(4, 3, 5, 16)
    torch.testing.assert_close(fast(q, k, v), Attend()(q, k, v))
