"""Losses on pairs of answers or of batches, as trainers write them, with sizes that change."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphopt
from graphopt.backend import Backend
from graphopt.recipe import Options

CLASSES, WIDTH = 2000, 16


def log_probabilities(logits, labels, *, mean=False):
    logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != -100
    picked = logits.log_softmax(-1).gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    total = (picked * counts).sum(-1)
    return total / counts.sum(-1) if mean else total


def dpo(logits, labels, _):
    both = log_probabilities(logits, labels)
    half = labels.shape[0] // 2
    return -F.logsigmoid(0.1 * (both[:half] - both[half:])).mean()


def simpo(logits, labels, _):
    chosen, rejected = log_probabilities(logits, labels, mean=True).chunk(2)
    return -F.logsigmoid(2 * (chosen - rejected) - 1).mean()


def _odds(chosen, rejected):
    return chosen - rejected - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))


def orpo(logits, labels, _):
    half = labels.shape[0] // 2
    both = log_probabilities(logits, labels, mean=True)
    loss = F.cross_entropy(
        logits[:half, :-1].reshape(-1, logits.shape[-1]), labels[:half, 1:].reshape(-1)
    )
    return loss - 0.1 * F.logsigmoid(_odds(both[:half], both[half:])).mean()


def orpo_cut_first(logits, labels, _):
    half = labels.shape[0] // 2
    chosen = log_probabilities(logits[:half], labels[:half], mean=True)
    rejected = log_probabilities(logits[half:], labels[half:], mean=True)
    loss = F.cross_entropy(logits[:half, :-1].flatten(0, 1), labels[:half, 1:].flatten())
    return loss - 0.1 * F.logsigmoid(_odds(chosen, rejected)).mean()


def kto(logits, labels, reference):
    reward = log_probabilities(logits, labels) - reference
    base = reward.mean().clamp_min(0).detach()
    good = 1 - torch.sigmoid(0.1 * (reward - base))
    return torch.where(reference > 0, good, 1 - torch.sigmoid(0.1 * (base - reward))).mean()


PAIRS = [dpo, simpo, orpo, orpo_cut_first, kto]


class Answers(nn.Module):
    def __init__(self, loss):
        super().__init__()
        self.head, self.loss = nn.Linear(WIDTH, CLASSES, bias=False), loss

    def forward(self, hidden, labels, reference):
        return self.loss(self.head(hidden), labels, reference)


def answers(batch, tokens):
    labels = torch.randint(0, CLASSES, (batch, tokens))
    labels[0, :3] = -100
    return torch.randn(batch, tokens, WIDTH), labels, 5 * torch.randn(batch)


class Both(nn.Module):
    """Symmetric, as CLIP has it."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x, y):
        x, y = F.normalize(self.left(x), dim=-1), F.normalize(self.right(y), dim=-1)
        logits = self.scale.exp() * x @ y.t()
        own = torch.arange(logits.shape[0], device=x.device)
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2


def batches(rows):
    return torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)


def trained(model, call, args):
    args = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
    loss = call(*args)
    wanted = [*model.parameters(), *(a for a in args if a.is_floating_point())]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [loss.detach(), *(g for g in found if g is not None)]


def assert_trains_alike(model, fast, args):
    for found, wanted in zip(trained(model, fast, args), trained(model, model, args), strict=True):
        assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def fused(report):
    return "FuseRowSummaries" in [a.rule for a in report.applied]


@pytest.mark.parametrize("loss", PAIRS)
def test_pairs_of_answers_are_fused_for_any_number_of_them(loss):
    model = Answers(loss)
    sizes = {0: "batch", 1: "tokens"}
    fast = graphopt.compile(
        model,
        example_inputs=answers(6, 17),
        dynamic_shapes={"hidden": sizes, "labels": sizes, "reference": {0: "batch"}},
        passes="exact",
    )
    assert fused(fast.report), fast.report.missed
    for args in (answers(6, 17), answers(10, 9)):
        assert_trains_alike(model, fast, args)


def test_pairs_of_batches_are_fused_for_any_size():
    model, rows = Both(), torch.export.Dim("rows", min=2)
    fast = graphopt.compile(
        model,
        example_inputs=batches(300),
        dynamic_shapes={"x": {0: rows}, "y": {0: rows}},
        passes="exact",
    )
    assert fused(fast.report), fast.report.missed
    for args in (batches(300), batches(40)):
        assert_trains_alike(model, fast, args)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("loss", PAIRS)
def test_dynamo_compiles_once_for_sizes_that_change(loss):
    model = Answers(loss)
    backend = Backend(Options(strict=True))
    fast = torch.compile(model, backend=backend)
    for sizes in ((6, 35), (8, 33), (10, 34)):
        assert_trains_alike(model, fast, answers(*sizes))
    assert [fused(r) for r in backend.reports] == [True, True], backend.reports
    assert not any("not tried" in note for r in backend.reports for note in r.notes)


@pytest.mark.usefixtures("fresh_dynamo")
def test_fewer_labels_than_rows_compile_again():
    """Equal sizes are a guard, not an assumption."""

    class Gathered(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(WIDTH, CLASSES, bias=False)

        def forward(self, hidden, labels):
            return -self.head(hidden).log_softmax(-1).gather(-1, labels).mean()

    def given(rows, named):
        return torch.randn(rows, WIDTH), torch.randint(0, CLASSES, (named, 1))

    model = Gathered()
    backend = Backend(Options(strict=True))
    fast = torch.compile(model, backend=backend, dynamic=True)
    for sizes in ((64, 64), (80, 80), (80, 50)):
        assert_trains_alike(model, fast, given(*sizes))
    assert [fused(r) for r in backend.reports] == [True, False]


def test_in_bfloat16_pairs_are_as_near_as_in_eager_mode():
    """One draw says nothing: the difference of two rounded means decides, by chance."""
    model = Answers(simpo).bfloat16()
    exact = copy.deepcopy(model).double()
    args = [a.bfloat16() if a.is_floating_point() else a for a in answers(4, 33)]
    fast = graphopt.compile(model, example_inputs=tuple(args), passes="exact")
    assert fused(fast.report)
    squares = torch.zeros(2, dtype=torch.float64)
    for seed in range(30):
        torch.manual_seed(seed)
        args = [a.bfloat16() if a.is_floating_point() else a for a in answers(4, 33)]
        wide = [a.double() if a.is_floating_point() else a for a in args]
        wanted = trained(exact, exact, wide)
        for k, call in enumerate((model, fast)):
            found = trained(model, call, args)
            errors = [(f - w).norm() / w.norm() for f, w in zip(found, wanted, strict=True)]
            squares[k] += torch.stack(errors).square().sum()
    assert squares[1] <= 1.2**2 * squares[0]
