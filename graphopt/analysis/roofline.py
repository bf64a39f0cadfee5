"""What this machine reaches: matrix products, memory traffic and the time of the smallest call.

Measured once per device, torch version and thread count, and kept in the user's cache folder. The
model is that of Williams, Waterman and Patterson, "Roofline" (CACM 2009), with launch time added.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGEST = 8192
"""Rows of the largest matrix that is tried."""
COPIED = 2**25
"""Floats in the copy that is timed; eight times as many on a GPU."""


@dataclass(frozen=True)
class Roofline:
    """Best rates seen on a device.

    Attributes:
        flops_per_s: by dtype (``"float32"``), of a square matrix product.
        bytes_per_s: read and written together, of a large copy.
        launch_s: seconds of the smallest call.
    """

    flops_per_s: dict[str, float]
    bytes_per_s: float
    launch_s: float

    def rate(self, dtype: torch.dtype = torch.float32) -> float:
        """Operations per second in ``dtype``; in float32 where that was not measured."""
        return self.flops_per_s.get(_name(dtype), self.flops_per_s["float32"])


def measure_roofline(
    device: torch.device | str = "cpu", *, path: Path | None = None, refresh: bool = False
) -> Roofline:
    """The roofline of ``device``: from the cache, or measured in a second or two and kept there.

    Args:
        path: the JSON file to keep it in; default: ``roofline.json`` in graphopt's cache folder.
        refresh: measure again.
    """
    device = torch.device(device)
    path = _default_path() if path is None else path
    kept = _load(path)
    key = _key(device)
    if refresh or (found := _parsed(kept.get(key))) is None:
        found = _measure(device)
        _save(path, {**_load(path), key: asdict(found)})
    return found


def _measure(device: torch.device) -> Roofline:
    with torch.no_grad():
        rates = {_name(dtype): _product_rate(device, dtype) for dtype in DTYPES}
        return Roofline(
            flops_per_s={name: rate for name, rate in rates.items() if rate},
            bytes_per_s=_copy_rate(device),
            launch_s=_launch_time(device),
        )


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of the largest square product within 20 ms; 0 where there is none."""
    rows, best = 256, 0.0
    while rows <= LARGEST:
        left = torch.ones(rows, rows, device=device, dtype=dtype)
        try:
            seconds = _seconds(device, left.mm, left)
        except RuntimeError:  # no kernel for this dtype here
            return best
        best = max(best, 2 * rows**3 / seconds)
        if seconds > 0.02:
            break
        rows *= 2
    return best


def _copy_rate(device: torch.device) -> float:
    count = COPIED * (8 if device.type == "cuda" else 1)
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(device, target.copy_, source)


def _launch_time(device: torch.device) -> float:
    one = torch.ones(1, device=device)

    def many() -> None:
        for _ in range(200):
            torch.add(one, one)

    return _seconds(device, many) / 200


def _seconds(device: torch.device, call: Callable[..., Any], *args: Tensor) -> float:
    """The shortest of several calls, after one to warm up."""
    best = float("inf")
    for _ in range(6):
        _wait(device)
        start = time.perf_counter()
        call(*args)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _key(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"{_processor()}, torch {torch.__version__}, {threads} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or platform.processor() or platform.machine()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _default_path() -> Path:
    from graphopt.files import cache_dir

    return cache_dir() / "roofline.json"


def _load(path: Path) -> dict[str, Any]:
    """What is kept; nothing where the file is absent or not such a table, which only costs time."""
    try:
        kept = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _parsed(entry: Any) -> Roofline | None:
    """A kept entry as a roofline, or None where it is not one."""
    try:
        found = Roofline(**entry)
        numbers = [*found.flops_per_s.values(), found.bytes_per_s, found.launch_s]
        sound = "float32" in found.flops_per_s and all(0 < n < float("inf") for n in numbers)
    except (TypeError, AttributeError):
        return None
    return found if sound else None


def _save(path: Path, table: dict[str, Any]) -> None:
    from graphopt.files import atomic_path

    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with atomic_path(path) as staged:
        staged.write_text(json.dumps(table, indent=1))
