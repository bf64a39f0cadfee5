"""Optimize every model of the zoo as a user would, and write what happened as a page.

    PYTHONPATH=tests python -m models.sweep [--page docs/architectures.md] [NAME_OR_FAMILY ...]
    PYTHONPATH=tests python -m models.sweep --onnx [--page docs/onnx_architectures.md] [...]

Without names the whole zoo runs, for an hour or so, and the page is written. With ``--onnx`` models
in eval mode become ONNX files, and what ONNX Runtime makes of those is compared. ``--rows FILE``
keeps each row as it is made, and takes those that are there: a sweep that was stopped goes on. It
exits with 1 where an optimized model differs from its original.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import multiprocessing
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from models import cnn, huggingface, sweep_page
from models.entry import Axes, Entry
from models.inventory import samples
from models.sweep_check import Row, Trial, run
from models.sweep_onnx import OnnxModule

Job = tuple[str, str, bool, bool]
"""Family, name, whether it trains, and whether it becomes an ONNX file."""
ZOO = {"cnn": cnn.ENTRIES, **{e.family: huggingface.ENTRIES for e in huggingface.ENTRIES.values()}}


def check(
    entry: Entry, training: bool, lower: Callable[[torch.nn.Module], torch.nn.Module] | None = None
) -> Row:
    """The row of one model: with all its axes dynamic, or with as many as graphopt accepts."""
    row = Row(entry.name, entry.family, "train" if training else "eval")
    axes = {**entry.dynamic_axes, **(entry.label_axes if training else {})}
    for kept in _fewer(sorted(_names(axes))):
        tried = run(replace(_trial(entry, training, axes, set(kept)), lower=lower))
        if not row.cause:
            row.cause = tried.cause
        if tried.captured:
            return tried.named(row, kept)
    return row


def _trial(entry: Entry, training: bool, axes: Axes, kept: set[str]) -> Trial:
    def inputs(example: dict[str, object]) -> dict[str, object]:
        label = entry.label if training else None
        return example | label(example) if label else example

    given = inputs(entry.inputs())
    shapes = {key: _only(axes[key], kept) for key in given if key in axes}
    sizes = []
    if kept == _names(axes):
        sizes.append(("another size", lambda: inputs(entry.unseen())))
    if "batch" in kept:
        sizes.append(("batch 1", lambda: inputs(entry.inputs(batch=1))))

    def model() -> torch.nn.Module:
        return entry.build().train(training)

    return Trial(model, (), given, shapes or None, sizes, training)


def _names(spec: object) -> set[str]:
    if isinstance(spec, str):
        return {spec}
    parts = spec.values() if isinstance(spec, dict) else spec if isinstance(spec, list) else ()
    return set().union(*map(_names, parts))


def _only(spec: object, kept: set[str]) -> object:
    """The same axes, less those that are not ``kept``."""
    if isinstance(spec, list):
        return [_only(part, kept) for part in spec]
    if isinstance(spec, dict):
        return {k: _only(v, kept) for k, v in spec.items() if not isinstance(v, str) or v in kept}
    return spec


def _fewer(names: list[str]) -> Iterator[tuple[str, ...]]:
    """All names, then one less, and so on to none."""
    for size in range(len(names), -1, -1):
        yield from combinations(names, size)


def check_module(name: str, training: bool) -> list[Row]:
    """Rows of torch's own samples of one module."""
    mode = "train" if training else "eval"
    rows = []
    for sample in samples(2):
        if sample.name.startswith(f"{name}[{mode},"):
            build = functools.partial(copy.deepcopy, sample.module)
            tried = run(Trial(build, sample.args, sample.kwargs, None, [], training))
            row = Row(sample.name, "module", mode)
            rows.append(tried.named(row, ()) if tried.captured else row.because(tried.cause))
    return rows


def _job(job: Job) -> list[Row]:
    family, name, training, onnx = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if family == "module":
        return check_module(name, training)
    return [check(ZOO[family][name], training, OnnxModule if onnx else None)]


def jobs(wanted: list[str], onnx: bool = False) -> Iterator[Job]:
    """Names with their modes; with names or families given, only those."""
    entries = [*huggingface.ENTRIES.values(), *cnn.ENTRIES.values()]
    modules = dict.fromkeys(sample.name.partition("[")[0] for sample in samples(1))
    every = [(e.family, e.name) for e in entries] + [("module", name) for name in modules]
    for family, name in every:
        if wanted and not {name, family} & set(wanted):
            continue
        if not onnx:
            yield from ((family, name, training, False) for training in (False, True))
        elif family != "module":
            yield family, name, False, True


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="models, families, or modules such as nn.Linear")
    parser.add_argument("--page", type=Path, help="the Markdown page to write")
    parser.add_argument("--onnx", action="store_true", help="compare ONNX files in ONNX Runtime")
    parser.add_argument("--rows", type=Path, help="a file of rows that goes on where it ends")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args(arguments)
    todo = list(jobs(given.names, given.onnx))
    with _Kept(given.rows) as kept:
        rows = list(_rows(todo, given.workers, kept))
    if given.page is not None:
        given.page.write_text((sweep_page.onnx_page if given.onnx else sweep_page.page)(rows))
    wrong = [f"{row.name} ({row.mode})" for row in rows if row.wrong]
    print(f"{len(wrong)} of {len(rows)} differ: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


class _Kept:
    """Rows by their job in a file of JSON lines; in none where the path is None. Rows that other
    versions made are taken too."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, dict[Job, list[Row]]()
        written = path.read_text().splitlines() if path is not None and path.exists() else []
        for line in written:
            job, rows = json.loads(line)
            self.known[tuple(job)] = [_row(**row) for row in rows]

    def __enter__(self) -> _Kept:
        self.file = Path(self.path or os.devnull).open("a")
        return self

    def __exit__(self, *_error: object) -> None:
        self.file.close()

    def add(self, job: Job, rows: list[Row]) -> None:
        self.known[job] = rows
        print(json.dumps([job, [asdict(row) for row in rows]]), file=self.file, flush=True)
        for row in rows:
            print(row.line(), flush=True)


def _row(axes: list[str], sizes: list[str], **others: Any) -> Row:
    return Row(axes=tuple(axes), sizes=tuple(sizes), **others)


def _rows(todo: list[Job], workers: int, kept: _Kept) -> Iterator[Row]:
    """Rows in the order of ``todo``; processes are renewed, so that none grows for long."""
    context = multiprocessing.get_context("spawn")
    left = [job for job in todo if job not in kept.known]
    with context.Pool(workers, maxtasksperchild=24) as pool:
        for job, rows in zip(left, pool.imap(_job, left), strict=True):
            kept.add(job, rows)
    for job in todo:
        yield from kept.known[job]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
