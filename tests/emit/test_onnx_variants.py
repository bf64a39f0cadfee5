"""Merged projections are taken apart for ONNX Runtime where it fuses more, and runs faster, so."""

from __future__ import annotations

import pytest
import torch
from models.huggingface import ENTRIES
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.emit import onnx_drafts
from graphopt.emit.onnx_variants import separate_projections
from graphopt.passes.merge_projections import MergeProjections
from graphopt.pipeline import Context, run_pass
from graphopt.verify.timing import Pace

pytest.importorskip("onnxruntime")
aten = torch.ops.aten


class Attention(nn.Module):
    def __init__(self, variant: str = "", bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8, bias=bias) for _ in range(3))
        self.variant = variant

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        if self.variant == "swapped":
            k, v = v, k
        if self.variant == "turned":
            q = q.sin()
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).flatten(2)
        return out + k.mean() if self.variant == "read" else out


def merged(model: nn.Module, training: bool = False):
    program = capture(model.train(training), (torch.randn(2, 5, 8),))
    return run_pass(program, MergeProjections(), Context.of(program, strict=True, measure=False))


@pytest.mark.parametrize("bias", [True, False])
def test_projections_come_apart_and_give_the_same(bias: bool) -> None:
    program = merged(Attention(bias=bias).eval())
    apart = separate_projections(program)
    assert apart is not None
    linears = list(apart.graph.find_nodes(op="call_function", target=aten.linear.default))
    assert len(linears) == 3
    assert not list(
        apart.graph.find_nodes(op="call_function", target=aten.split_with_sizes.default)
    )
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(apart.run([x])[0], program.run([x])[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", ["swapped", "turned", "read"])
def test_other_uses_stay_merged(variant: str) -> None:
    assert separate_projections(merged(Attention(variant).eval())) is None


def test_weights_that_train_stay_merged() -> None:
    assert separate_projections(merged(Attention(), training=True)) is None


@pytest.mark.parametrize(("new", "attention"), [(0.9, 2), (1.1, 0)])
def test_the_faster_form_is_written(monkeypatch, tmp_path, new, attention) -> None:
    entry = ENTRIES["bert"]
    model, inputs = entry.build(), entry.inputs()
    fast = graphopt.compile(
        model, example_kwargs=inputs, dynamic_shapes=entry.dynamic_axes, measure=False
    )
    monkeypatch.setattr(onnx_drafts, "interleaved", lambda *_args, **_kw: Pace(1.0, new))
    result = graphopt.export_onnx(fast, tmp_path / "m.onnx")
    assert result.fusions.get("attention", 0) == attention
    assert result.error < 2e-5
    (note,) = (note for note in result.notes if "separate products" in note)
    assert ("left merged" in note) == (attention == 0)


def test_nothing_is_timed_where_that_is_not_wanted(monkeypatch, tmp_path) -> None:
    entry = ENTRIES["bert"]
    fast = graphopt.compile(entry.build(), example_kwargs=entry.inputs(), measure=False)
    monkeypatch.setattr(onnx_drafts, "interleaved", lambda *_args, **_kw: pytest.fail("timed"))
    result = graphopt.export_onnx(fast, tmp_path / "m.onnx", measure=False)
    assert not [n for n in result.notes if "speed" in n] and "attention" not in result.fusions
