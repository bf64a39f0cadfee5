"""Pre-LN streams become Pre-RMSNorm ones; the rest is refused, and a wrong centring is caught."""

from __future__ import annotations

import pytest
import torch
from generated.harness import Only, run_example
from models.huggingface import ENTRIES

from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.errors import VerificationError
from graphopt.passes import stream_writers
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.pre_rms_norm import CentreStream, PreRMSNorm
from graphopt.pipeline import Context, run_pass
from graphopt.rewrite.builder import Builder

aten = torch.ops.aten
RULE = CentreStream()
EXAMPLES = {e.name: e for e in RULE.examples()}


def _count(program, target):
    return len(list(program.graph.find_nodes(op="call_function", target=target)))


def _converted(name):
    """LayerNorms before, LayerNorms and RMSNorms after, reasons, and whether the whole holds."""
    entry = ENTRIES[name]
    program = capture(entry.build(), (), entry.inputs())
    context = Context.of(program, strict=True, measure=False)
    ready = run_pass(program, Canonicalize(), context)
    after = run_pass(ready, PreRMSNorm(), context)
    norms = (
        _count(program, aten.layer_norm.default),
        _count(after, aten.layer_norm.default),
        _count(after, aten.rms_norm.default),
    )
    reasons = [m.reason for m in context.report.missed]
    return norms, reasons, certify(program, after, context, name="whole")


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_example_is_rewritten_and_verifies(example):
    outcome = run_example(example, Only(RULE), tuple(RULE.prepare()))
    assert len(outcome.report.applied) == 1, outcome.report.missed
    assert outcome.sound
    assert _count(outcome.after, aten.layer_norm.default) == 0


@pytest.mark.parametrize("example", list(RULE.near_misses()), ids=lambda e: e.name)
def test_near_miss_is_left_alone_and_explained(example):
    outcome = run_example(example, Only(RULE), tuple(RULE.prepare()))
    reasons = [m.reason for m in outcome.report.missed]
    assert outcome.report.applied == []
    assert outcome.sound
    assert not example.reason or any(example.reason in r for r in reasons), reasons


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("gpt2", (5, 0, 5)),
        ("vit", (5, 0, 5)),
        pytest.param("dinov2", (5, 0, 5), marks=pytest.mark.sweep),
        pytest.param("whisper", (12, 0, 12), marks=pytest.mark.sweep),
    ],
)
def test_known_models_lose_every_layer_norm(name, norms):
    found, _, sound = _converted(name)
    assert found == norms
    assert sound


def test_post_layer_norm_is_refused_with_that_reason():
    (before, after, made), reasons, _ = _converted("bert")
    assert (after, made) == (before, 0)
    assert reasons and all("post-LN" in r for r in reasons)


def test_tied_embedding_is_centred_as_it_is_written_and_the_head_keeps_its_weight():
    outcome = run_example(EXAMPLES["tied embedding"], Only(RULE), tuple(RULE.prepare()))
    tied = outcome.before.state["tokens.weight"]
    assert any(t is tied for t in outcome.after.state.values())
    assert _count(outcome.after, aten.mean.dim) == 1


def test_no_memory_is_added():
    def size(program):
        return sum({id(t): t.numel() for t in program.state.values()}.values())

    outcome = run_example(EXAMPLES["text"], Only(RULE), tuple(RULE.prepare()))
    assert size(outcome.after) == size(outcome.before)


def test_a_writer_that_is_not_centred_is_caught(monkeypatch):
    monkeypatch.setattr(stream_writers, "_less_mean", lambda node, _axis, _build: node)
    with pytest.raises(VerificationError, match="CentreStream"):
        run_example(EXAMPLES["text"], Only(RULE), tuple(RULE.prepare()))


def test_a_rewrite_that_turns_out_illegal_leaves_the_program_as_it_was(monkeypatch):
    """Substituted readers get their original back."""
    plain = Builder.__call__
    seen = []

    def failing(self, target, *args, **kwargs):
        seen.append(target)
        last = target is aten.rms_norm.default and seen.count(target) == 3
        args = (args[0], [3], *args[2:]) if last else args
        return plain(self, target, *args, **kwargs)

    monkeypatch.setattr(Builder, "__call__", failing)
    outcome = run_example(EXAMPLES["text"], Only(RULE), tuple(RULE.prepare()))
    assert outcome.report.applied == []
    assert "cannot be built legally" in outcome.report.missed[0].reason
    assert str(outcome.after) == str(outcome.before)
    assert outcome.sound
