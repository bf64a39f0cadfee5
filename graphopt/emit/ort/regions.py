"""What goes to ONNX Runtime: as few regions as there can be, each translated and tried.

Where a region is refused, each kind of operator in it is tried by itself. Those that are refused
stay in torch, and the rest is put into regions again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import getitem

import torch
from torch import fx

from graphopt.analysis.flow import flow
from graphopt.analysis.regions import Region, partition
from graphopt.analysis.splice import extract
from graphopt.emit.ort.call import OrtRegion, layout_of
from graphopt.emit.ort.models import RegionModel, translate_region
from graphopt.emit.ort.nodes import VIEWS, refusals, shares_memory
from graphopt.emit.ort.programs import (
    boundary_values,
    inputs_for_sizes,
    region_program,
    stand_in,
)
from graphopt.emit.ort.sessions import Session, Settings
from graphopt.errors import ExportError
from graphopt.program import Program, val
from graphopt.rewrite.subgraph import extract as cut


@dataclass(eq=False)
class Piece:
    """A region that ONNX Runtime takes.

    Attributes:
        extra: inputs of the program that it reads for their sizes alone.
        values: what a call of it was given on the captured inputs.
        module: it in ONNX Runtime.
        seconds, torch_seconds: of a call, where that was timed.
    """

    region: Region
    extra: tuple[fx.Node, ...]
    model: RegionModel
    values: tuple[object, ...]
    module: OrtRegion
    seconds: float | None = None
    torch_seconds: float | None = None


@dataclass
class Placement:
    """Which nodes run where.

    Attributes:
        program: the one whose nodes these are.
        pieces: in program order.
        reasons: why each other node is in torch.
    """

    program: Program
    settings: Settings
    pieces: list[Piece] = field(default_factory=list)
    reasons: dict[fx.Node, str] = field(default_factory=dict)

    def leave(self, piece: Piece, reason: str) -> None:
        """Take a region back to torch."""
        self.pieces.remove(piece)
        self.reasons |= dict.fromkeys(piece.region.order, reason)


class Placer:
    """Finds the regions of a program (its sizes rooted, its views apart) for some providers."""

    def __init__(
        self, program: Program, settings: Settings, *, verify: bool = True, measure: bool = True
    ) -> None:
        self.program, self.settings = program, settings
        self.translate = partial(
            translate_region, providers=settings.providers, verify=verify, measure=measure
        )
        self.reasons = refusals(program, settings.device)
        self.kinds: dict[str, str | None] = {}
        self.known: dict[frozenset[fx.Node], Piece] = {}

    def place(self) -> Placement:
        """Regions until ONNX Runtime takes all of them."""
        while True:
            regions = self._regions()
            pieces = self._pieces(regions)
            if len(pieces) == len(regions):
                return Placement(self.program, self.settings, pieces, self.reasons)

    def _regions(self) -> list[Region]:
        view = flow(self.program.graph, effects=True)
        found = []
        for region in partition(view, lambda node: node not in self.reasons):
            kept = without_last_views(region)
            views = dict.fromkeys(region.nodes - kept, VIEWS)
            if all(map(shares_memory, kept)):
                views |= dict.fromkeys(kept, VIEWS)
            else:
                found.append(Region(frozenset(kept)))
            self.reasons |= views
        return found

    def _pieces(self, regions: Sequence[Region]) -> list[Piece]:
        """Those regions that are taken; what is to blame for others is noted."""
        fresh = [r for r in regions if r.nodes not in self.known]
        extra = {r: tuple(inputs_for_sizes(self.program, r)) for r in fresh}
        wanted = {n for r in fresh for n in (*r.inputs, *extra[r])}
        values = boundary_values(self.program, wanted, self.program.example_inputs)
        for region in fresh:
            try:
                self.known[region.nodes] = self._piece(region, extra[region], values)
            except ExportError as error:
                self.reasons |= self._blamed(region, error)
        return [self.known[r.nodes] for r in regions if r.nodes in self.known]

    def _piece(
        self, region: Region, extra: tuple[fx.Node, ...], values: Mapping[fx.Node, object]
    ) -> Piece:
        program = region_program(self.program, region, values, extra)
        model = self.translate(program)
        weights = {name: self.program.state[name] for name in program.state}
        layout = layout_of(self.program, region, extra, model)
        module = OrtRegion(extract(region), model, self.settings, layout, weights)
        given = tuple(values[n] for n in (*region.inputs, *extra))
        _try_once(module, given)
        return Piece(region, extra, model, given, module)

    def _blamed(self, region: Region, error: ExportError) -> dict[fx.Node, str]:
        """The nodes of a refused region that must leave it, and why.

        Those like the one that the error names, where they are refused by themselves too; else all
        that are; else those like the one that it names, which must be to blame where they stand;
        else the whole region.
        """
        named = _named(region, error)
        found = self._refused(region, [n for n in region.order if self._alike(n, named)])
        found = found or self._refused(region, region.order)
        if found:
            return found
        alike = [i for n in region.order if self._alike(n, named) for i in _with_items(n)]
        return dict.fromkeys(region.nodes.intersection(alike) or region.nodes, error.what)

    def _refused(self, region: Region, nodes: Sequence[fx.Node]) -> dict[fx.Node, str]:
        """Those of the nodes that ONNX Runtime refuses by themselves, and why."""
        found: dict[fx.Node, str] = {}
        for node in nodes:
            if node.target is not getitem and (why := self._tried(node)) is not None:
                found |= dict.fromkeys(region.nodes.intersection(_with_items(node)), why)
        return found

    def _alike(self, node: fx.Node, named: fx.Node | None) -> bool:
        """Whether a node is the named one, or one of its kind."""
        if named is None or node.target is not named.target:
            return False
        return self._kind(node) == self._kind(named)

    def _kind(self, node: fx.Node) -> str:
        """Operator, literals, shapes and dtypes: what a trial of it depends on."""
        items = _with_items(node)
        return cut(self.program, list(items[-1:]), set(items)).structure

    def _tried(self, node: fx.Node) -> str | None:
        """Why ONNX Runtime does not take an operator on such values; None where it does."""
        kind = self._kind(node)
        if kind not in self.kinds:
            self.kinds[kind] = self._try(Region(frozenset(_with_items(node))))
        return self.kinds[kind]

    def _try(self, region: Region) -> str | None:
        extra = inputs_for_sizes(self.program, region)
        values = {n: stand_in(n) for n in (*region.inputs, *extra)}
        program = region_program(self.program, region, values, extra)
        try:
            model = translate_region(program, self.settings.providers, verify=False, measure=False)
            Session(model, self.settings)
        except ExportError as error:
            return error.what
        return None


def _try_once(module: OrtRegion, values: tuple[object, ...]) -> None:
    """Run a region on the captured inputs.

    Raises:
        ExportError: that fails.
    """
    try:
        with torch.no_grad():
            module(*values)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ExportError(f"ONNX Runtime fails on the example inputs: {first:.200}") from error


_NAME = re.compile(r"(?:%|\bnode_|\bOutput )([A-Za-z]\w*)")
"""How nodes are named in messages: of fx, of ONNX Runtime, and of torch's exporter."""


def _named(region: Region, error: BaseException) -> fx.Node | None:
    """The first node of a region that an error, or what caused it, names; of an item its source."""
    nodes = {n.name: n.args[0] if n.target is getitem else n for n in region.order}
    cause = error.__cause__
    texts = [str(error)]
    while cause is not None:
        texts, cause = [*texts, str(cause)], cause.__cause__
    names = (name for text in reversed(texts) for name in _NAME.findall(text))
    return next((nodes[name] for name in names if name in nodes), None)


def _with_items(node: fx.Node) -> list[fx.Node]:
    """A node, and the items of it where it gives several values."""
    return [node, *node.users] if isinstance(val(node), list | tuple) else [node]


def without_last_views(region: Region) -> set[fx.Node]:
    """The region but for views at its end, which torch makes of its results in no time."""
    kept = set(region.nodes)
    for node in reversed(region.order):
        if shares_memory(node) and kept.isdisjoint(node.users):
            kept.discard(node)
    return kept
