"""Where ONNX Runtime spends its time on a file, by its own profiler."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.emit.onnx_runtime import open_session
from graphopt.onnx_files.document import Document, serialized, write_model
from graphopt.onnx_files.values import Feed, run

SLOWEST = 15
"""Nodes that are told one by one."""
_KERNEL = "_kernel_time"


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator: ``seconds`` of a run, ``share`` of the time in kernels."""

    operator: str
    count: int
    seconds: float
    share: float


@dataclass(frozen=True)
class NodeTime:
    """One node as ONNX Runtime runs it; names are those that its own fusions give."""

    name: str
    operator: str
    seconds: float
    share: float
    shapes: str


@dataclass(frozen=True)
class Profile:
    """A run of a file, by operator and by node, the slowest first.

    Attributes:
        seconds: in kernels, of one run, the mean of ``runs``.
    """

    seconds: float
    runs: int
    operators: tuple[OperatorTime, ...]
    slowest: tuple[NodeTime, ...]


def profile(model: Any, document: Document, feed: Feed, runs: int) -> Profile:
    """Run an ``onnx_ir`` model under ONNX Runtime's profiler, after one run that does not count."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        given: Path | bytes = path
        if document.external:
            write_model(model, path, external=True)
        else:
            given = serialized(model)
        session = open_session(given, profile=Path(folder) / "profile")
        for _ in range(runs + 1):
            run(session, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return _profile(events, runs)


def _profile(events: list[dict[str, Any]], runs: int) -> Profile:
    """Of a trace: events of category ``Node`` that end in ``_kernel_time``, in microseconds."""
    kernels = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_KERNEL)]
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    shapes: dict[tuple[str, str], str] = {}
    for event in kernels:
        name = event["name"].removesuffix(_KERNEL)
        key = (name, str(event["args"].get("op_name", "")))
        times[key].append(event["dur"] * 1e-6)
        shapes[key] = _shapes(event["args"].get("output_type_shape", []))
    means = {key: _mean(rows, runs) for key, rows in times.items()}
    whole = sum(means.values()) or 1.0
    nodes = [NodeTime(*key, s, s / whole, shapes[key]) for key, s in means.items()]
    nodes.sort(key=lambda node: -node.seconds)
    grouped: dict[str, list[float]] = defaultdict(list)
    for node in nodes:
        grouped[node.operator].append(node.seconds)
    operators = [OperatorTime(k, len(v), sum(v), sum(v) / whole) for k, v in grouped.items()]
    operators.sort(key=lambda operator: -operator.seconds)
    return Profile(sum(means.values()), runs, tuple(operators), tuple(nodes[:SLOWEST]))


def _mean(rows: list[float], runs: int) -> float:
    """Of a run; the first is left out, and nodes in loops run several times in each."""
    each = len(rows) // (runs + 1)
    return sum(rows[each:]) / runs


def _shapes(found: list[dict[str, list[Any]]]) -> str:
    return "; ".join(f"{kind}{sizes}" for item in found for kind, sizes in item.items())
