"""GGUF files as models of transformers, their blocks of numbers kept as they are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.errors import LoadError
from graphopt.interchange import gguf
from graphopt.interchange.layout import DAMAGED
from graphopt.interchange.modules import PREFIX, QuantizedEmbedding, QuantizedLinear
from graphopt.interchange.plug import places
from graphopt.kernels.quantized import QuantizedWeight
from graphopt.loading.findings import reading
from graphopt.loading.hf_checks import empty_model, key_notes, quiet, refuse_mismatched
from graphopt.loading.tensors import check_tensors

ARCHITECTURES = frozenset(
    {"gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3", "stablelm", "starcoder2"}
)
"""Those whose weights stand in files as in transformers, but for the order of rows and for norms.
Others are dequantized by transformers."""


def load_gguf(path: Path, kind_of_model: Any, dequantize: bool) -> tuple[Any, list[str]]:
    """The model in a GGUF file, in evaluation mode, and notes.

    Raises:
        LoadError: the file is damaged, or transformers cannot make a model of it.
    """
    with reading(path), quiet():
        options: dict[str, Any] = {"local_files_only": True, "gguf_file": path.name}
        kind = getattr(kind_of_model, "config_class", None) or _auto_config()
        config = kind.from_pretrained(path.parent, **options)
        empty = empty_model(kind_of_model, config, [path], path.parent)
        loaded = None if dequantize else _packed(path, config, empty)
        if loaded is None:
            model, info = kind_of_model.from_pretrained(
                path.parent,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
            loaded = model, info, ["dequantized to float32"]
    model, info, notes = loaded
    refuse_mismatched(info.get("mismatched_keys") or (), path.parent)
    check_tensors(model, str(path))
    return model.eval(), notes + key_notes(info)


def _auto_config() -> Any:
    from transformers import AutoConfig

    return AutoConfig


class _Sorted(NamedTuple):
    """What a file holds, by the model's names."""

    weights: dict[str, QuantizedWeight]
    floats: dict[str, Tensor]
    types: Counter[str]
    dequantized: Counter[str]


