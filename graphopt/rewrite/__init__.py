"""The rewrite engine: everything a rule or a pass needs, in one import."""

from graphopt.rewrite.builder import Builder
from graphopt.rewrite.match import Match, Matcher, Refusal, arguments
from graphopt.rewrite.passes import Axis, Cut, Pass, make_pass, parse_pass, registered_passes
from graphopt.rewrite.pattern import either, num, op, var
from graphopt.rewrite.rule import Candidate, Example, Numeric, Profit, Rule

__all__ = [
    "Axis",
    "Builder",
    "Candidate",
    "Cut",
    "Example",
    "Match",
    "Matcher",
    "Numeric",
    "Pass",
    "Profit",
    "Refusal",
    "Rule",
    "arguments",
    "either",
    "make_pass",
    "num",
    "op",
    "parse_pass",
    "registered_passes",
    "var",
]
