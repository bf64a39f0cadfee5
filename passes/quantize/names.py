"""Weights by name: patterns that users write, and every name that a weight goes by."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import fx

from graphopt.errors import RecipeError
from graphopt.program import Program
from graphopt.rewrite import Refusal


def weight_names(program: Program, weight: fx.Node) -> list[str]:
    """See `Program.weight_names`."""
    return program.weight_names(weight)


def paths(names: Iterable[str]) -> Iterator[str]:
    """Names and the modules that they lie in: ``a.b.weight``, ``a.b``, ``a``."""
    for name in names:
        parts = name.split(".")
        yield from (".".join(parts[:end]) for end in range(len(parts), 0, -1))


@dataclass(frozen=True)
class Skip:
    """What is left alone: patterns, as `fnmatch` reads them, of weights or of their modules."""

    patterns: Sequence[str] = ()

    def check(self, program: Program) -> None:
        """Whether each pattern means something in a model.

        Raises:
            RecipeError: one matches no name; the nearest are told.
        """
        check_patterns("skip", self.patterns, program)

    def refusal(self, program: Program, weight: fx.Node) -> Refusal | None:
        """Why a weight is left alone, if it is."""
        if not self.patterns:
            return None
        names = weight_names(program, weight)
        for name in names:
            for pattern in self.patterns:
                if any(fnmatchcase(path, pattern) for path in paths([name])):
                    others = [f"`{n}`" for n in names if n != name]
                    along = f", and {', '.join(others)} with it" if others else ""
                    reason = f"`{name}` is skipped by {pattern!r}{along}"
                    return Refusal(reason, weight, "QuantizeMatmul:skip")
        return None


def check_patterns(option: str, patterns: Iterable[str], program: Program) -> None:
    """Whether each pattern of an option matches a name of a model.

    Raises:
        RecipeError: one does not; the nearest names are told.
    """
    check_names(option, patterns, program.state, program.name)


def check_names(option: str, patterns: Iterable[str], names: Iterable[str], model: str) -> None:
    """Whether each pattern of an option matches one of the names of weights in a model.

    Raises:
        RecipeError: one does not; the nearest names are told.
    """
    known = dict.fromkeys(paths(names))
    for pattern in patterns:
        if pattern not in known and not any(fnmatchcase(name, pattern) for name in known):
            raise RecipeError(
                f"{option}: no weight or module of {model} is called {pattern!r}",
                where=f"QuantizeMatmul:{option}",
                fix=_nearest(pattern, list(known)),
            )


@dataclass(frozen=True)
class Scope:
    """Which weights a pass takes: heads and embeddings are asked for, others are skipped."""

    head: bool = False
    embeddings: bool = False
    skip: Skip = field(default_factory=Skip)


USUAL = Scope()


def _nearest(pattern: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
    if not close:
        return "patterns are those of fnmatch, of names as in state_dict()"
    return f"the nearest names are {', '.join(map(repr, close))}"
