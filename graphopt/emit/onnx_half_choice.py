"""What of a model stays float32 when the rest becomes half precision: what measuring says.

Errors are those of outputs against float64 of the program, with every result of an operator in half
precision rounded (`onnx_half.Halver.explicit`). An operator stays in float32 if without that they
are above the bound, or infinite. Where ONNX Runtime is further off than that on halves (a
distance that is rounded otherwise falls into another of T5's buckets), what it gives counts too.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.emit.onnx_half import Halver
from graphopt.emit.onnx_quantized.calls import quantized_nodes
from graphopt.emit.onnx_runtime import TOLERANCE, feed_of, open_session
from graphopt.errors import ExportError
from graphopt.program import Program
from graphopt.rewrite.rule import Numeric
from graphopt.signature import OutputKind
from graphopt.verify.measure import compare
from graphopt.verify.trials import unseen_or_refused
from graphopt.verify.unrounded import unrounded
from graphopt.verify.whole import run_program

DTYPES = ("float16", "bfloat16", "mixed")
MULTIPLE = 3.0
"""Times the error of half weights, inputs and outputs alone that outputs may have: the criterion of
half precision."""
TRIALS = 96
"""Sessions in which single operators are tried; what is left then stays float32."""

Error = Callable[[Any], float]


@dataclass(frozen=True)
class Halved:
    """A model in half precision.

    Attributes:
        model: of ``onnx_ir``.
        bound: what outputs may be off by, relative RMS.
        notes: what stayed float32, and why.
    """

    model: Any
    bound: float
    notes: tuple[str, ...]


@dataclass
class _Search:
    """Which nodes are in float32, by what outputs lose where they are not.

    With ``runs``, what ONNX Runtime loses on the halves themselves counts too.
    """

    halver: Halver
    error: Error
    bound: float = 0.0
    wide: set[str] = field(default_factory=set)
    costs: dict[str, float] = field(default_factory=dict)
    tried: int = 0
    runs: bool = False

    def run(self, floor: float, kinds: dict[str, list[str]]) -> float:
        """Find what stays wide; the error that is left."""
        self.bound = max(self.bound, MULTIPLE * floor)
        found = self._with(self.wide)
        if found <= self.bound:
            return found
        self.wide = {name for names in kinds.values() for name in names}
        alone = {kind: self._with(self.wide - {*names}) for kind, names in kinds.items()}
        for kind in sorted(kinds, key=lambda kind: alone[kind]):
            self._narrow(kind, kinds[kind])
        return self._with(self.wide)

    def _narrow(self, kind: str, names: Sequence[str]) -> None:
        """Put nodes of one kind in half precision, all of them or as many as the bound allows."""
        if self.tried >= TRIALS and len(names) < len(self.wide):
            return
        cost = self._with(self.wide - {*names})
        if cost <= self.bound:
            self.wide -= {*names}
        elif len(names) == 1:
            self.costs[kind] = max(cost, self.costs.get(kind, 0.0))
        else:
            self.costs[kind] = max(cost, self.costs.get(kind, 0.0))
            middle = len(names) // 2
            self._narrow(kind, names[:middle])
            self._narrow(kind, names[middle:])

    def _with(self, wide: set[str]) -> float:
        self.tried += 1
        found = self.error(self.halver.explicit(wide))
        return max(found, self.error(self.halver(wide))) if self.runs else found


def check_dtype(program: Program | None, dtype: str | None, *, verify: bool = False) -> None:
    """Refuse what cannot be written in ``dtype``.

    Raises:
        ExportError: no such dtype, one that ONNX Runtime cannot run here though it is to ``verify``
            the file, or a program that is not of float32.
    """
    if dtype is None:
        return
    if dtype not in DTYPES:
        raise ExportError(f"no dtype {dtype!r}", where="dtype", fix=f"take {' or '.join(DTYPES)}")
    if dtype == "bfloat16" and verify:
        raise ExportError(
            "ONNX Runtime's CPU provider has no sums, products or activations in bfloat16, so the "
            "file cannot be compared here",
            where="dtype",
            fix="take float16, or verify=False (--no-verify) for a GPU",
        )
    tensors = [*program.state.values(), *program.example_inputs] if program is not None else []
    others = {t.dtype for t in tensors if isinstance(t, Tensor) and t.is_floating_point()}
    narrow = {torch.float64, torch.float16, torch.bfloat16}
    if program is not None and (given := others & narrow) and not quantized_nodes(program):
        found = " and ".join(sorted(str(d).removeprefix("torch.") for d in given))
        raise ExportError(
            f"{program.name} has {found}; dtype= is for models of float32",
            where="dtype",
            fix="leave it out, or capture the model after model.float()",
        )


def halve(
    program: Program, model: Any, names: tuple[Sequence[str], Sequence[str]], dtype: str
) -> Halved:
    """A model in ``dtype`` (``float16``, ``bfloat16``, or ``mixed``: float16 that takes and gives
    float32), with operators in float32 where outputs would be above the bound.

    Args:
        model: of ``onnx_ir``, in float32, of ``program``.
        names: of inputs and outputs.

    Raises:
        ExportError: weights or inputs alone, in half precision, make outputs infinite.
    """
    import onnx_ir

    half = onnx_ir.DataType.BFLOAT16 if dtype == "bfloat16" else onnx_ir.DataType.FLOAT16
    halver = Halver(model, half, keeps=dtype == "mixed")
    kinds = halver.kinds()
    search = _Search(halver, _ruler(program, names), TOLERANCE[_torch(half)])
    everything = {name for found in kinds.values() for name in found}
    floor = search._with(everything)
    if not math.isfinite(floor):
        raise ExportError(
            f"weights, inputs and outputs in {half.name.lower()} make outputs infinite or NaN",
            where=program.name,
            fix="dtype='bfloat16' has the range of float32; dtype='mixed' keeps inputs and outputs",
        )
    left = search.run(floor, kinds)
    if dtype != "bfloat16" and search.error(halver(search.wide)) > search.bound:
        search.runs, search.tried = True, 0
        left = search.run(floor, kinds)
    notes = (
        f"{half.name.lower()}: relative error {left:.1e} with each operator rounded, bound "
        f"{search.bound:.1e}, {floor:.1e} with all of them in float32",
        *_kept(search, kinds, left),
        *_without(halver),
        _where(dtype),
    )
    return Halved(halver(search.wide), search.bound, notes)


def _kept(search: _Search, kinds: dict[str, list[str]], left: float) -> Iterable[str]:
    for kind, names in kinds.items():
        if kept := [name for name in names if name in search.wide]:
            cost = search.costs.get(kind)
            cause = "not tried" if cost is None else _told(cost)
            yield (
                f"in float32: {len(kept)} of {len(names)} `{kind}` ({cause} in half precision, "
                f"{left:.1e} without)"
            )


def _where(dtype: str) -> str:
    if dtype == "bfloat16":
        return (
            "not run: ONNX Runtime has no bfloat16 on CPUs, load it with a provider for GPUs; "
            "errors are of operators in float32 with results rounded"
        )
    return "on CPUs, ONNX Runtime computes halves in float32 and holds weights so; GPUs do not"


def _told(error: float) -> str:
    return f"error {error:.1e}" if math.isfinite(error) else "infinities or NaN"


def _without(halver: Halver) -> Iterable[str]:
    if halver.fixed:
        kinds = ", ".join(f"`{kind}`" for kind in sorted(halver.fixed))
        yield f"in float32, for want of a form in half precision or its range: {kinds}"


def _torch(half: Any) -> torch.dtype:
    found: torch.dtype = getattr(torch, half.name.lower())
    return found


def _ruler(program: Program, names: tuple[Sequence[str], Sequence[str]]) -> Error:
    """What measures the largest error of a model's outputs; infinite where they are not finite as
    float64 is, or where ONNX Runtime does not load it."""
    import onnx_ir

    reference = unrounded(program)
    mutated = sum(o.kind is not OutputKind.USER for o in program.outputs)
    trials = []
    unseen, refused = unseen_or_refused(program)
    for values in (program.example_inputs, *([] if refused else [unseen])):
        old = run_program(program, values, wide=False, grad=False).outputs[mutated:]
        exact = run_program(reference, values, wide=True, grad=False).outputs[mutated:]
        wanted = [(o, e) for o, e in zip(old, exact, strict=True) if isinstance(o, Tensor)]
        trials.append((values, wanted))

    def error(model: Any) -> float:
        found = [0.0]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trial.onnx"
            onnx_ir.save(model, path, external_data="trial.data")
            session = open_session(path)
            for values, wanted in trials:
                made = session.run(None, feed_of(session, values, names[0]))[mutated:]
                for (old, exact), new in zip(wanted, made, strict=True):
                    wide = torch.from_numpy(new).to(old.dtype)
                    seen = compare(old, wide, exact, Numeric.LOSSY, math.inf)
                    found.append(seen.rms if seen.ok else math.inf)
        return max(found)

    return error
