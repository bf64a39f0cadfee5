"""Which path runs a call: the fastest on this machine, measured when a call of its kind first runs.

Kinds of calls differ in their `cases.Case`, the number of threads, and the number of rows, rounded
up to a power of two. What was chosen is kept for the process. Other paths round otherwise than the
definition: `using` fixes one where bits must repeat. Calls that a CUDA graph captures are not
timed: what was chosen before is captured.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from graphopt.kernels.quantized.cases import Case
from graphopt.kernels.quantized.gpu_timing import device_quartiles
from graphopt.kernels.quantized.paths import PATHS, Path, Stored, Weight, is_tried, paths_for
from graphopt.kernels.quantized.rounding import quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.static import Static
from graphopt.kernels.quantized.weight import QuantizedWeight

_ROUNDS, _SECONDS = 7, 0.2
_chosen: dict[tuple[Case, int, int], Path] = {}
_fixed: ContextVar[str | None] = ContextVar("graphopt_quantized_path", default=None)


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run calls by the path of this name where it takes them; others are chosen as ever."""
    known = [path.name for path in PATHS]
    if name not in known:
        raise ValueError(f"no path is called {name!r}; there are {', '.join(known)}")
    token = _fixed.set(name)
    try:
        yield
    finally:
        _fixed.reset(token)


def chosen() -> dict[tuple[Case, int, int], str]:
    """What was chosen so far, by case, rows and threads."""
    return {kind: path.name for kind, path in _chosen.items()}


def choose(case: Case, x: Tensor, weight: Weight, *static: Static) -> Path:
    """The path for a call with rows ``x (M, K)``."""
    can = paths_for(case)
    fixed = [path for path in can if path.name == _fixed.get()]
    if fixed or not len(x) or (len(can) == 1 and is_tried(case)):
        return (fixed or can)[0]
    kind = (case, 1 << (len(x) - 1).bit_length(), torch.get_num_threads())
    if kind not in _chosen:
        if case.is_captured:
            return _unmeasured(can, len(x))
        on_gpu = case.device == "cuda"
        can, measure = (
            (_able(can, x, weight, *static), device_quartiles) if on_gpu else (can, quartiles)
        )
        times = measure([partial(path.run, x, weight, None, *static) for path in can])
        _chosen[kind] = can[times.index(min(times))]
    return _chosen[kind]


def _able(can: list[Path], x: Tensor, weight: Weight, *static: Static) -> list[Path]:
    """The definition, and what runs these sizes too: tiles for them may not compile, or not fit."""
    able = can[:1]
    for path in can[1:]:
        try:
            path.run(x, weight, None, *static)
            able.append(path)
        except Exception as error:  # whatever it is, something else runs instead
            warnings.warn(
                f"quantized products of {len(x)} rows and a weight {tuple(weight.shape)} run "
                f"without {path.name!r}: {type(error).__name__}: {error}"[:400],
                stacklevel=3,
            )
    return able


def _unmeasured(can: list[Path], rows: int) -> Path:
    warnings.warn(
        f"a CUDA graph captures a quantized product of {rows} rows that ran with no such number "
        "before: nothing can be timed now, and its definition is captured, which is slow. Run the "
        "model once with these sizes before capture",
        stacklevel=2,
    )
    return can[0]


def quartiles(runs: list[Callable[[], object]]) -> list[float]:
    """Lower quartiles of seconds, runs taken in turn; slow ones are run less often."""
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for _ in range(_ROUNDS):
        for run, taken in zip(runs, seconds, strict=True):
            before = time.perf_counter()
            run()
            taken.append(time.perf_counter() - before)
        if time.perf_counter() - start > _SECONDS:
            break
    return [sorted(taken)[len(taken) // 4] for taken in seconds]


def choose_layout(scheme: Scheme, outputs: int, inputs: int, dtype: torch.dtype, rows: int) -> str:
    """The layout in which weight-only products with ``rows`` rows are fastest here, on the CPU.

    Measured on a weight of random numbers; ``"plain"`` where no other layout can be had.
    """
    generator = torch.Generator("cpu").manual_seed(0)  # the caller's random numbers are their own
    plain = quantize(torch.randn(outputs, inputs, generator=generator, device="cpu"), scheme)
    x = torch.randn(rows, inputs, generator=generator, device="cpu").to(dtype)
    runs: dict[str, Callable[[], object]] = {}
    for path in PATHS:
        case = Case(scheme, path.layout, "none", dtype, "cpu", outputs, inputs)
        if not path.takes(case) or path.name == "unpacked":
            continue
        weight = _laid_out(plain, path)
        if weight is not None:
            runs[path.name] = partial(path.run, x, weight, None)
    times = quartiles(list(runs.values()))
    fastest = list(runs)[times.index(min(times))]
    return next(path.layout for path in PATHS if path.name == fastest)


def _laid_out(weight: QuantizedWeight, path: Path) -> Weight | None:
    if path.layout == "plain":
        return weight
    try:
        tensors = path.prepare(weight)
    except ValueError:
        return None
    return Stored(weight.scheme, path.layout, tensors, (weight.shape[0], weight.width))
