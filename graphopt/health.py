"""What this installation is made of, and what about it will not work."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from graphopt.errors import GraphoptError

PACKAGES = (
    "graphopt",
    "torch",
    "numpy",
    "networkx",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "triton",
    "transformers",
    "safetensors",
)
MINIMUM = {"torch": (2, 11), "triton": (3, 6), "transformers": (5, 20)}


@dataclass(frozen=True)
class Health:
    """Versions, the machine, ONNX Runtime's execution providers, and problems with what to do about
    each."""

    versions: dict[str, str | None]
    machine: dict[str, str]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    providers: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The findings in plain text."""
        rows = [f"{name:16} {found or 'not installed'}" for name, found in self.versions.items()]
        rows += [f"{name:16} {value}" for name, value in self.machine.items()]
        rows += [f"{'providers':16} {', '.join(self.providers) or 'none: no ONNX Runtime'}"]
        rows += [f"note: {n}" for n in self.notes] + [f"problem: {p}" for p in self.problems]
        return [*rows, "no problems" if not self.problems else f"{len(self.problems)} problem(s)"]


def examine() -> Health:
    """Look at packages, device and cache folder."""
    from graphopt.emit.ort.providers import available_providers

    versions = {name: _version(name) for name in PACKAGES}
    problems = [*_too_old(versions), *_runtime_conflict(versions), *_cache_problem()]
    notes = [*_missing_extras(versions)]
    return Health(versions, _machine(), tuple(problems), tuple(notes), available_providers())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _too_old(versions: dict[str, str | None]) -> list[str]:
    found = []
    for name, minimum in MINIMUM.items():
        have = versions[name]
        if have is not None and tuple(map(int, re.findall(r"\d+", have)[:2])) < minimum:
            wanted = ".".join(map(str, minimum))
            found.append(f"{name} {have} is too old: pip install '{name}>={wanted}'")
    return found


def _runtime_conflict(versions: dict[str, str | None]) -> list[str]:
    if versions["onnxruntime"] and versions["onnxruntime-gpu"]:
        return [
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: "
            "pip uninstall -y onnxruntime onnxruntime-gpu, then install the one you need"
        ]
    return []


def _cache_problem() -> list[str]:
    from graphopt.files import cache_dir

    try:
        cache_dir()
    except (GraphoptError, OSError) as error:
        return [f"the cache folder cannot be used: {error}"]
    return []


def _missing_extras(versions: dict[str, str | None]) -> list[str]:
    runtime = versions["onnxruntime"] or versions["onnxruntime-gpu"]
    notes = []
    if not (versions["onnx"] and versions["onnxscript"] and runtime):
        notes.append("ONNX export is off: pip install 'graphopt[onnx]'")
    if not versions["transformers"]:
        notes.append("Hugging Face folders cannot be loaded: pip install 'graphopt[hf]'")
    return notes


def _machine() -> dict[str, str]:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "device": device,
        "cpu kernels": torch.backends.cpu.get_cpu_capability(),
    }
