"""Norm tweaking: channels of a block's output with the means and variances that they had.

Li et al. 2023, "Norm Tweaking: High-performance Low-bit Quantization of Large Language Models",
section 3: once the weights of a block are quantized, gradient descent moves the scales and shifts
of its norms, little and for few steps, so as to lower (equation 2)

    L = 1/C * sum over channels c of |mean_c - mean'_c| + |var_c - var'_c|

Means and variances are over all rows of a sample. Here, as in all of calibration, the float model
has float inputs, and the size of an output is its unit, so that blocks of any size move alike. What
brings these nearer may still take values apart: as much of it is kept as their squared error falls
on samples that it was not learned from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.calibration import Segment
from graphopt.kernels.quantized.learnable import Adam, Learnable
from graphopt.kernels.quantized.signround import through
from graphopt.passes.quantize.learned import Forward, Reconstruction
from graphopt.passes.quantize.norms import Affine, name_of, norms, refusal
from graphopt.program import Program
from graphopt.rewrite import Match

SPEED = 0.03
"""Of scales and shifts, in parts of the scale's root mean square; see `Learnable.descend`."""
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of what was learned, the least first, that are looked at."""


class LearnedVector(Learnable):
    """A scale or shift of norms.

    Args:
        unit: what it moves by at a speed of 1.
    """

    def __init__(self, start: Tensor, unit: float) -> None:
        self.start, self.unit = start.detach(), unit
        self.moves = [torch.zeros_like(self.start, dtype=torch.float32).requires_grad_()]
        self.adam = Adam(self.moves, [SPEED])

    def read(self) -> Tensor:
        """As it will be stored, float32, differentiable."""
        made = self.start.to(torch.float32) + self.unit * self.moves[0]
        return through(made, lambda numbers: numbers.to(self.start.dtype).to(torch.float32))

    def descend(self, rate: float) -> None:
        self.adam.step(rate)

    def stored(self) -> Tensor:
        """In its dtype."""
        return self.read().detach().to(self.start.dtype)


class Distribution(Reconstruction):
    """Learns what brings means and variances of channels nearer; see above."""

    def _loss(self, index: int, weights: Mapping[fx.Node, Tensor]) -> Tensor:
        outputs = self.forward(index, weights)
        losses = []
        for place, size in zip(self.floats, self.sizes, strict=True):
            wanted = self.targets[index][place]
            unit = (size / sum(row[place].numel() for row in self.targets)) ** 0.5
            pairs = zip(_moments(outputs[place], unit), _moments(wanted, unit), strict=True)
            losses += [(made - known).abs().mean() for made, known in pairs]
        return torch.stack(losses).sum()

    def _relative(self, loss: float) -> float:
        return loss / len(self.floats)


def _moments(values: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel."""
    rows = values.to(torch.float32).reshape(-1, values.shape[-1] if values.dim() else 1) / unit
    return rows.mean(0), rows.var(0, correction=0)


def _share(vectors: Mapping[fx.Node, LearnedVector], squared: Reconstruction) -> float:
    """Move back to the share of what was learned that has the least squared error."""
    ends = [vector.places()[0] for vector in vectors.values()]

    def lost(share: float) -> float:
        for vector, end in zip(vectors.values(), ends, strict=True):
            vector.move([share * end])
        return squared.lost()

    best = min(SHARES, key=lost)
    lost(best)
    return best


def _halves(
    run: Forward, targets: Sequence[Sequence[Any]]
) -> list[tuple[Forward, Sequence[Sequence[Any]]]]:
    """Every other sample, and those between; of one sample alone, that twice."""
    count = len(targets)
    places = (range(0, count, 2), range(min(1, count - 1), count, 2))
    return [(partial(_run, run, own), [targets[i] for i in own]) for own in places]


def _run(
    run: Forward, own: Sequence[int], index: int, weights: Mapping[fx.Node, Tensor]
) -> Sequence[Any]:
    return run(own[index], weights)


class Tweaks:
    """Norms of a program, block by block.

    Attributes:
        found: by the name of the scale, what takes its place or why nothing does.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.matches = [m for m in norms(program.graph, program) if refusal(m) is None]
        self.found: dict[str, Affine] = {}

    def of(self, segment: Segment) -> list[Match]:
        """Those that are of a block alone; others that it has are noted."""
        own, inside = set(segment.nodes), []
        for match in self.matches:
            if own.issuperset(match.roots):
                inside.append(match)
            elif not own.isdisjoint(match.roots):
                self.found[name_of(match)] = Affine("norms of several blocks read its scale")
        return inside

    def learn(
        self,
        inside: Sequence[Match],
        forward: Callable[[Sequence[fx.Node]], Forward],
        targets: Sequence[Sequence[Any]],
        steps: int,
    ) -> dict[fx.Node, Tensor]:
        """New values of scales and shifts, where they are better."""
        vectors = {node: vector for m in inside for node, vector in self._vectors(m).items()}
        try:
            run = forward(list(vectors))
            taught, others = _halves(run, targets)
            distribution = Distribution(taught[0], vectors, taught[1], steps)
            with torch.enable_grad():
                learned = distribution.learn()
            share = _share(vectors, Reconstruction(others[0], vectors, others[1], 0))
        except (RuntimeError, ValueError) as error:
            return self._none(inside, f"its block does not let it be learned: {error!s:.200}")
        if not learned.after < learned.before:
            return self._none(inside, "nothing brings means and variances of its block nearer")
        if not share:
            reason = "what brings means and variances of its block nearer takes values apart"
            return self._none(inside, reason)
        after = distribution.lost()
        note = (
            f"means and variances of its block are off by {after:.3g}, {learned.before:.3g} before "
            "it was changed"
        )
        made = {node: vector.stored() for node, vector in vectors.items()}
        for match in inside:
            self.found[name_of(match)] = Affine(
                note, made[match["scale"]], made.get(match["shift"])
            )
        return made

    def _none(self, inside: Sequence[Match], note: str) -> dict[fx.Node, Tensor]:
        self.found |= {name_of(match): Affine(note) for match in inside}
        return {}

    def _vectors(self, match: Match) -> dict[fx.Node, LearnedVector]:
        held = [node for node in (match["scale"], match["shift"]) if node is not None]
        tensors = {n: self.program.state[self.program.target_of(n) or n.name] for n in held}
        size = tensors[match["scale"]].detach().to(torch.float32).square().mean().sqrt()
        return {node: LearnedVector(t, float(size) or 1.0) for node, t in tensors.items()}
