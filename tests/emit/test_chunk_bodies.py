"""With Inductor, bodies of chunked heads run by code where that was measured to be faster."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt.backend import Backend
from graphopt.emit import chunk_bodies
from graphopt.kernels.chunked_rows import chunked_rows
from graphopt.recipe import Options
from graphopt.rewrite import arguments

CLASSES, WIDTH = 1200, 16


class Distilled(nn.Module):
    """Jensen-Shannon divergence from a teacher's head."""

    def __init__(self):
        super().__init__()
        self.student = nn.Linear(WIDTH, CLASSES, bias=False)
        self.teacher = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, hidden, seen):
        p = self.student(hidden).log_softmax(-1)
        with torch.no_grad():
            q = self.teacher(seen).log_softmax(-1)
        mean = torch.logaddexp(p, q) - 0.6931471805599453
        both = p.exp() * (p - mean) + q.exp() * (q - mean)
        return 0.5 * both.sum(-1).mean()


def given():
    return torch.randn(96, WIDTH), torch.randn(96, WIDTH)


@pytest.fixture
def measured(monkeypatch):
    """Says what a measurement gives."""

    def set_to(plain, code):
        def paces(_given):
            if code is None:
                raise RuntimeError("no C++ compiler")
            return plain, code

        monkeypatch.setattr(chunk_bodies, "_paces", paces)

    return set_to


def fused(model):
    fast = graphopt.compile(model, example_inputs=given(), passes="exact", measure=False)
    assert "FuseRowSummaries" in [a.rule for a in fast.report.applied]
    return fast.program.copy().graph


def marked(graph):
    (node,) = graph.find_nodes(op="call_function", target=chunked_rows)
    return node.kwargs.get("compiled", False)


@pytest.mark.parametrize(("code", "taken"), [(0.5, True), (0.95, False), (2.0, False)])
def test_what_is_faster_is_taken(measured, code, taken):
    measured(1.0, code)
    graph = fused(Distilled())
    notes = chunk_bodies.compile_bodies(graph)
    assert marked(graph) is taken
    assert [("2x as fast" in note) for note in notes] == [True] * taken


def test_without_a_compiler_operators_run_and_it_is_said(measured):
    measured(1.0, None)
    graph = fused(Distilled())
    (note,) = chunk_bodies.compile_bodies(graph)
    assert not marked(graph)
    assert "runs by operators: code cannot be made (RuntimeError: no C++ compiler)" in note


def test_a_piece_is_measured_as_it_runs():
    (node,) = fused(Distilled()).find_nodes(op="call_function", target=chunked_rows)
    plain, code = chunk_bodies._paces(arguments(node))
    assert plain > 0
    assert code > 0


def trained(model, call, args):
    loss = call(*args)
    return [loss.detach(), *torch.autograd.grad(loss, [model.student.weight, args[0]])]


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("ahead", [True, False])
def test_a_compiled_step_trains_as_the_model(measured, ahead):
    measured(1.0, 0.25)
    model = Distilled()
    args = [a.requires_grad_() for a in given()]
    if ahead:
        fast = graphopt.compile(model, example_inputs=given(), passes="exact", target="inductor")
        reports = [fast.report]
    else:
        backend = Backend(Options(target="inductor", strict=True))
        fast, reports = torch.compile(copy.copy(model), backend=backend), backend.reports
    found, wanted = trained(model, fast, args), trained(model, model, args)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    assert any("runs by Inductor's code: 4x as fast" in n for r in reports for n in r.notes)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("ahead", [True, False])
def test_nothing_is_measured_where_that_is_not_wanted(measured, ahead):
    measured(1.0, 0.25)
    model, args = Distilled(), given()
    options = {"passes": "exact", "target": "inductor", "measure": False}
    if ahead:
        reports = [graphopt.compile(model, example_inputs=args, **options).report]
    else:
        backend = Backend(Options(**options, strict=True))
        torch.compile(model, backend=backend)(*args)
        reports = backend.reports
    assert reports
    assert not any("Inductor's code" in note for r in reports for note in r.notes)


def test_losses_of_labels_keep_operators(measured):
    measured(1.0, 0.25)

    class Labelled(Distilled):
        def forward(self, hidden, labels):
            return torch.nn.functional.cross_entropy(self.student(hidden), labels)

    args = torch.randn(96, WIDTH), torch.randint(CLASSES, (96,))
    fast = graphopt.compile(Labelled(), example_inputs=args, passes="exact", measure=False)
    graph = fast.program.copy().graph
    assert chunk_bodies.compile_bodies(graph) == []
    assert not marked(graph)