def _packed(path: Path, config: Any, empty: Any) -> tuple[Any, Any, list[str]] | None:
    """The model with quantized layers; None where transformers has to load it all."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    convert = _converter(path, empty)
    if convert is None:
        return None
    found = _sorted(reader, convert, empty, path)
    if not found.weights or set(_lacking(empty, config, found)):
        return None
    modules, state = _modules(found, empty, config)
    model, info = type(empty).from_pretrained(
        None,
        config=config,
        state_dict=found.floats | state,
        quantization_config=places(modules),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    del model.config.quantization_config
    _share(model)
    return model, info, _notes(found)


def _notes(found: _Sorted) -> list[str]:
    kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(found.types.items()))
    notes = [f"quantized tensors read as they are stored: {kinds}; others are float32"]
    if found.dequantized:
        kinds = ", ".join(f"{count} of {kind}" for kind, count in sorted(found.dequantized.items()))
        notes.append(f"dequantized to float32, for no layer here holds them: {kinds}")
    return notes


Converted = tuple[str, np.ndarray]
Converter = Callable[[str, np.ndarray], Converted | None]


def _converter(path: Path, empty: nn.Module) -> Converter | None:
    """From a name and numbers in the file to those of the model, as transformers has it."""
    from transformers import modeling_gguf_pytorch_utils as utils

    if not hasattr(utils, "TENSOR_PROCESSORS"):
        return None
    parsed = utils.load_gguf_checkpoint(str(path), return_tensors=False)
    architecture = parsed["config"].get("model_type", "").removesuffix("_text")
    architecture = "llama" if architecture == "mistral" else architecture
    if architecture not in ARCHITECTURES:
        return None
    known = utils.TENSOR_PROCESSORS.get(architecture, utils.TensorProcessor)
    processor = known(config=parsed["config"])
    names = utils.get_gguf_hf_weights_map(empty, processor)

    def convert(name: str, numbers: np.ndarray) -> Converted | None:
        made = processor.process(
            weights=numbers, name=name, tensor_key_mapping=names, parsed_parameters=parsed
        )
        return (names[made.name], made.weights) if made.name in names else None

    return convert


def _sorted(reader: Any, convert: Converter, empty: nn.Module, path: Path) -> _Sorted:
    from gguf import dequantize

    found = _Sorted({}, {}, Counter(), Counter())
    layers = dict(empty.named_modules())
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        placed = _placed(tensor, convert) if kind in gguf.TYPES else None
        if placed is not None and _takes(layers.get(placed[0].removesuffix(".weight"))):
            name, rows = placed
            found.weights[name] = _weight(kind, tensor, path).select(rows)
            found.types[kind] += 1
            continue
        converted = convert(tensor.name, dequantize(tensor.data, tensor.tensor_type))
        if converted is not None:
            found.floats[converted[0]] = torch.from_numpy(np.copy(converted[1])).float()
            found.dequantized[kind] += kind not in ("F32", "F16", "BF16", "F64")
    return found._replace(dequantized=+found.dequantized)


def _takes(layer: nn.Module | None) -> bool:
    return type(layer) in (nn.Linear, nn.Embedding)


def _weight(kind: str, tensor: Any, path: Path) -> QuantizedWeight:
    try:
        return gguf.weight_of(kind, torch.from_numpy(np.copy(tensor.data)))
    except ValueError as error:
        raise LoadError(
            str(error), where=f"{path}, tensor {tensor.name} ({kind})", fix=DAMAGED
        ) from error


def _placed(tensor: Any, convert: Converter) -> tuple[str, Tensor] | None:
    """The model's name for a matrix and the order of its rows, where the model has no more changed
    than their order: tried on two columns that count the rows."""
    if len(tensor.shape) != 2:
        return None
    count = len(tensor.data)
    probe = np.stack((np.arange(count), np.arange(count) + count), 1).astype(np.float64)
    converted = convert(tensor.name, probe)
    if converted is None or converted[1].shape != probe.shape:
        return None
    rows = converted[1][:, 0]
    same = np.array_equal(np.sort(rows), probe[:, 0])
    if not same or not np.array_equal(converted[1][:, 1], rows + count):
        return None
    return converted[0], torch.from_numpy(rows.astype(np.int64))


def _lacking(empty: Any, config: Any, found: _Sorted) -> Iterator[str]:
    """Parameters of the model that the file, as it was read, has not."""
    tied = _output_name(empty) if config.tie_word_embeddings else None
    for name, _ in empty.named_parameters():
        if name not in found.weights and name not in found.floats and name != f"{tied}.weight":
            yield name


def _output_name(empty: Any) -> str | None:
    head = empty.get_output_embeddings()
    return next((n for n, m in empty.named_modules() if m is head), None) if head else None


def _modules(
    found: _Sorted, empty: Any, config: Any
) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    """Quantized layers without memory, by name, and the tensors to load into them.

    A head that is tied to a quantized embedding becomes a layer over the same tensors.
    """
    layers, weights = dict(empty.named_modules()), dict(found.weights)
    table = empty.get_input_embeddings()
    source = next((n for n, m in layers.items() if m is table), None)
    head = _output_name(empty)
    if config.tie_word_embeddings and head and f"{source}.weight" in weights:
        weights[f"{head}.weight"] = weights[f"{source}.weight"]
        config.tie_word_embeddings = False
    modules: dict[str, nn.Module] = {}
    state: dict[str, Tensor] = {}
    for name, weight in weights.items():
        place = name.removesuffix(".weight")
        state |= {f"{place}.{PREFIX}{k}": t for k, t in weight.tensors.items()}
        modules[place] = _module(weight, layers[place])
    return modules, state


def _module(weight: QuantizedWeight, old: nn.Module) -> nn.Module:
    empty = QuantizedWeight(
        weight.scheme, weight.width, *(t.to("meta") for t in weight.tensors.values())
    )
    if isinstance(old, nn.Embedding):
        return QuantizedEmbedding(empty, torch.float32)
    return QuantizedLinear(empty, old.bias)


def _share(model: Any) -> None:
    """Equal tensors of a tied head and embedding become the same."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(table, QuantizedEmbedding) and isinstance(head, QuantizedLinear):
        pairs = ((n, t, head._buffers.get(n)) for n, t in table.named_buffers())
        same = [n for n, a, b in pairs if b is not None and torch.equal(a, b)]
        if len(same) == len(table._buffers):
            for name in same:
                head._buffers[name] = table._buffers[name]
