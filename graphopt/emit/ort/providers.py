"""ONNX Runtime's execution providers: by full name, or as people call them."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import torch

from graphopt.emit.onnx_runtime import require
from graphopt.errors import MissingDependencyError, RecipeError

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"

SHORT = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "directml": "DmlExecutionProvider",
    "dml": "DmlExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "migraphx": "MIGraphXExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
    "azure": "AzureExecutionProvider",
}

PACKAGES = {
    CPU: "onnxruntime",
    CUDA: "onnxruntime-gpu",
    "TensorrtExecutionProvider": "onnxruntime-gpu",
    "OpenVINOExecutionProvider": "onnxruntime-openvino",
    "DmlExecutionProvider": "onnxruntime-directml",
    "CoreMLExecutionProvider": "onnxruntime (on macOS)",
    "QNNExecutionProvider": "onnxruntime-qnn",
    "MIGraphXExecutionProvider": "onnxruntime-migraphx",
}
"""What to install in place of ``onnxruntime``: these packages write the same files."""

ON_CUDA = frozenset({CUDA, "TensorrtExecutionProvider"})
"""Providers that read torch's CUDA tensors where they are; the others take host memory."""

OWN_OPERATORS = frozenset({CPU, CUDA})
"""Providers with kernels for ONNX Runtime's own operators, which fusions make."""


def resolve_providers(names: Sequence[str] | None, device: str = "cpu") -> tuple[str, ...]:
    """Full names, in the order of preference, without repetition.

    Args:
        names: full or short names, in any case; by default the provider of ``device``.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        RecipeError: there is no such provider; the nearest name is given.
        MissingDependencyError: it is not in the ONNX Runtime that is installed here, or there is
            none; the package that has it is given.
    """
    require("onnx", "onnxscript", "onnxruntime")
    given = [names] if isinstance(names, str) else names
    if given is None:
        given = [CUDA if device == "cuda" else CPU]
    if not given:
        raise RecipeError(
            "no execution provider is named", where="option providers", fix="providers=['cpu']"
        )
    found = tuple(dict.fromkeys(map(_full_name, given)))
    for name in found:
        _check_installed(name)
    return found


def memory_of(providers: Sequence[str], device: torch.device) -> torch.device:
    """Where providers read tensors: the GPU of a program's tensors, the first one for a program on
    the CPU, or host memory."""
    if not ON_CUDA.intersection(providers):
        return torch.device("cpu")
    return torch.device("cuda", device.index or 0)


def available_providers() -> tuple[str, ...]:
    """Those of the installed ONNX Runtime; none where there is none."""
    try:
        import onnxruntime
    except ImportError:
        return ()
    return tuple(onnxruntime.get_available_providers())


def _full_name(name: str) -> str:
    import onnxruntime

    full = [*dict.fromkeys([*SHORT.values(), *onnxruntime.get_all_providers()])]
    known = {**{f.lower(): f for f in full}, **SHORT}
    lowered = name.lower() if isinstance(name, str) else repr(name)
    if lowered in known:
        return known[lowered]
    near = get_close_matches(lowered, known, 1, 0.5)
    listed = ", ".join(SHORT)
    advice = f"did you mean {_spelled(near[0], known)!r}? Short names are {listed}" if near else ""
    raise RecipeError(
        f"unknown execution provider {name!r}",
        where="option providers",
        fix=advice or f"use one of {listed}, or a full name such as {CPU}",
    )


def _spelled(lowered: str, known: dict[str, str]) -> str:
    """A short name as it is, a full one in its own case."""
    return lowered if lowered in SHORT else known[lowered]


def _check_installed(name: str) -> None:
    import onnxruntime

    if name in (there := available_providers()):
        return
    package = PACKAGES.get(name)
    get = (
        f"install {package} in place of onnxruntime"
        if package
        else f"build ONNX Runtime with {name}"
    )
    raise MissingDependencyError(
        f"{name} is not in the installed ONNX Runtime {onnxruntime.__version__}",
        where="option providers",
        fix=f"{get}; available here: {', '.join(there)}",
    )
