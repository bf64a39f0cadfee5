"""What a rewrite is: pattern, check, rewrite, and the examples its tests are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx, nn

from graphopt.program import Program
from graphopt.rewrite.match import Match, Matcher, MatchTrace, Refusal
from graphopt.rewrite.pattern import anchors, pattern_size

if TYPE_CHECKING:
    from graphopt.rewrite.builder import Builder
    from graphopt.rewrite.passes import Pass


class Numeric(StrEnum):
    """What a rule promises about numbers; enforced by measurement.

    ``BITWISE``: equal bits. ``REASSOCIATED``: the same mathematics with other rounding; the error
    against float64 is at most 2x (float32) or 3x (float16, bfloat16) that of the original.
    ``LOSSY``: an approximation; the rule declares how large its relative error may be.
    """

    BITWISE = "bitwise"
    REASSOCIATED = "reassociated"
    LOSSY = "lossy"


class Profit(StrEnum):
    """``ALWAYS``: strictly less work, or the enabler of other rules. ``MEASURED``: timed here."""

    ALWAYS = "always"
    MEASURED = "measured"


@dataclass(frozen=True)
class Example:
    """A model on which a rule applies (or, as a near miss, must refuse).

    Attributes:
        module: builds the module; called under a fixed seed.
        inputs: builds the positional inputs.
        dynamic_shapes: as `torch.export.export`.
        reason: for near misses, text that the explanation must contain; empty when the rule has
            nothing to say about such a graph.
        training: capture in training mode.
    """

    name: str
    module: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    dynamic_shapes: Any = None
    reason: str = ""
    training: bool = False
    count: int = 1


@dataclass(frozen=True)
class Candidate:
    """A place a rule looked at: a match, or the furthest partial match."""

    match: Match | None = None
    trace: MatchTrace | None = None


class Rule:
    """One rewrite. Subclasses give a docstring (equation, source) and the four parts.

    Class attributes:
        pattern: a pattern, or a tuple of patterns for several outputs.
        numeric: numeric class, enforced by measurement.
        profit: whether the rewrite must be shown to pay on this machine.
        benefit: larger wins where matches overlap.
        version: raised when the rule's behaviour changes; kept in certificates.
        tolerance: for lossy rules, the largest relative RMS error.
        lift: the option that allows a larger one.
        doubt: what may be the cause where the error is larger, and what to do about it.
        gradient_tolerance: for rules whose operators filter their gradients, the largest relative
            RMS error of these. Without the filter they are held to `numeric`.
        caveat: what certificates say of it.
        near: fraction of the pattern that must match before a miss is worth reporting.
        folds: operators on constants that the rewrite builds become constants at once.
        apart: each root is computed from its own arguments alone, so that one root may feed
            another.
    """

    pattern: ClassVar[Any] = ()
    numeric: ClassVar[Numeric] = Numeric.REASSOCIATED
    profit: Profit = Profit.MEASURED
    benefit: ClassVar[int] = 1
    version: ClassVar[int] = 1
    tolerance: float = 0.0
    lift: ClassVar[str | None] = None
    doubt: str = ""
    gradient_tolerance: ClassVar[float] = 0.0
    caveat: ClassVar[str] = ""
    near: ClassVar[float] = 0.6
    folds: ClassVar[bool] = True
    apart: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def patterns(self) -> tuple[Any, ...]:
        return self.pattern if isinstance(self.pattern, tuple) else (self.pattern,)

    def check(self, match: Match) -> Refusal | None:  # noqa: ARG002
        """A reason not to rewrite this match, or ``None``."""
        return None

    def rewrite(self, match: Match, build: Builder) -> fx.Node | tuple[fx.Node, ...]:
        """Build the replacement; returns one node per root."""
        raise NotImplementedError(f"{self.name} has no rewrite")

    def remark(self, match: Match) -> str:  # noqa: ARG002
        """A sentence on what the rewrite of a match gains, for the report's notes."""
        return ""

    def prepare(self) -> Iterable[Pass]:
        """Passes that must run before this rule's examples (such as canonicalization)."""
        return ()

    def examples(self) -> Iterable[Example]:
        """Models on which the rule applies."""
        return ()

    def near_misses(self) -> Iterable[Example]:
        """Models that look alike and must come out unchanged, with a reason."""
        return ()

    def find(self, program: Program) -> Iterator[Candidate]:
        """Every candidate in graph order. Rules without a fixed shape override this."""
        roots = anchors(self.patterns[0])
        matcher = Matcher(program)
        wanted = sum(pattern_size(p) for p in self.patterns)
        for node in program.graph.nodes:
            if node.op != "call_function" or node.target not in roots:
                continue
            program.read.clear()
            matches = list(matcher.at(self.patterns, node))
            yield from (Candidate(match=m) for m in matches)
            if not matches and matcher.trace.matched >= max(2, self.near * wanted):
                yield Candidate(trace=matcher.trace)


@dataclass
class Missed:
    """A candidate that was left alone, and why."""

    rule: str
    reason: str
    node: str | None = None
    source: str | None = None
    option: str | None = None
    stage: str = "check"
    extra: dict[str, Any] = field(default_factory=dict)
    weights: tuple[str, ...] = ()
