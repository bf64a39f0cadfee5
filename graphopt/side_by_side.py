"""Running two files on the same inputs: modules, ``.pt2`` programs and ONNX models alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError
from graphopt.inputs import Inputs, given_inputs
from graphopt.loading import Limits, LoadedModel, load_model
from graphopt.loading.findings import printable
from graphopt.loading.sniff import sniff

STATE_DICTS = ("checkpoint", "legacy", "safetensors")
"""Kinds of file that ``arch`` is for."""


@dataclass(frozen=True)
class OutputRow:
    """One output of both models; errors relative to the RMS of A's values."""

    index: int
    shape: tuple[int, ...]
    rms: float
    max: float
    equal: bool
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two models side by side."""

    a: str
    b: str
    tolerance: float
    rows: tuple[OutputRow, ...]

    @property
    def equal(self) -> bool:
        return bool(self.rows) and all(r.equal for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "equal": self.equal}

    def lines(self) -> list[str]:
        """The comparison in plain text."""
        shown = [
            f"output {r.index} {list(r.shape)}: rms {r.rms:.2e}, max {r.max:.2e}, "
            + ("agrees" if r.equal else f"DIFFERS{f' ({r.note})' if r.note else ''}")
            for r in self.rows
        ]
        verdict = "agree" if self.equal else "differ"
        return [*shown, f"{self.a} and {self.b} {verdict} (tolerance {self.tolerance:g})"]


Runner = Callable[[Mapping[str, Any]], list[Any]]


@dataclass(frozen=True)
class Runnable:
    """A loaded file with a way to run it by name.

    ``inputs`` are the example inputs that it carries, if any; ``drawn`` gives random ones that fit
    its signature, where it has one.
    """

    name: str
    run: Runner
    inputs: Inputs | None
    drawn: Callable[[], Inputs] | None = None


def compare_files(
    a: str,
    b: str,
    inputs: str | None = None,
    *,
    arch: str | None = None,
    trust_pickle: bool = False,
    tolerance: float = 2e-5,
    step: Callable[[str], None] = lambda _text: None,
) -> Comparison:
    """Load both files safely and compare their outputs in order.

    Raises:
        GraphoptError: neither file says what its inputs are and none were given, a model cannot run
            on them, the two return different numbers of tensors, or ``tolerance`` is no number
            from 0 upward.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise GraphoptError(
            f"the tolerance is a number from 0 upward, not {tolerance:g}",
            where="--tolerance",
            fix="give a small number, such as 2e-5",
        )
    pair = []
    for path in (a, b):
        step(f"load {Path(path).name}")
        pair.append(open_runnable(path, arch=arch, trust_pickle=trust_pickle))
    chosen = _inputs(inputs, pair)
    results = []
    for item in pair:
        step(f"run {item.name}")
        results.append([v for v in _run(item, chosen.kwargs) if isinstance(v, Tensor)])
    if len(results[0]) != len(results[1]):
        counts = [f"{r.name} returns {len(v)}" for r, v in zip(pair, results, strict=True)]
        raise GraphoptError(
            f"the models return different numbers of tensors: {', '.join(counts)}",
            fix="compare models with the same outputs",
        )
    rows = [_row(i, x, y, tolerance) for i, (x, y) in enumerate(zip(*results, strict=True))]
    return Comparison(pair[0].name, pair[1].name, tolerance, tuple(rows))


def _inputs(given: str | None, pair: Sequence[Runnable]) -> Inputs:
    if given is not None:
        return given_inputs(given)
    carried = next((r.inputs for r in pair if r.inputs is not None), None)
    if carried is not None:
        return carried
    drawn = next((r.drawn for r in pair if r.drawn is not None), None)
    if drawn is None:
        raise GraphoptError(
            "neither file says what its inputs are",
            where=" and ".join(r.name for r in pair),
            fix="--inputs 'NAME:DTYPE[DIM,...]'",
        )
    return drawn()


def _run(item: Runnable, values: Mapping[str, Any]) -> list[Any]:
    """The outputs, or what the model says against the inputs as one line."""
    try:
        return item.run(values)
    except GraphoptError:
        raise
    except Exception as error:  # the model's own code, or a runtime in C++: anything may come
        reason = printable(" ".join(str(error).split()))[:300] or type(error).__name__
        shown = "; ".join(f"{n}: {_shown(v)}" for n, v in values.items())
        raise GraphoptError(
            f"{item.name} cannot run on these inputs ({shown}): {reason}",
            where=item.name,
            fix="give inputs that the model takes: --inputs 'NAME:DTYPE[DIM,...]'",
        ) from error


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _row(index: int, a: Tensor, b: Tensor, tolerance: float) -> OutputRow:
    if a.shape != b.shape:
        note = f"shape {tuple(a.shape)} against {tuple(b.shape)}"
        return OutputRow(index, tuple(a.shape), float("inf"), float("inf"), False, note)
    x, y = a.detach().double(), b.detach().double()
    if not torch.equal(x.isfinite(), y.isfinite()):
        note = "infinities or NaN in other places"
        return OutputRow(index, tuple(a.shape), float("inf"), float("inf"), False, note)
    x, y = x.nan_to_num(0, 0, 0), y.nan_to_num(0, 0, 0)
    scale = float(x.square().mean().sqrt()) if x.numel() else 0.0
    scale = scale or 1.0
    rms = float((x - y).square().mean().sqrt()) / scale if x.numel() else 0.0
    peak = float((x - y).abs().max()) / scale if x.numel() else 0.0
    return OutputRow(index, tuple(a.shape), rms, peak, rms <= tolerance)


def open_runnable(path: str, *, arch: str | None, trust_pickle: bool) -> Runnable:
    """A file as something that runs on named inputs."""
    weights = sniff(Path(path), Limits.from_env()) in STATE_DICTS
    loaded = load_model(path, arch=arch if weights else None, trust_pickle=trust_pickle)
    if loaded.kind == "onnx":
        from graphopt.onnx_side import onnx_runner

        run_file, drawn = onnx_runner(loaded.source)
        return Runnable(loaded.source.name, run_file, None, drawn)
    if loaded.exported is not None:
        return _pt2(loaded)
    module = loaded.module
    if module is None:
        raise GraphoptError(f"{loaded.kind} cannot be run", where=path)

    def run(values: Mapping[str, Any]) -> list[Any]:
        with torch.no_grad():
            return list(pytree.tree_leaves(module(**values)))

    return Runnable(loaded.source.name, run, _huggingface(loaded))


def _huggingface(loaded: LoadedModel) -> Inputs | None:
    if loaded.kind != "huggingface" or loaded.module is None:
        return None
    from graphopt.huggingface_inputs import huggingface_inputs, tokenizer_of

    return huggingface_inputs(loaded.module, tokenizer_of(loaded))


def _pt2(loaded: LoadedModel) -> Runnable:
    from graphopt.artifact import program_of
    from graphopt.emit.module import OptimizedModule
    from graphopt.report.model import Report

    program = program_of(loaded)
    module = OptimizedModule(program, Report(program.name))
    names = [n.name for n in program.user_inputs()]
    flags = program.call.fixed if program.call is not None else {}

    def run(values: Mapping[str, Any]) -> list[Any]:
        with torch.no_grad():
            return list(pytree.tree_leaves(module(**{**flags, **values})))

    tensors = dict(zip(names, program.example_inputs, strict=True))
    return Runnable(loaded.source.name, run, Inputs({**tensors, **flags}) if tensors else None)
