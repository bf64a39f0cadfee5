"""BatchNorm folding on whole networks, and on published weights where they can be had."""

from __future__ import annotations

import pytest
import torch
from models.cnn import ENTRIES
from models.cnn.cifar import cifar_images, load_published, resnet20
from torch import nn

from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.pipeline import Context, run_pass, state_bytes
from graphopt.program import compute_nodes

LEFT = {"densenet": 4}
"""Networks with norms that no neighbour can take: they stand before an activation."""

QUICK = ("plain-stack", "norm-first", "vgg", "shufflenet-v2", "densenet", "unet", "mobilenet-v3")


def fold(model, inputs, *, prove=True, measure=False, **options):
    program = capture(model, (), inputs, **options)
    context = Context.of(program, strict=True, measure=measure)
    after = run_pass(program, FoldBatchNorm(), context)
    assert not prove or certify(program, after, context, name="whole"), context.report.whole
    return program, after, context.report


def norms(program):
    return [n for n in compute_nodes(program.graph) if "batch_norm" in str(n.target)]


@pytest.mark.parametrize("name", QUICK)
def test_networks_lose_their_norms_and_no_memory_is_added(name):
    entry = ENTRIES[name]
    before, after, _ = fold(entry.build(), entry.inputs())
    assert len(norms(before)) > LEFT.get(name, 0)
    assert len(norms(after)) == LEFT.get(name, 0)
    assert state_bytes(after) < state_bytes(before)


def test_every_size_of_a_dynamic_batch_agrees():
    entry = ENTRIES["vgg"]
    model, inputs = entry.build(), entry.inputs()
    _, after, _ = fold(model, inputs, dynamic_shapes=entry.dynamic_shapes(inputs))
    for batch in (2, 5):
        (x,) = entry.example(batch, 32).values()
        torch.testing.assert_close(after.run([x])[0], model(x), rtol=1e-4, atol=1e-4)


def test_a_norm_before_padding_says_why_it_stays():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)
            nn.init.normal_(self.norm.bias)

        def forward(self, x):
            return self.conv(self.norm(x))

    before, after, report = fold(Padded().eval(), {"x": torch.randn(2, 3, 6, 6)})
    assert after is before
    (missed,) = report.missed
    assert "padding [1, 1] puts zeros after the norm's shift" in missed.reason
    assert missed.node == "conv2d"
    assert missed.source is not None
    assert "test_fold_batch_norm.py" in missed.source


def test_norms_in_training_are_refused_with_the_way_out():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    _, after, report = fold(model, {"input": torch.randn(2, 3, 6, 6)})
    assert len(norms(after)) == 1
    assert {(m.option, "each batch" in m.reason) for m in report.missed} == {("model.eval()", True)}


def test_a_norm_module_used_after_two_convolutions_goes_twice():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
            self.norm = nn.BatchNorm2d(4)
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(self.b(x))

    before, after, _ = fold(Shared().eval(), {"x": torch.randn(2, 3, 6, 6)})
    assert not norms(after)
    assert not any(name.startswith("norm.running") for name in after.state)
    assert state_bytes(after) <= state_bytes(before)


def test_gradients_of_the_input_survive():
    entry = ENTRIES["plain-stack"]
    model, inputs = entry.build(), entry.inputs()
    _, after, _ = fold(model, inputs)
    (x,) = inputs.values()
    old, new = x.clone().requires_grad_(), x.clone().requires_grad_()
    model(old).square().sum().backward()
    after.run([new])[0].square().sum().backward()
    torch.testing.assert_close(new.grad, old.grad, rtol=1e-3, atol=1e-4)


def test_resnet20_predicts_the_same_classes(data_dir):
    model = load_published(resnet20(), data_dir / "weights" / "resnet20-12fca82f.th")
    images, labels = cifar_images(data_dir, 500)
    example = {"x": images[:4]}
    before, after, report = fold(model, example, dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    assert len(norms(before)) == 19
    assert not norms(after)
    assert len(report.applied) == 19
    with torch.no_grad():
        want, got = model(images), after.run([images])[0]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    assert torch.equal(got.argmax(1), want.argmax(1))
    assert (got.argmax(1) == labels).float().mean() > 0.75
