"""What products are given on calibration inputs, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from graphopt.calibration import Statistics, Stream
from graphopt.errors import GraphoptError
from graphopt.passes.quantize.importance import Importance
from graphopt.program import Program
from graphopt.rewrite import arguments
from graphopt.source import source_line


class Observed:
    """Statistics of the inputs of products, taken when the samples have come as far.

    Attributes:
        stream: runs the samples, ``until`` nodes besides products; what it is told to replace is
            what later products see.
        importance: what rows count in the second moment, where they are not to count the same.
    """

    def __init__(
        self,
        program: Program,
        samples: Sequence[Sequence[Any]],
        products: Iterable[fx.Node],
        until: Iterable[fx.Node] = (),
        importance: str | None = None,
    ) -> None:
        self.name = program.name
        wanted = set(products)
        self.left = [n for n in program.graph.nodes if n in wanted]
        self.importance = Importance(program, samples, self.left, importance)
        self.ahead = self.importance.attentions
        self.stream = Stream(program, samples, [*self.left, *until, *self.ahead])
        self.statistics: dict[fx.Node, Statistics] = {}

    def next(self) -> fx.Node:
        """Go on to the next product in graph order, and look at its input.

        Raises:
            GraphoptError: it holds NaN or infinity, or the model fails on a sample.
        """
        product = self.left.pop(0)
        self._advance(product)
        given = given_to(product)
        if given not in self.statistics:
            self._look_ahead(product)
            counts = self.importance.of(product, self.stream.given(given))
            try:
                self.statistics[given] = Statistics.of(self.stream.given(given), counts)
            except ValueError as error:
                raise GraphoptError(
                    f"{self.name}: {error} at `{product.name}`",
                    where=source_line(product) or product.name,
                    fix="leave those inputs out, or correct their values",
                ) from error
        return product

    def _advance(self, product: fx.Node) -> None:
        """Up to a product; attentions on the way are seen as they pass."""
        place = self.stream.nodes.index
        for attention in [n for n in self.ahead if place(n) < place(product)]:
            self.ahead.remove(attention)
            if self.stream.position > place(attention):
                self.importance.miss(attention)
                continue
            self.stream.advance(attention)
            self.importance.watch(attention, self.stream)
        self.stream.advance(product)

    def _look_ahead(self, product: fx.Node) -> None:
        """See the attention that a product leads to, as the weights are, and come back."""
        link = self.importance.links.get(product)
        if link is None or link.source not in self.ahead:
            return
        mark = self.stream.mark()
        self.ahead.remove(link.source)
        self.stream.advance(link.source)
        self.importance.watch(link.source, self.stream)
        self.stream.rewind(mark)

    def of(self, products: Iterable[fx.Node]) -> list[Statistics]:
        return [self.statistics[given_to(n)] for n in products]

    def left_of(self, products: Iterable[fx.Node]) -> int:
        """How many of these products are still to come."""
        return len({*products} & {*self.left})

    def keep(self, products: Iterable[fx.Node]) -> None:
        """Drop statistics that neither these products nor those to come need."""
        wanted = {given_to(n) for n in (*products, *self.left)}
        self.statistics = {n: s for n, s in self.statistics.items() if n in wanted}
        self.importance.keep(self.left)


def given_to(product: fx.Node) -> fx.Node:
    """The input of a product."""
    node: fx.Node = arguments(product)["input"]
    return node


def require_samples(samples: Sequence[Any], asked: str, where: str, instead: str) -> None:
    """What calibrates needs something to calibrate on; ``instead`` needs nothing.

    Raises:
        GraphoptError: there is nothing.
    """
    if not samples:
        raise GraphoptError(
            f"{asked} learns from calibration inputs; there are none",
            where=where,
            fix="calibration=[inputs, ...] with example_inputs, on the command line "
            f"--calibration FILE; or {instead}, which needs none",
        )
