"""What runs where, for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from operator import getitem

from torch import fx

from graphopt.emit.ort.regions import Piece, Placement
from graphopt.program import compute_nodes, operator_name
from graphopt.report.partition import Partition, PartitionRegion, TorchPart
from graphopt.source import source_line

RUNTIME = "ONNX Runtime"


def partition_of(placement: Placement) -> Partition:
    """The partition as data; call it before the regions become calls."""
    regions = (_region(i, piece) for i, piece in enumerate(placement.pieces))
    return Partition(RUNTIME, placement.settings.providers, tuple(regions), tuple(_rest(placement)))


def region_name(index: int) -> str:
    """What the call of a region is named in the emitted graph."""
    return f"onnxruntime_{index}"


def _region(index: int, piece: Piece) -> PartitionRegion:
    nodes, model, module = piece.region.order, piece.model, piece.module
    own = model.own_bytes(module.weights.values(), packed=module.settings.packed)
    return PartitionRegion(
        region_name(index),
        tuple(n.name for n in nodes),
        operators(nodes),
        len(module.layout.inputs),
        len(module.layout.results),
        piece.seconds,
        piece.torch_seconds,
        module.session.assigned,
        dict(model.fusions),
        shared_bytes=sum(t.nbytes for t in model.weights.values()) - own,
        own_bytes=own,
        source=_first_line(nodes),
        notes=model.notes,
    )


def _rest(placement: Placement) -> Iterable[TorchPart]:
    """Nodes outside of all regions by their reason, in program order."""
    inside = {node for piece in placement.pieces for node in piece.region.nodes}
    groups: dict[str, list[fx.Node]] = {}
    for node in compute_nodes(placement.program.graph):
        if node not in inside and node.target is not getitem:
            groups.setdefault(placement.reasons[node], []).append(node)
    for reason, nodes in groups.items():
        yield TorchPart(reason, tuple(n.name for n in nodes), operators(nodes), _first_line(nodes))


def operators(nodes: Iterable[fx.Node]) -> dict[str, int]:
    """How many of each operator; items of tuples are not counted."""
    named = (operator_name(n.target) for n in nodes if n.target is not getitem)
    return dict(Counter(named).most_common())


def _first_line(nodes: Iterable[fx.Node]) -> str | None:
    return next(filter(None, map(source_line, nodes)), None)
