"""A search for the bits of each weight, under a budget of size, latency or quality."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.errors import RecipeError
from graphopt.passes.quantize.allocation import Allocation, Choice, allocate, frontier
from graphopt.passes.quantize.budget import bytes_of
from graphopt.passes.quantize.latency import nanoseconds
from graphopt.passes.quantize.layers import Fields
from graphopt.passes.quantize.names import weight_names
from graphopt.passes.quantize.sensitivity import Target, choices
from graphopt.passes.quantize.weights import QuantizeWeights
from graphopt.program import Program, tensor_bytes
from graphopt.rewrite.driver import apply_rules
from graphopt.rewrite.passes import Attempt, Settled, Trials

if TYPE_CHECKING:
    from graphopt.passes.quantize import QuantizeMatmul

ROUNDS = 6
"""Times a size is tried, where what was chosen came out larger than it was counted."""

MEASURED = 8
"""Points of the frontier whose quality is measured, at most."""

CLOSE = 0.005
"""Share of the model's bytes that is not worth another measurement."""


@dataclass
class Unit:
    """Weights that share a name, and so have one format.

    Attributes:
        names: by which a recipe knows them; without any, they get the most bits.
        options: what a recipe says of each choice.
        choices: bytes and loss of each.
        costs: what the budget counts of each: bytes, or nanoseconds.
        held: bytes as floats.
    """

    names: tuple[str, ...]
    options: list[Fields]
    choices: list[Choice]
    costs: list[int]
    held: int

    def without(self, position: int) -> None:
        """Leave out a choice that did not hold; floats stand for the last one."""
        for values in (self.options, self.choices, self.costs):
            del values[position]  # type: ignore[attr-defined]
        if not self.options:
            self.options, self.choices = [None], [Choice(self.held, 0.0)]
            self.costs = [self.held]


