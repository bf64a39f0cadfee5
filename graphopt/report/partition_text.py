"""A partition in words, the same in every view of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from graphopt.report.partition import Partition, PartitionRegion, TorchPart
from graphopt.report.text import bytes_text, counted, seconds_text, short_source, speedup_text

SHOWN = 4
"""Operators that are named one by one."""

COLUMNS = ("region", "nodes", "tensors", "time", "in torch", "speedup", "weights", "runs on")


def title_text(found: Partition) -> str:
    return f"{found.runtime}: {', '.join(found.providers)}"


def partition_lines(found: Partition | None) -> Iterator[str]:
    """How the graph was cut, and why nodes stayed in torch, one line for each reason."""
    if found is None:
        return
    inside = sum(len(r.nodes) for r in found.regions)
    outside = sum(len(p.nodes) for p in found.torch)
    regions = counted(len(found.regions), "region")
    yield f"{regions} with {counted(inside, 'node')}; {counted(outside, 'node')} in torch"
    for part in found.torch:
        yield f"{counted(len(part.nodes), 'node')} in torch: {part.reason}"
        yield f"  {operators_text(part.operators)}{_at(part)}"


def _at(part: TorchPart) -> str:
    return f", source line: {short_source(part.source)}" if part.source else ""


def partition_rows(found: Partition | None) -> tuple[tuple[str, ...], ...]:
    """A row of `COLUMNS` for each region."""
    return tuple(map(_row, found.regions)) if found is not None else ()


def _row(region: PartitionRegion) -> tuple[str, ...]:
    return (
        region.name,
        f"{len(region.nodes)}: {operators_text(region.operators)}",
        tensors_text(region),
        time_text(region.seconds),
        time_text(region.torch_seconds),
        speedup_text(speedup(region)),
        weights_text(region),
        assigned_text(region),
    )


def speedup(region: PartitionRegion) -> float | None:
    """Of the region over torch; ``None`` where it was not timed."""
    if not region.seconds or region.torch_seconds is None:
        return None
    return region.torch_seconds / region.seconds


def operators_text(operators: Mapping[str, int]) -> str:
    """``2 aten.linear, 1 aten.gelu and 3 others``: the most frequent first."""
    ordered = sorted(operators.items(), key=lambda item: (-item[1], item[0]))
    named = [f"{count} {name}" for name, count in ordered[:SHOWN]]
    rest = sum(count for _, count in ordered[SHOWN:])
    return ", ".join(named) + (f" and {counted(rest, 'other')}" if rest else "")


def tensors_text(region: PartitionRegion) -> str:
    return f"{region.inputs} in, {region.outputs} out"


def time_text(seconds: float | None) -> str:
    return "not timed" if seconds is None else seconds_text(seconds)


def weights_text(region: PartitionRegion) -> str:
    """Where its weights are: in torch's memory, or there once more."""
    shared = f"{bytes_text(region.shared_bytes)} of torch's" if region.shared_bytes else ""
    own = f"{bytes_text(region.own_bytes)} of its own" if region.own_bytes else ""
    return ", ".join(filter(None, (shared, own))) or "none"


def assigned_text(region: PartitionRegion) -> str:
    return ", ".join(f"{n} {provider}" for provider, n in sorted(region.assigned.items()))
