"""Loss heads whose gradients leave out the slopes that round to nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from graphopt.kernels.filtering import THRESHOLD
from graphopt.passes.loss_head.fuse import FuseRowSummaries
from graphopt.program import Program, val
from graphopt.rewrite import Candidate, Match


class FuseFilteredRowSummaries(FuseRowSummaries):
    """As `FuseRowSummaries`, with gradients filtered after Wijmans et al. 2024, section 4.3.

    Of a row's slopes ``s`` those below ``t max |s|`` are left out, ``t = 2^-12``. Where the rest
    cancel the largest, as behind a softmax, ``|left out|_1 <= max |s|``; so that
    ``|left out|_2 <= sqrt(t) max |s| <= sqrt(t) |s|_2``: gradients are held to an error of
    ``sqrt(t) = 2^-6``, relative, beside what rounding explains. Rows whose weights have much in
    common, or slopes of another kind, may be off by more: then the head is fused without a filter.
    Chunks keep the sums of what is left out. The Triton kernels do not, and take the largest
    cotangent of a row for its largest slope, see `kernels.cross_entropy.filtering`.
    """

    benefit = FuseRowSummaries.benefit + 1
    gradient_tolerance = THRESHOLD**0.5
    caveat = "gradients approximate: slopes below 2^-12 of the row's largest are left out"
    options: Mapping[str, float] = {"filter_threshold": THRESHOLD}

    def find(self, program: Program) -> Iterator[Candidate]:
        """Where something trains."""
        if program.frozen or not program.differentiable():
            return
        for candidate in super().find(program):
            match = candidate.match
            if match is not None and "refusal" not in match.bindings and _has_gradient(match):
                yield candidate

    def remark(self, match: Match) -> str:
        return f"{super().remark(match)}; {self.caveat}"


def _has_gradient(match: Match) -> bool:
    return any(val(root).is_floating_point() for root in match.roots)
