"""The quantized layers of a Hugging Face folder, and the modules that take their places."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import LoadError
from graphopt.interchange.declared import Declared
from graphopt.interchange.layout import DAMAGED, Found, Layout, check_found
from graphopt.interchange.modules import QuantizedLinear

Headers = Mapping[str, Found]
"""Tensors of all files of weights, by name."""


class RawLinear(nn.Module):
    """Stands in a linear layer's place while tensors are loaded, under the names of the file."""

    def __init__(
        self, layer: str, layout: Layout, found: Mapping[str, Found], old: nn.Module
    ) -> None:
        super().__init__()
        self.layer, self.layout = layer, layout
        self.where = f"{next(iter(found.values())).file}, layer {layer}"
        self.outputs, self.inputs = sizes(old)
        wanted = layout.wanted(self.outputs, self.inputs)
        check_found(found, wanted, layer, layout.text)
        self.leaves = [leaf for leaf in wanted if leaf in found]
        for leaf in self.leaves:
            held = found[leaf]
            made = torch.empty(held.shape, dtype=held.dtype, device="meta")
            self.register_buffer(leaf, made)
        if "weight" not in self.leaves:
            self.weight = torch.empty(0)  # some models draw it at random, before it is loaded
        self.has_bias = getattr(old, "bias", None) is not None
        bias = old.bias if self.has_bias else self._spare_bias(found)
        self.register_parameter("bias", bias)  # type: ignore[arg-type]

    def _spare_bias(self, found: Mapping[str, Found]) -> nn.Parameter | None:
        """Some writers give every layer a bias, of zeros where the model has none."""
        if "bias" not in found:
            return None
        return nn.Parameter(torch.empty(found["bias"].shape, device="meta"), requires_grad=False)

    def finished(self, dequantize: torch.dtype | None) -> nn.Module:
        """The layer, once the tensors are there; a float one in a dtype where that is given.

        Raises:
            LoadError: the numbers in its tensors make no sense.
        """
        try:
            raw: dict[str, Tensor] = {leaf: self._buffers[leaf] for leaf in self.leaves}  # type: ignore[misc]
            made = self.layout.read(raw, self.outputs, self.inputs)
        except ValueError as error:
            raise LoadError(str(error), where=self.where, fix=DAMAGED) from error
        bias = self._bias()
        if dequantize is None:
            return QuantizedLinear(made.weight, bias, made.activations, made.order, made.static)
        numbers = made.weight.dequantize(dequantize)
        if made.order is not None:
            numbers = torch.empty_like(numbers).index_copy_(1, made.order, numbers)
        return _plain(numbers, bias)

    def _bias(self) -> nn.Parameter | None:
        if self.has_bias or self.bias is None:
            return self.bias
        if self.bias.count_nonzero():
            raise LoadError(
                "the file has a bias for a layer that has none in this model",
                where=f"{self.where}.bias",
                fix=DAMAGED,
            )
        return None


def _plain(numbers: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(numbers.shape[1], numbers.shape[0], bias=bias is not None)
    layer.weight, layer.bias = nn.Parameter(numbers), bias
    return layer


def sizes(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of an ``nn.Linear`` or of transformers' ``Conv1D``."""
    outputs, inputs = layer.weight.shape  # type: ignore[union-attr, misc]
    return (inputs, outputs) if is_conv1d(layer) else (outputs, inputs)  # type: ignore[return-value]


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' ``Conv1D``, a linear layer with its weight transposed."""
    return type(layer).__name__ == "Conv1D" and hasattr(layer, "nf")


def is_linear(layer: nn.Module) -> bool:
    """Whether a layer is one that a quantized linear layer can stand for."""
    return type(layer) is nn.Linear or is_conv1d(layer)


def planned(model: nn.Module, headers: Headers, config: Declared) -> dict[str, RawLinear]:
    """What takes the place of which module.

    Args:
        model: the model without weights, as the config alone describes it.

    Raises:
        LoadError: a quantized layer is incomplete, of wrong shapes, stored in a way that cannot be
            read, or belongs to no linear layer of the model.
    """
    layers = {name: module for name, module in model.named_modules() if is_linear(module)}
    stored = _by_layer(headers, config.leaves)
    names = dict(_matched(sorted(stored), layers))
    found: dict[str, RawLinear] = {}
    for layer, leaves in stored.items():
        layout = config.layout(layer)
        where = f"{next(iter(leaves.values())).file}, layer {layer}"
        if layout is None:
            raise LoadError(
                f"the layer holds {', '.join(leaves)}, but config.json says it is not quantized",
                where=where,
                fix=DAMAGED,
            )
        try:
            found[names[layer]] = RawLinear(layer, layout, leaves, layers[names[layer]])
        except ValueError as error:
            raise LoadError(str(error), where=where, fix=DAMAGED) from error
    return found


def _by_layer(headers: Headers, marks: Sequence[str]) -> dict[str, dict[str, Found]]:
    """The tensors of every quantized layer, by the last part of their names."""
    split: dict[str, dict[str, Found]] = {}
    for name, held in headers.items():
        layer, _, leaf = name.rpartition(".")
        split.setdefault(layer, {})[leaf] = held
    return {layer: leaves for layer, leaves in split.items() if any(m in leaves for m in marks)}


def _matched(stored: Iterable[str], layers: Mapping[str, nn.Module]) -> Iterable[tuple[str, str]]:
    """Names in the files and in the model: equal, or one is the other behind a prefix."""
    for name in stored:
        if name in layers:
            yield name, name
            continue
        near = [n for n in layers if name.endswith(f".{n}") or n.endswith(f".{name}")]
        if len(near) != 1:
            raise LoadError(
                f"the quantized layer {name:.120} is no linear layer of the model"
                + (f": {' and '.join(near[:3])} are like it" if near else ""),
                where="the weights",
                fix="layers of experts and others that transformers builds as one tensor cannot "
                "be read quantized: have the model written again without quantization",
            )
        yield name, near[0]


def finish(
    model: nn.Module, plan: Iterable[str], missing: Iterable[str], dequantize: torch.dtype | None
) -> None:
    """Put the finished layers in place, one at a time.

    Args:
        missing: names that the files turned out to lack.

    Raises:
        LoadError: a tensor of a quantized layer is missing, or its numbers make no sense.
    """
    lacking = set(missing)
    for name in plan:
        raw: Any = model.get_submodule(name)
        leaf = next((leaf for leaf in raw.leaves if f"{name}.{leaf}" in lacking), None)
        if leaf is not None:
            raise LoadError(
                f"{name}.{leaf} was not found in the weights", where=raw.where, fix=DAMAGED
            )
        model.set_submodule(name, raw.finished(dequantize))
