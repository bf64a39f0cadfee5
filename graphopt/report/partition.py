"""Which part of a graph runs where, as data: regions of another runtime, and why the rest is not
in them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PartitionRegion:
    """A part of the graph that runs as one call of the other runtime.

    Attributes:
        nodes: names of its nodes, in program order.
        operators: of the graph, and how many of each.
        inputs, outputs: tensors that enter and leave, weights excepted.
        seconds, torch_seconds: of a call on the captured inputs, there and in torch; ``None`` where
            they were not timed.
        assigned: execution provider -> how many of its operators it runs; empty where the runtime
            does not tell.
        fusions: operators that were made of several, and how many.
        shared_bytes: of weights that it reads in torch's memory.
        own_bytes: of weights that exist once more for it: packed, or in another form.
        source: the user's line that its first node comes from.
        notes: which forms were compared.
    """

    name: str
    nodes: tuple[str, ...]
    operators: dict[str, int]
    inputs: int
    outputs: int
    seconds: float | None = None
    torch_seconds: float | None = None
    assigned: dict[str, int] = field(default_factory=dict)
    fusions: dict[str, int] = field(default_factory=dict)
    shared_bytes: int = 0
    own_bytes: int = 0
    source: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class TorchPart:
    """Nodes that run in torch for one reason; ``source`` is the user's line of the first."""

    reason: str
    nodes: tuple[str, ...]
    operators: dict[str, int]
    source: str | None = None


@dataclass(frozen=True)
class Partition:
    """What runs in ``runtime``, on which execution providers, and what in torch."""

    runtime: str
    providers: tuple[str, ...]
    regions: tuple[PartitionRegion, ...] = ()
    torch: tuple[TorchPart, ...] = ()
