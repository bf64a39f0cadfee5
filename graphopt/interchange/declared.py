"""``quantization_config`` of a Hugging Face ``config.json``: how each layer is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

from graphopt.errors import LoadError
from graphopt.interchange.compressed_tensors import (
    FLOAT8,
    FORMATS,
    INTEGERS,
    MXFP4,
    NVFP4,
    PACKED,
    CompressedTensors,
)
from graphopt.interchange.gptq import BITS, Gptq
from graphopt.interchange.layout import Layout

METHODS = ("compressed-tensors", "gptq")
_AGAIN = "quantize the model again to one of int-quantized, pack-quantized or float-quantized"


class Declared(Protocol):
    """What a ``quantization_config`` says."""

    leaves: tuple[str, ...]
    """Last parts of tensor names, one of which every quantized layer has."""
    notes: list[str]

    def layout(self, name: str) -> Layout | None:
        """How the linear layer of this name is stored; None where it is not quantized.

        Raises:
            LoadError: in a way that cannot be read here.
        """


def declared(config: Mapping[str, Any], where: str) -> Declared:
    """What a ``quantization_config`` says; ``where`` is the file it stands in.

    Raises:
        LoadError: its method or format is not one that can be read, or it makes no sense.
    """
    method = str(config.get("quant_method", "")).replace("_", "-")
    if method == "gptq":
        return GptqConfig(config, where)
    if method == "compressed-tensors":
        return CompressedConfig(config, where)
    raise LoadError(
        f"the weights are quantized by {method or 'a method without a name'!r:.60}",
        where=f"{where}, quantization_config, quant_method",
        fix=f"{' and '.join(METHODS)} can be read; write the model again without quantization",
    )


class GptqConfig:
    """The config that AutoGPTQ, GPTQModel and optimum write."""

    leaves: tuple[str, ...] = ("qweight",)

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where, self.notes = f"{where}, quantization_config", list[str]()
        form = config.get("checkpoint_format") or "gptq"
        form = "marlin" if config.get("is_marlin_format") else form
        if form not in ("gptq", "gptq_v2"):
            raise self._error(
                f"GPTQ weights in the format {form!r:.40}, made for one kernel, cannot be read",
                "get the model in checkpoint_format gptq or gptq_v2",
            )
        if config.get("pack_dtype", "int32") not in ("int32", "torch.int32"):
            raise self._error("GPTQ codes are packed in int32, not as pack_dtype says", None)
        self.base, self.less_one = config, form == "gptq"
        self.rules = config.get("dynamic") or {}
        if not isinstance(self.rules, Mapping):
            raise self._error("`dynamic` is no mapping of patterns", None)

    def layout(self, name: str) -> Gptq | None:
        chosen: dict[str, Any] = dict(self.base)
        for pattern, changes in self.rules.items():
            if _matches(pattern.removeprefix("-:").removeprefix("+:"), name, self.where):
                if pattern.startswith("-:"):
                    return None
                chosen |= changes
                break
        bits, size = chosen.get("bits"), chosen.get("group_size", -1)
        if bits not in BITS:
            raise self._error(f"GPTQ has 2, 3, 4 or 8 bits, not {bits!r:.20}", None)
        if type(size) is not int or not (size == -1 or size > 0):
            raise self._error(f"group_size is {size!r:.20}; it is positive, or -1", None)
        return Gptq(bits, None if size == -1 else size, self.less_one)

    def _error(self, what: str, fix: str | None) -> LoadError:
        return LoadError(what, where=self.where, fix=fix or "correct config.json")


class CompressedConfig:
    """The config that compressed-tensors writes: groups of layers, each with arguments."""

    leaves: tuple[str, ...] = ("weight_packed", "weight_scale")

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.where, self.notes = f"{where}, quantization_config", list[str]()
        self.ignore = [str(name) for name in config.get("ignore") or ()]
        self.format = config.get("format") or "dense"
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise self._error("compressed-tensors without config_groups", "correct config.json")
        self.groups = list(groups.values())
        if config.get("transform_config"):
            raise self._error(
                "weights behind transforms (rotations) cannot be read",
                "quantize the model again without transforms",
            )
        if ((config.get("sparsity_config") or {}).get("format") or "dense") != "dense":
            raise self._error("compressed sparse weights cannot be read", _AGAIN)
        if config.get("kv_cache_scheme"):
            self.notes.append("the quantized cache of keys and values is not used")

    def layout(self, name: str) -> CompressedTensors | None:
        if any(self._is(name, pattern) for pattern in self.ignore):
            return None
        named = (g for g in self.groups if any(self._is(name, t) for t in g.get("targets") or ()))
        classes = (g for g in self.groups if "Linear" in (g.get("targets") or ()))
        group = next(named, None) or next(classes, None)
        return None if group is None or not group.get("weights") else self._read(group)

    def _is(self, name: str, pattern: str) -> bool:
        if pattern.startswith("re:"):
            return _matches(pattern.removeprefix("re:"), name, self.where)
        return pattern == name

    def _read(self, group: Mapping[str, Any]) -> CompressedTensors:
        weights, form = group["weights"], group.get("format") or self.format
        bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
        strategy, size = weights.get("strategy"), weights.get("group_size")
        strategy = strategy or ("group" if size and size > 0 else "channel" if size else "tensor")
        if form == "naive-quantized":
            form = INTEGERS if kind == "int" else FLOAT8
        fits = form in (FLOAT8,) and kind == "float" and bits == 8
        fits |= form in (NVFP4, MXFP4) and kind == "float" and bits == 4
        fits |= form in (PACKED, INTEGERS) and kind == "int" and bits in range(1, 9)
        if form not in FORMATS or not fits:
            what = f"compressed-tensors {form!r:.40} of {bits} bits {kind} cannot be read"
            raise self._error(what, _AGAIN)
        if strategy not in ("tensor", "channel", "group", "tensor_group"):
            raise self._error(f"scales per {strategy!r:.40} cannot be read", _AGAIN)
        if strategy in ("group", "tensor_group") and not (type(size) is int and size > 0):
            raise self._error(f"group_size is {size!r:.20}; it is positive", "correct config.json")
        return CompressedTensors(
            form,
            bits,
            size if "group" in strategy else None,
            bool(weights.get("symmetric", True)),
            strategy == "tensor",
            self._activations(group.get("input_activations"), form),
            not (group.get("input_activations") or {}).get("symmetric", True),
        )

    def _activations(self, given: Mapping[str, Any] | None, form: str) -> str:
        if not given:
            return "none"
        if form in (NVFP4, MXFP4):
            self._note("activations in 4 bits are left as they are: weights alone are quantized")
            return "none"
        kind, bits, strategy = (given.get(k) for k in ("type", "num_bits", "strategy"))
        fits = (kind or "int") == ("float" if form == FLOAT8 else "int") and (bits or 8) == 8
        if given.get("dynamic") is False and fits and strategy == "tensor" and form != FLOAT8:
            return "static"
        if given.get("dynamic") is not True or not fits or strategy not in ("token", "tensor"):
            how = "dynamic" if given.get("dynamic") else "static"
            raise self._error(
                f"activations of {bits} bits {kind}, {how}, per {strategy}, cannot be computed",
                "quantize the model again with int8 activations, dynamic per token or static per "
                "tensor, or weights alone",
            )
        if strategy == "tensor":
            self._note("activations are quantized per token, finer than per tensor as stored")
        return "dynamic"

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _error(self, what: str, fix: str) -> LoadError:
        return LoadError(what, where=self.where, fix=fix)


def _matches(pattern: str, name: str, where: str) -> bool:
    try:
        return re.match(pattern, name) is not None
    except re.error as error:
        raise LoadError(f"{pattern!r:.80} is no pattern: {error}", where=where) from error
