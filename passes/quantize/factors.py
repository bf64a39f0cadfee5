"""Factors per channel that make quantized products nearer: AWQ and SmoothQuant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.channels import NONE, Channels
from graphopt.calibration import Statistics
from graphopt.kernels.quantized.rounding import quantize
from graphopt.passes.quantize.observed import Observed, require_samples
from graphopt.passes.quantize.plan import Settings, products_of
from graphopt.passes.quantize.scaling import ScaleChannels, key_of, match_of, refusal
from graphopt.passes.quantize.stage import Stage
from graphopt.program import Program
from graphopt.rewrite import Match, Pass, Rule, arguments

POWERS = tuple(step / 20 for step in range(20))
"""Exponents that AWQ tries (Lin et al. 2024, section 3.2)."""
MIGRATION = 0.5
"""SmoothQuant's alpha (Xiao et al. 2023, section 4)."""
LARGEST = 1e4


@dataclass(frozen=True)
class ScaleBeforeQuantizing(Stage):
    """Moves factors between layers before their weights are quantized; exact but for rounding.

    Attributes:
        method: ``"awq"``: factors are a power of the mean magnitude of a channel, the one under
            which rounded weights give the smallest error of products on calibration inputs.
            ``"smoothquant"``: the largest magnitudes of activations and weights meet half way.
        quantized: finds the products that will be quantized.
        factors: by the names of what they divide; stopped: products that no factors reach.
    """

    settings: Settings
    method: str
    quantized: Callable[[Program], Sequence[Match]]
    factors: Mapping[str, Tensor | None] = field(default_factory=dict)
    stopped: frozenset[str] = frozenset()

    def options(self) -> dict[str, Any]:
        return {**super().options(), "method": self.method}

    def rules(self) -> Sequence[Rule]:
        return (ScaleChannels(self.factors, self.stopped),)

    def calibrated(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        progress: Callable[[str], None],
    ) -> Pass:
        quantized = {n for m in self.quantized(program) for n in products_of(m)}
        matches, refused = _matches(program, quantized)
        if matches:
            require_samples(samples, f"method {self.method}", self.name, "method='rtn'")
        reached = {n for match in matches for n in match.roots}
        stopped = frozenset(map(key_of, quantized - reached.union(*refused.values())))
        observed = Observed(program, samples, reached, importance=self.settings.importance)
        found: dict[str, Tensor | None] = dict.fromkeys(map(key_of, refused))
        while observed.left:
            observed.next()
            for match in [m for m in matches if observed.left_of(m.roots) == 0]:
                matches.remove(match)
                found[key_of(match["channels"].producer)] = self._factors(match, observed)
            observed.keep(n for match in matches for n in match.roots)
            progress(f"{self.method}: {len(found)} groups of channels, {len(matches)} to come")
        return replace(self, factors=found, stopped=stopped)

    def _factors(self, match: Match, observed: Observed) -> Tensor | None:
        """Factors ``(C,)``, float32; ``None`` where they would not help."""
        channels: Channels = match["channels"]
        pairs = zip(match.roots, observed.of(match.roots), strict=True)
        products = [
            _Product(match.program, node, channels, seen, self.settings) for node, seen in pairs
        ]
        products = [p for p in products if p.statistics.rows]
        if not products:
            return None
        make = _smooth if self.method == "smoothquant" else _aware
        factors = make(products, channels.free)
        low = any(p.weight.dtype != torch.float32 for p in products)
        return torch.exp2(factors.log2().round()) if low else factors


class _Product:
    """A product that reads channels: its weight, the channel of each input, what inputs are."""

    def __init__(
        self,
        program: Program,
        node: fx.Node,
        channels: Channels,
        statistics: Statistics,
        settings: Settings,
    ) -> None:
        self.scheme = settings.at(program, arguments(node)["weight"]).scheme
        self.weight = program.state[program.target_of(arguments(node)["weight"]) or ""].detach()
        self.labels, self.statistics = channels.readers[node], statistics
        self.count = len(channels.free)

    def of_inputs(self, factors: Tensor) -> Tensor:
        """Factors of channels as those of inputs, ``(K,)``."""
        return torch.where(self.labels == NONE, 1.0, factors[self.labels.clamp(min=0)])

    def by_channel(self, values: Tensor, how: str) -> Tensor:
        """Values of inputs ``(K,)`` as the mean or the largest of each channel; 0 where none."""
        mine = self.labels != NONE
        made = values.new_zeros(self.count)
        return made.scatter_reduce(0, self.labels[mine], values[mine], how, include_self=False)


def _aware(products: Sequence[_Product], free: Tensor) -> Tensor:
    size = torch.stack(
        [p.by_channel(p.statistics.magnitude / p.statistics.rows, "mean") for p in products]
    ).amax(0)
    best, least = torch.ones_like(size), torch.inf
    for power in POWERS:
        factors = _even(size.clamp(min=1e-4 * float(size.mean()) + 1e-12).pow(power), free)
        lost = sum(_lost(p, p.of_inputs(factors)) for p in products)
        if lost < least:
            best, least = factors, lost
    return best


def _lost(product: _Product, factors: Tensor) -> float:
    """The squared error of the products when the scaled weight is rounded."""
    scaled = product.weight.to(torch.float32) * factors
    off = (quantize(scaled, product.scheme).dequantize() - scaled) / factors
    return float((off @ product.statistics.moment).mul_(off).sum())


def _smooth(products: Sequence[_Product], free: Tensor) -> Tensor:
    inputs = torch.stack([p.by_channel(p.statistics.largest, "amax") for p in products]).amax(0)
    weights = torch.stack(
        [p.by_channel(p.weight.to(torch.float32).abs().amax(0), "amax") for p in products]
    ).amax(0)
    known = (inputs > 0) & (weights > 0)
    found = inputs.pow(MIGRATION) / weights.clamp(min=1e-12).pow(1 - MIGRATION)
    return torch.where(known & free, found.clamp(1 / LARGEST, LARGEST), 1.0)


def _even(factors: Tensor, free: Tensor) -> Tensor:
    """Factors around 1, and 1 where they are pinned."""
    middle = (factors[free].amax() * factors[free].amin()).sqrt()
    return torch.where(free, (factors / middle).clamp(1 / LARGEST, LARGEST), 1.0)


Refused = dict[fx.Node, tuple[fx.Node, ...]]
"""Producers whose factors cannot be moved, and the products that they would reach."""


def _matches(program: Program, quantized: set[fx.Node]) -> tuple[list[Match], Refused]:
    """Producers with products to be quantized, the nearest where several reach the same ones; and
    those that are refused, with their products, where no other reaches them."""
    found: list[Match] = []
    refused: Refused = {}
    covered: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        match = match_of(program, node)
        if match is None or quantized.isdisjoint(match.roots):
            continue
        if refusal(match) is not None:
            refused[node] = match.roots
        elif covered.isdisjoint(match.roots):
            covered.update(match.roots)
            found.append(match)
    alone = {n: roots for n, roots in refused.items() if covered.isdisjoint(roots)}
    return found[::-1], alone
