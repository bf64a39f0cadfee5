"""Hugging Face folders whose weights are quantized: what is read as it is stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import LoadError
from graphopt.interchange.declared import METHODS, declared
from graphopt.interchange.folder import RawLinear, finish, planned
from graphopt.interchange.layout import Found
from graphopt.interchange.plug import places
from graphopt.loading.findings import Limits, reading
from graphopt.loading.safetensors_files import read_header

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class Plan:
    """Modules that take the places of a model's quantized layers; none where none is quantized.

    Attributes:
        dtype: of the tensors that are not quantized.
        notes: what a person may want to know of how they are read.
    """

    modules: dict[str, RawLinear] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    notes: list[str] = field(default_factory=list)

    def options(self, config: Any) -> dict[str, Any]:
        """For ``from_pretrained`` under this config, which no longer says that it is quantized."""
        if not self.modules:
            return {}
        del config.quantization_config
        said = {} if getattr(config, "dtype", None) else {"dtype": self.dtype}
        return {"quantization_config": places(self.modules), **said}

    def finish(self, model: Any, missing: Iterable[str], dequantize: bool) -> None:
        """Put the layers in place, now that the tensors are there."""
        if self.modules:
            finish(model, self.modules, missing, model.dtype if dequantize else None)
            del model.config.quantization_config
            self.notes.append(self._summary(dequantize))

    def _summary(self, dequantize: bool) -> str:
        kinds = sorted({module.layout.text for module in self.modules.values()})
        how = "dequantized" if dequantize else "read as they are stored"
        return f"{len(self.modules)} quantized layers {how} ({'; '.join(kinds)})"


def quantized_plan(
    empty: Any, config: Mapping[str, Any], headers: Callable[[], dict[str, Found]], folder: Path
) -> Plan:
    """What is quantized in a folder; other methods than `METHODS` are left to transformers.

    Args:
        empty: the model without weights.
        headers: gives the tensors of all files.

    Raises:
        LoadError: the method is unknown, or the weights are not as the config says.
    """
    given = config.get("quantization_config")
    if given is None:
        return Plan()
    where = str(folder / "config.json")
    if not isinstance(given, Mapping):
        raise LoadError("quantization_config is no mapping", where=where)
    method = str(given.get("quant_method", "")).replace("_", "-")
    if method not in METHODS and _transformers_knows(given.get("quant_method")):
        return Plan()
    said, held = declared(given, where), headers()
    modules = planned(empty, held, said)
    if not modules:
        raise LoadError(
            f"config.json says that weights are quantized ({method}), and the files hold none",
            where=where,
            fix="get the weights that belong to the config; or remove quantization_config from it",
        )
    return Plan(modules, _float_dtype(held, modules), said.notes)


def _float_dtype(headers: Mapping[str, Found], modules: Mapping[str, RawLinear]) -> torch.dtype:
    """The dtype of most tensors that are not of quantized layers."""
    layers = {module.layer for module in modules.values()}
    others = (held.dtype for name, held in headers.items() if name.rpartition(".")[0] not in layers)
    kinds = Counter(kind for kind in others if kind is not None and kind.is_floating_point)
    return max(kinds, key=kinds.__getitem__, default=torch.float32)


def _transformers_knows(method: Any) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return method in AUTO_QUANTIZER_MAPPING and method != "graphopt"


def headers_of(kind: str, files: Iterable[Path], limits: Limits) -> dict[str, Found]:
    """The tensors in checked files of weights, of the kind ``safetensors`` or ``bin``."""
    found: dict[str, Found] = {}
    for file in files:
        if kind == "safetensors":
            for t in read_header(file, limits)[0]:
                found[t.name] = Found(t.shape, _DTYPES.get(t.dtype), str(file))
            continue
        with reading(file):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            for name, tensor in state.items():
                found[name] = Found(tuple(tensor.shape), tensor.dtype, str(file))
    return found
