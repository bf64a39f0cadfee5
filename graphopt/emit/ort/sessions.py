"""Sessions of ONNX Runtime over weights in torch's memory.

What ONNX Runtime 1.32 does with weights that are handed to it was found by its resident memory, on
eight products with 2048 x 2048 float32 weights (128 MiB): ``add_external_initializers`` copies
them, 128 MiB more, whatever else is set; so does packing for products. With ``add_initializer``
for the same tensors, no packing (``session.disable_prepacking``) and no folding of constants, which
would store transposed weights, it takes nothing more, and sees what is written into them. Both
calls are needed: the first one gives optimizers the values, without the second these are copied.
Products of packed weights were 1.2 times as fast there (64 rows, one thread).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.emit.ort.models import RegionModel
from graphopt.emit.ort.providers import CPU, CUDA, ON_CUDA
from graphopt.errors import ExportError
from graphopt.onnx_types import code_of, numpy_name


@dataclass(frozen=True)
class Settings:
    """How sessions are opened.

    Attributes:
        providers: full names, in the order of preference.
        device: whose memory they read: of torch's tensors, in place.
        packed: ONNX Runtime may keep copies of weights, packed for its products and folded.
    """

    providers: tuple[str, ...]
    device: torch.device
    packed: bool = False


class Session:
    """An open session, and what it reads: the weights live as long as it does.

    Raises:
        ExportError: ONNX Runtime does not take the model, or not on these providers.
    """

    def __init__(self, model: RegionModel, settings: Settings) -> None:
        import onnxruntime

        self.weights = {name: value_of(t) for name, t in model.weights.items()}
        read = {name: value_of(t.cpu()) for name, t in model.weights.items()}  # while it is opened
        options = _options(self.weights, read, settings)
        disabled = [] if settings.packed else ["ConstantFolding"]
        try:
            self.session: Any = onnxruntime.InferenceSession(
                model.proto,
                options,
                providers=_with_options(settings),
                disabled_optimizers=disabled,
            )
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            raise ExportError(f"ONNX Runtime does not take it: {first:.300}") from error
        if missing := [p for p in settings.providers if p not in self.session.get_providers()]:
            raise ExportError(
                f"{missing[0]} is installed but cannot be used on this machine",
                where="option providers",
                fix="see ONNX Runtime's own message above for what it lacks",
            )
        self.inputs = frozenset(i.name for i in self.session.get_inputs())
        runs = _assigned(self.session)
        if CPU not in settings.providers:
            _refuse_cpu(runs)
        self.assigned = dict(Counter(run.provider for run in runs))


def value_of(tensor: Tensor) -> Any:
    """An ``OrtValue`` in a tensor's own memory."""
    from onnxruntime import OrtValue

    plain = tensor.detach()
    if plain.device.type != "cpu":
        return OrtValue.from_dlpack(plain)
    if numpy_name(plain.dtype):
        return OrtValue.ortvalue_from_numpy(plain.numpy())
    bits = torch.uint8 if plain.element_size() == 1 else torch.uint16
    code = code_of(plain.dtype)
    return OrtValue.ortvalue_from_numpy_with_onnx_type(plain.view(bits).numpy(), code)


def element_type(dtype: torch.dtype) -> Any:
    """A dtype as bindings take it: numpy's, or ONNX's number.

    Raises:
        KeyError: ONNX has no such type.
    """
    import numpy as np

    name = numpy_name(dtype)
    return np.dtype(name).type if name else code_of(dtype)


def _options(weights: Mapping[str, Any], read: Mapping[str, Any], settings: Settings) -> Any:
    """For a session on ``weights`` where they are; its optimizers ``read`` them on the host."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if CPU not in settings.providers and not _tells(onnxruntime.InferenceSession):
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # torch computes between calls: threads must not wait busily for the next one
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not settings.packed:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if weights:
        options.add_external_initializers(list(read), list(read.values()))
    for name, value in weights.items():
        options.add_initializer(name, value)
    return options


def _with_options(settings: Settings) -> list[str | tuple[str, dict[str, str]]]:
    """Providers as ONNX Runtime takes them: on the GPU of the tensors, and no less exact than
    torch, whose products round to TF32 on request alone."""
    found: list[str | tuple[str, dict[str, str]]] = []
    for name in settings.providers:
        options = {}
        if name in ON_CUDA:
            options["device_id"] = str(settings.device.index or 0)
        if name == CUDA:
            options["use_tf32"] = str(int(torch.backends.cuda.matmul.fp32_precision == "tf32"))
        found.append((name, options) if options else name)
    return found


class _Run(NamedTuple):
    """An ONNX operator, and the provider that runs it."""

    provider: str
    operator: str


def _tells(session: Any) -> bool:
    """Whether this ONNX Runtime says which provider runs what."""
    return hasattr(session, "get_provider_graph_assignment_info")


def _assigned(session: Any) -> list[_Run]:
    if not _tells(session):
        return []
    parts = session.get_provider_graph_assignment_info()
    return [_Run(part.ep_name, node.op_type) for part in parts for node in part.get_nodes()]


SIZES = frozenset(
    {"Shape", "Size", "Gather", "Slice", "Concat", "Split", "Squeeze", "Unsqueeze", "Reshape"}
    | {"Cast", "Constant", "ConstantOfShape", "Expand", "Range", "Where", "ReduceProd", "Not"}
    | {"Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Min", "Max", "And", "Or"}
    | {"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"}
)
"""Operators that every provider has for tensors: those of them that one leaves to the CPU compute
sizes, which are on the CPU and are read there."""


def _refuse_cpu(runs: list[_Run]) -> None:
    """Refuse a session in which the CPU, which was not named, has more to do than with sizes.

    Raises:
        ExportError: it would run other operators, or all there are.
    """
    given = [run.operator for run in runs if run.provider == CPU]
    left = given if len(given) == len(runs) else [name for name in given if name not in SIZES]
    if left:
        raise ExportError(
            "ONNX Runtime would run it on the CPU, a provider that is not named",
            where=f"operator {left[0]}",
            fix="add 'cpu' to the providers, at the end",
        )
