"""A rewritten ONNX file held to the original: outputs in ONNX Runtime, beside a float64 run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from graphopt.emit.onnx_runtime import TOLERANCE
from graphopt.errors import GraphoptError, VerificationError
from graphopt.onnx_files.document import session_of
from graphopt.onnx_files.feeds import Feeds
from graphopt.onnx_files.random_nodes import random_names
from graphopt.onnx_files.values import Feed, as_tensor, flat, run, same
from graphopt.onnx_files.wide import widened
from graphopt.report.model import Certificate
from graphopt.rewrite.rule import Numeric
from graphopt.verify.measure import EXACT, Measure, compare, worst

FAR = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.2}
"""Relative error of the original beside float64 from which on that is taken for a run of something
else: what ONNX Runtime and onnx's reference implementation do is not the same everywhere."""
TINY = 1e-30
_FAILED = Measure(math.inf, math.inf, 0.0, 0.0, False)


@dataclass
class Wanted:
    """What the original gives on one set of inputs.

    Attributes:
        loose: outputs that differ from run to run.
    """

    what: str
    feed: Feed
    outputs: list[Any]
    loose: frozenset[int] = frozenset()


class Examiner:
    """Holds models to the original.

    Attributes:
        notes: what could not be compared, and why.
        lacking: why some outputs that differ have no float64 run to hold them to; empty where none
            were asked for, or they have one.
    """

    def __init__(self, model: Any, feeds: Feeds, *, external: bool = False) -> None:
        """Run the original.

        Raises:
            VerificationError: ONNX Runtime does not load the original, or does not run it on the
                first inputs.
        """
        self.model, self.feeds, self.external = model, feeds, external
        self.notes: list[str] = []
        self.lacking = ""
        session = session_of(model, external=external)
        self.names = [entry.name for entry in session.get_outputs()]
        self._exact: dict[int, list[Any] | None] = {}
        self.wanted = [self._first(session), *self._others(session)]

    def examine(self, model: Any, allowed: float = 0.0) -> Measure:
        """The worst measure over all outputs and inputs.

        Args:
            allowed: relative RMS error that lossy rewrites may have.

        Raises:
            VerificationError: names the output that differs, or what ONNX Runtime says.
        """
        session = session_of(model, external=self.external)
        rows = []
        for wanted in self.wanted:
            try:
                found = run(session, wanted.feed)
            except Exception as error:  # a runtime in C++ raises anything
                raise VerificationError(
                    f"ONNX Runtime does not run it on {wanted.what}: {_line(error)}"
                ) from error
            rows += [self._measured(wanted, i, v, allowed) for i, v in enumerate(found)]
        return worst(rows)

    def first_outputs(self, model: Any) -> tuple[list[Any], list[Any]]:
        """Outputs on the first inputs, and those of the original, in float64 where it runs so."""
        first = self.wanted[0]
        found = run(session_of(model, external=self.external), first.feed)
        return found, self._in_float64(first) or first.outputs

    def certificate(self, found: Measure, *, rule: str, version: int, numeric: str) -> Certificate:
        """Proof for one rewrite, or for the whole file."""
        notes = (_NO_FLOAT64, f"float64: {self.lacking}") if self.lacking and found.bound else ()
        return Certificate(
            rule=rule,
            version=version,
            numeric=numeric,
            nodes=(),
            source=None,
            inputs_hash=self.inputs_hash,
            error=found.rms,
            max_error=found.max,
            original_error=found.original,
            bound=found.bound,
            runs=len(self.wanted),
            notes=notes,
        )

    @cached_property
    def inputs_hash(self) -> str:
        """SHA-256 over names, shapes, dtypes and values of all inputs."""
        digest = hashlib.sha256()
        for wanted in self.wanted:
            for name, value in sorted(wanted.feed.items()):
                for part, leaf in flat(value, name):
                    plain = leaf if isinstance(leaf, np.ndarray) else np.array(repr(leaf))
                    digest.update(f"{part} {plain.dtype} {plain.shape};".encode())
                    digest.update(repr(plain.tolist()).encode() if plain.dtype.hasobject else
                                  plain.tobytes())  # fmt: skip
        return digest.hexdigest()

    def _first(self, session: Any) -> Wanted:
        try:
            outputs = run(session, self.feeds.first)
        except GraphoptError:
            raise
        except Exception as error:
            raise VerificationError(
                f"ONNX Runtime does not run the original: {_line(error)}",
                fix="give inputs that it takes: --inputs 'NAME:DTYPE[DIM,...]', or a file",
            ) from error
        return self._kept("the first inputs", self.feeds.first, outputs)

    def _others(self, session: Any) -> list[Wanted]:
        found = []
        for what, feed in self.feeds.others:
            try:
                outputs = run(session, feed)
            except Exception as error:
                self.notes.append(f"{what} were not tried, the original refuses: {_line(error)}")
                continue
            found.append(self._kept(what, feed, outputs))
        return found

    def _kept(self, what: str, feed: Feed, outputs: list[Any]) -> Wanted:
        return Wanted(what, feed, outputs, self._loose(feed, outputs))

    def _in_float64(self, wanted: Wanted) -> list[Any] | None:
        """What the original gives in float64; None where that cannot be had."""
        if id(wanted) not in self._exact:
            self._exact[id(wanted)] = self._widened(wanted)
        return self._exact[id(wanted)]

    def _widened(self, wanted: Wanted) -> list[Any] | None:
        runs, lacking = self._wide
        if runs is None:
            self.lacking = lacking
            return None
        try:
            exact = runs(wanted.feed)
        except Exception as error:  # a runtime in C++, or onnx's reference implementation
            self.lacking = _line(error)
            return None
        if not _near(wanted.outputs, exact):
            self.lacking = "a run in float64 does not give what the original gives"
            return None
        return exact

    @cached_property
    def _wide(self) -> tuple[Callable[[Feed], list[Any]] | None, str]:
        return widened(self.model)

    def _loose(self, feed: Feed, outputs: list[Any]) -> frozenset[int]:
        """Outputs that a second session gives other values for."""
        if not random_names(self.model):
            return frozenset()
        again = run(session_of(self.model, external=self.external), feed)
        found = {i for i, (a, b) in enumerate(zip(outputs, again, strict=True)) if not _equal(a, b)}
        for index in sorted(found):
            note = f"the output {self.names[index]!r} is random: compared by shape alone"
            if note not in self.notes:
                self.notes.append(note)
        return frozenset(found)

    def _measured(self, wanted: Wanted, index: int, value: Any, allowed: float) -> Measure:
        old = flat(wanted.outputs[index], self.names[index])
        new = flat(value, self.names[index])
        if len(old) != len(new):
            raise _differs(self.names[index], wanted.what, "it has other parts")
        rows = []
        for place, ((name, a), (_, b)) in enumerate(zip(old, new, strict=True)):
            if index in wanted.loose:
                found = _alike(a, b)
            elif same(a, b):
                found = EXACT
            else:
                exact = self._in_float64(wanted)
                found = _leaf(a, b, exact and flat(exact[index])[place][1], allowed)
            if not found.ok:
                raise _differs(name, wanted.what, found.note, found)
            rows.append(found)
        return worst(rows)


