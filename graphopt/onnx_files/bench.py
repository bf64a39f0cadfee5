"""``graphopt bench MODEL.onnx``: the file and what graphopt makes of it, in turn, and profiled."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from graphopt.onnx_files.document import Document, read_document, session_of
from graphopt.onnx_files.feeds import feeds_for
from graphopt.onnx_files.optimize import environment_of_onnx, optimize_onnx, tensors
from graphopt.onnx_files.profile import Profile, profile
from graphopt.onnx_files.recipe import Recipe
from graphopt.onnx_files.values import Feed, flat, run
from graphopt.report.text import seconds_text

RUNS = 20
"""Profiled runs, at most: the profiler keeps an event for each node of each."""


@dataclass(frozen=True)
class FileTiming:
    """One file: median, fastest and slowest seconds of a run, and the speed beside the original."""

    name: str
    median: float
    fastest: float
    slowest: float
    speedup: float
    bytes: int


@dataclass(frozen=True)
class FileBench:
    """An ONNX file in ONNX Runtime, as it is and optimized."""

    model: str
    rows: tuple[FileTiming, ...]
    profiles: Mapping[str, Profile]
    shapes: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """Plain tables."""
        inputs = ", ".join(f"{k} {v}" for k, v in self.shapes.items())
        machine = ", ".join(f"{k} {v}" for k, v in self.environment.items())
        lines = [f"{self.model}: {inputs}", *self._timings()]
        for name, found in self.profiles.items():
            lines += ["", *_profile_lines(name, found)]
        return [*lines, "", *self.notes, machine]

    def _timings(self) -> Iterator[str]:
        yield f"{'':10}  median ms  min ms  max ms  vs original  file MB"
        for row in self.rows:
            yield (
                f"{row.name:10}  {row.median * 1e3:9.3f}  {row.fastest * 1e3:6.3f}  "
                f"{row.slowest * 1e3:6.3f}  {row.speedup:10.2f}x  {row.bytes / 1e6:7.2f}"
            )


def _profile_lines(name: str, found: Profile) -> Iterator[str]:
    width = max([len(o.operator) for o in found.operators] + [8])
    yield f"{name}: {seconds_text(found.seconds)} in kernels, mean of {found.runs} runs"
    yield f"  {'operator':{width}}  count  total ms  share"
    for row in found.operators:
        times = f"{row.seconds * 1e3:8.3f}  {row.share:5.1%}"
        yield f"  {row.operator:{width}}  {row.count:5}  {times}"
    yield "  slowest nodes"
    for node in found.slowest:
        yield f"  {node.seconds * 1e3:8.3f} ms  {node.share:5.1%}  {node.operator}  {node.name}"


def bench_onnx(
    path: str | Path,
    *,
    passes: Recipe = "exact",
    inputs: Mapping[str, Any] | None = None,
    calibration: Sequence[Mapping[str, Any]] = (),
    strict: bool = False,
    measure: bool = True,
    rounds: int = 11,
    step: Callable[[str], None] = lambda _text: None,
) -> FileBench:
    """Time an ONNX file and its optimized form in turn, and profile both.

    Raises:
        GraphoptError: as `optimize_onnx` does; and where a file cannot be rewritten at all.
    """
    source = Path(path)
    document = read_document(source)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        made = optimize_onnx(
            source,
            Path(folder) / "optimized.onnx",
            passes=passes,
            inputs=inputs,
            calibration=calibration,
            strict=strict,
            measure=measure,
            progress=step,
        )
        files = {"original": document, "optimized": read_document(made.path)}
        sessions = {name: _session(file) for name, file in files.items()}
        feed = feeds_for(sessions["original"], source, tensors(inputs)).first
        step("time both in turn")
        times = _times({n: partial(run, s, feed) for n, s in sessions.items()}, rounds)
        step("profile")
        runs = min(rounds, RUNS)
        profiles = {name: profile(f.model, f, feed, runs) for name, f in files.items() if f.model}
    rows = tuple(_rows(times, made.bytes))
    notes = (f"{len(made.report.applied)} rewrites; `graphopt optimize {source.name}` tells which",)
    return FileBench(source.name, rows, profiles, _shapes(feed), environment_of_onnx(), notes)


def _rows(times: Mapping[str, list[float]], sizes: Sequence[int]) -> Iterator[FileTiming]:
    first = statistics.median(times["original"])
    for (name, taken), size in zip(times.items(), sizes, strict=True):
        middle = statistics.median(taken)
        yield FileTiming(name, middle, min(taken), max(taken), first / middle, size)


def _session(document: Document) -> Any:
    from graphopt.emit.onnx_runtime import open_session

    if document.model is None:
        return open_session(document.path)
    return session_of(document.model, external=document.external)


def _times(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Each round runs every file once, so that drift of the machine falls on all alike."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def _shapes(feed: Feed) -> dict[str, str]:
    leaves = (row for name, value in feed.items() for row in flat(value, name))
    return {name: str(list(leaf.shape)) for name, leaf in leaves if hasattr(leaf, "shape")}