class Search:
    """Chooses the formats of one pass on one program.

    Raises:
        RecipeError: there is no budget, or it is less than the least there is.
    """

    def __init__(self, given: QuantizeMatmul, trials: Trials) -> None:
        self.given, self.trials = given, trials
        self.passes = given.each
        if given.size is None and given.latency is None and trials.least is None:
            raise RecipeError(
                "a search for bits needs a budget",
                where="QuantizeMatmul:bits",
                fix="give it size='40%', or latency= in milliseconds; or compile with quality= "
                "and budget=",
            )
        if not trials.program.frozen:
            raise RecipeError(
                "the model trains: its weights change, and bits cannot be chosen for them",
                where="QuantizeMatmul:bits",
                fix="capture it in eval mode, or give bits= as one number",
            )
        if not trials.samples:
            raise RecipeError(
                "a search for bits looks at calibration inputs; there are none",
                where="QuantizeMatmul:bits",
                fix="calibration=[inputs, ...] with example_inputs, on the command line "
                "--calibration FILE; or give bits= as one number",
            )
        self.units, self.rest = self._units()

    def run(self) -> Settled:
        """The pass with one format for each weight."""
        if not self.units:
            return Settled(self.passes[-1])
        if self.given.size is not None:
            return self._within_size(bytes_of(self.given.size, self._floats))
        if self.given.latency is not None:
            return self._within_latency(round(self.given.latency * 1e6))
        return self._within_quality()

    def _within_size(self, most: int) -> Settled:
        beside = 0
        for _ in range(ROUNDS):
            found = self._allocated(most - self.rest - beside, most, "bytes")
            attempt = self.trials.attempt(self._step(found.chosen))
            if attempt.bytes <= most:
                self._record(found.chosen, attempt, {})
                return Settled(self._step(found.chosen), attempt)
            if not self._leave_out(found.chosen, attempt.program):
                beside = max(beside, attempt.bytes - self.rest - found.bytes)
        raise RecipeError(
            f"the model takes {attempt.bytes} bytes where size allows {most}: rewrites were taken "
            "back, and so were those that were chosen instead",
            where="QuantizeMatmul:size",
            fix="give a larger size, or tolerance=0.9, which keeps rewrites of larger errors",
        )

    def _within_latency(self, most: int) -> Settled:
        found = self._allocated(most, most, "ns")
        self._record(found.chosen, None, {})
        return Settled(self._step(found.chosen))

    def _within_quality(self) -> Settled:
        """By halves, from the frontier's end of least loss: quality is taken to fall with size."""
        least = self.trials.least
        assert least is not None  # asked for before
        points = list(frontier([unit.choices for unit in self.units]))
        tried: dict[int, Attempt] = {}
        low, high = -1, len(points) - 1
        kept = self._judged(points, high, tried)
        if kept.quality is not None and kept.quality < least:
            raise RecipeError(
                f"quality is {kept.quality:.6g} with the most bits for every weight; the budget "
                f"allows {least:.6g}",
                where="QuantizeMatmul:bits",
                fix="offer more bits, raise `budget`, or skip= weights that suffer most",
            )
        while high - low > 1 and len(tried) < MEASURED and self._apart(points, low, high):
            middle = (low + high) // 2
            found = self._judged(points, middle, tried)
            if found.quality is not None and found.quality >= least:
                high, kept = middle, found
            else:
                low = middle
        qualities = {points[i].chosen: a.quality for i, a in tried.items()}
        self._record(points[high].chosen, kept, qualities)
        return Settled(self._step(points[high].chosen), kept)

    def _apart(self, points: Sequence[Allocation], low: int, high: int) -> bool:
        gap = points[high].bytes - points[max(low, 0)].bytes
        return gap > CLOSE * (self.rest + points[high].bytes)

    def _judged(
        self, points: Sequence[Allocation], index: int, tried: dict[int, Attempt]
    ) -> Attempt:
        self.trials.progress(f"quality of {self.rest + points[index].bytes} bytes")
        tried[index] = self.trials.attempt(self._step(points[index].chosen), judged=True)
        return tried[index]

    def _allocated(self, spare: int, most: int, unit: str) -> Allocation:
        weights = [
            [Choice(cost, choice.loss) for cost, choice in zip(u.costs, u.choices, strict=True)]
            for u in self.units
        ]
        smallest = sum(min(unit.costs) for unit in self.units)
        if smallest <= spare:
            return allocate(weights, spare)
        smallest += most - spare
        if unit == "bytes":
            raise RecipeError(
                f"the smallest that these bits allow are {smallest} bytes; size allows {most}",
                where="QuantizeMatmul:size",
                fix="give a larger size, fewer bits, or embeddings=True and head=True where "
                "these are still in float",
            )
        raise RecipeError(
            f"the fastest that these bits allow takes {smallest / 1e6:.4g} ms; latency allows "
            f"{most / 1e6:.4g}",
            where="QuantizeMatmul:latency",
            fix="give more time, or other bits",
        )

    def _step(self, chosen: Sequence[int]) -> QuantizeMatmul:
        """The pass that repeats a choice: the user's own patterns of other weights come first."""
        widest = self.passes[-1]
        found: dict[str, Any] = {}
        for unit, position in zip(self.units, chosen, strict=True):
            found |= dict.fromkeys(map(glob.escape, unit.names), unit.options[position])
        rest = {p: fields for p, fields in widest.layers.items() if p not in found}
        return replace(widest, layers={**found, **rest})

    def _record(
        self,
        chosen: tuple[int, ...],
        attempt: Attempt | None,
        qualities: dict[tuple[int, ...], float | None],
    ) -> None:
        """Every point of the frontier of bytes and loss, and what was chosen."""
        for point in frontier([unit.choices for unit in self.units]):
            if point.chosen != chosen:
                quality = qualities.get(point.chosen)
                size = self.rest + point.bytes
                self.trials.record(size, point.loss, quality, chosen=False)
        made = [u.choices[i] for u, i in zip(self.units, chosen, strict=True)]
        size = self.rest + sum(c.bytes for c in made) if attempt is None else attempt.bytes
        loss = sum(c.loss for c in made)
        self.trials.record(size, loss, qualities.get(chosen), chosen=True)

    def _leave_out(self, chosen: Sequence[int], program: Program) -> bool:
        """Leave out choices whose rewrite was taken back; whether there were any."""
        stored = {
            name
            for node, target in program.state_nodes().items()
            if target.endswith("_codes")
            for name in program.sources(node)
        }
        bad = [u for u in self.units if u.options != [None] and stored.isdisjoint(u.names)]
        for unit in bad:
            unit.without(chosen[self.units.index(unit)])
        return bool(bad)

    @property
    def _floats(self) -> int:
        return tensor_bytes(self.trials.program.state.values())

    def _units(self) -> tuple[list[Unit], int]:
        """Weights in groups that share names, and bytes of all else."""
        widest = self.passes[-1]
        program = self.trials.program.copy()
        spelled, *_, last = widest.stages()
        apply_rules(program, spelled.rules())
        assert isinstance(last, QuantizeWeights)  # of `QuantizeMatmul.stages`
        found = last.targets(program)
        settings = [one.settings for one in self.passes]
        targets = []
        for rule, match in found:
            at = [s.at(program, match["weight"]) for s in settings]
            targets.append(Target(match, rule.matrices(match), at))
        losses = choices(
            program, targets, self.trials.samples, self.given.sensitivity, self.trials.progress
        )
        groups = _groups(program, [t.weight for t in targets])
        units = [
            self._unit(program, [targets[i] for i in group], [losses[i] for i in group])
            for group in groups
        ]
        held = {t.weight: program.state[program.target_of(t.weight) or ""] for t in targets}
        return units, tensor_bytes(program.state.values()) - tensor_bytes(held.values())

    def _unit(
        self, program: Program, targets: Sequence[Target], found: Sequence[Sequence[Choice]]
    ) -> Unit:
        weights = list(dict.fromkeys(t.weight for t in targets))
        known = {n for w in weights for n in program.sources(w)}
        names = tuple(n for w in weights for n in weight_names(program, w) if n in known)
        together = [Choice(*map(sum, zip(*each, strict=True))) for each in zip(*found, strict=True)]
        options = [self._fields(one, program, weights[0]) for one in self.passes]
        held = tensor_bytes(program.state[program.target_of(w) or ""] for w in weights)
        if not names:
            together, options = together[-1:], options[-1:]
        costs = [choice.bytes for choice in together]
        if self.given.latency is not None:
            count = len(together)
            costs = [
                sum(nanoseconds(t.products, t.settings[-count:][i]) for t in targets)
                for i in range(count)
            ]
        return Unit(names, options, together, costs, held)

    def _fields(self, one: QuantizeMatmul, program: Program, weight: fx.Node) -> Fields:
        """What a recipe says of a weight with the bits of ``one``."""
        pattern = next(iter(one.formats.matched(program, weight).values()), None)
        own = one.layers.get(pattern) if pattern is not None else None
        return {"bits": one.bits, **(own if isinstance(own, dict) else {})}


def _groups(program: Program, weights: Sequence[fx.Node]) -> list[list[int]]:
    """Positions of weights that are one, or share a name."""
    groups: list[tuple[set[str], list[int]]] = []
    for index, weight in enumerate(weights):
        names, members = {weight.name, *weight_names(program, weight)}, [index]
        apart = []
        for other in groups:
            if other[0].isdisjoint(names):
                apart.append(other)
            else:
                names |= other[0]
                members = [*other[1], *members]
        groups = [*apart, (names, members)]
    return [members for _, members in groups]