_NO_FLOAT64 = "compared with the original's outputs: there is no float64 run to hold both to"


def _leaf(old: Any, new: Any, exact: Any, allowed: float) -> Measure:
    """One array: within the tolerance of ONNX Runtime's kernels, or the original's own error where
    that is larger."""
    a, b = as_tensor(old), as_tensor(new)
    if a is None or b is None:
        return _integers(old, new, allowed)
    reference = as_tensor(exact)
    if reference is None or reference.shape != a.shape:
        reference = a.to(torch.complex128 if a.is_complex() else torch.float64)
        exact = None
    tolerance = max(TOLERANCE.get(a.dtype, 0.0), allowed)
    found = compare(a, b, reference, Numeric.LOSSY, tolerance)
    if found.ok and exact is not None:
        return found
    if exact is None:
        return replace(found, original=0.0)
    again = compare(a, b, reference, Numeric.REASSOCIATED)
    return again if again.ok else found


def _integers(old: Any, new: Any, allowed: float) -> Measure:
    """Integers, booleans and texts are equal; of what follows from lossy values a share may not."""
    arrays = isinstance(old, np.ndarray) and isinstance(new, np.ndarray)
    if not arrays or old.dtype != new.dtype or old.shape != new.shape:
        return replace(_FAILED, note=f"{_kind(old)} became {_kind(new)}")
    share = sum(map(_other, old.ravel().tolist(), new.ravel().tolist())) / max(old.size, 1)
    if share == 0:  # the same numbers, with other bits between them
        return EXACT
    if allowed and share <= allowed:
        return Measure(share, 1.0, 0.0, allowed, True)
    return replace(_FAILED, note=f"{share:.1%} of its values differ")


def _other(a: Any, b: Any) -> bool:
    return bool(a != b) and not (a != a and b != b)


def _near(outputs: list[Any], exact: list[Any]) -> bool:
    """Whether a run in float64 is one of the same model: nothing else may stand in for it."""
    if len(outputs) != len(exact):
        return False
    for value, wide in zip(outputs, exact, strict=True):
        mine, other = flat(value), flat(wide)
        if len(mine) != len(other):
            return False
        for (_, a), (_, b) in zip(mine, other, strict=True):
            x, y = as_tensor(a), as_tensor(b)
            if x is None or x.is_complex():
                continue
            if y is None or x.shape != y.shape or not _leaf_near(x, y):
                return False
    return True


def _leaf_near(x: torch.Tensor, y: torch.Tensor) -> bool:
    if not torch.equal(x.isfinite(), y.to(x.dtype).isfinite()):
        return False
    error = (x.double() - y).nan_to_num(0, 0, 0).norm()
    return bool(error <= FAR.get(x.dtype, 1e-9) * y.nan_to_num(0, 0, 0).norm() + TINY)


def _alike(old: Any, new: Any) -> Measure:
    held = _kind(old) == _kind(new)
    return Measure(0.0, 0.0, 0.0, 0.0, held, "" if held else f"{_kind(old)} became {_kind(new)}")


def _kind(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(value)


def _equal(a: Any, b: Any) -> bool:
    pairs = list(zip(flat(a), flat(b), strict=False))
    return len(flat(a)) == len(flat(b)) and all(same(x, y) for (_, x), (_, y) in pairs)


def _differs(name: str, what: str, note: str, found: Measure | None = None) -> VerificationError:
    figures = ""
    if found is not None and math.isfinite(found.rms):
        figures = f", relative error {found.rms:.2g}, allowed {found.bound:.2g}"
    return VerificationError(f"the output {name!r} is another one on {what}: {note}{figures}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
