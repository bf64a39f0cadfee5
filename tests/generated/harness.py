"""From a rule's own examples and near misses to checks of what the pipeline does with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.capture import capture
from graphopt.certify import certify
from graphopt.pipeline import Context, run_pass
from graphopt.program import Program
from graphopt.report.model import Report
from graphopt.rewrite import Example, Pass, Rule


@dataclass
class Outcome:
    before: Program
    after: Program
    report: Report
    sound: bool


@dataclass(frozen=True)
class Only(Pass):
    """A pass that holds a single rule, untimed: examples show what applies, not what pays."""

    rule: Rule

    def rules(self):
        return (self.rule,)

    def options(self):
        return {}


def run_example(example: Example, step: Pass, prepare: tuple[Pass, ...] = ()) -> Outcome:
    """Capture the example, apply ``prepare`` then ``step`` strictly, certify the whole."""
    torch.manual_seed(1234)
    module = example.module().train(example.training)
    torch.manual_seed(4321)
    inputs = example.inputs()
    program = capture(module, inputs, dynamic_shapes=example.dynamic_shapes)
    context = Context.of(program, strict=True, measure=False)
    ready = program
    for first in prepare:
        ready = run_pass(ready, first, context)
    context.report = Report("example")
    after = run_pass(ready, step, context)
    sound = certify(program, after, context, name="whole")
    return Outcome(ready, after, context.report, sound)
