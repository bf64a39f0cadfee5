"""The tensors and the ``quantization_config`` of a folder in a format of other tools."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from graphopt.errors import ExportError
from graphopt.interchange import compressed_tensors, gptq
from graphopt.interchange.compressed_tensors import FLOAT8, MXFP4, NVFP4, CompressedTensors
from graphopt.interchange.folder import is_conv1d, is_linear
from graphopt.interchange.gptq import Gptq
from graphopt.interchange.recover import Product

FORMATS = ("compressed-tensors", "gptq")


class Written(NamedTuple):
    """Tensors by name, without the biases, and what goes into ``config.json``."""

    tensors: dict[str, Tensor]
    config: dict[str, Any]


def refusal(name: str, product: Product, layer: nn.Module, form: str) -> str | None:
    """Why a format cannot hold a layer, or None."""
    if form == "gptq":
        return gptq.refusal(product.weight, product.activations)
    if is_conv1d(layer):
        return f"compressed-tensors has no layers of the kind Conv1D, which {name} is"
    if product.order is not None:
        return f"compressed-tensors has no order of inputs, which {name} has (desc_act)"
    return compressed_tensors.refusal(product.weight)


def written(products: Mapping[str, Product], model: nn.Module, form: str) -> Written:
    """Quantized layers in a format.

    Raises:
        ExportError: the format cannot hold one; says which one can.
    """
    layers = dict(model.named_modules())
    for name, product in products.items():
        reason = refusal(name, product, layers[name], form)
        if reason is not None:
            others = [f for f in FORMATS if not refusal(name, product, layers[name], f)]
            fix = f"write it as {others[0]}" if others else _fix(product)
            raise ExportError(reason, where=name, fix=fix)
    plain = [n for n, m in layers.items() if is_linear(m) and n not in products]
    if form == "gptq":
        return _gptq(products, plain, model)
    return _compressed(products, plain)


def _fix(product: Product) -> str:
    if product.weight.zeros is not None:
        return "QuantizeMatmul(symmetric=True); weights read from a file: dequantize them first"
    return "QuantizeMatmul with dtype int, fp8, nvfp4 or mxfp4; graphopt.save holds any scheme"


def _compressed(products: Mapping[str, Product], plain: Iterable[str]) -> Written:
    tensors: dict[str, Tensor] = {}
    kinds: dict[CompressedTensors, list[str]] = {}
    for name, product in products.items():
        made, layout = compressed_tensors.written(
            product.weight, product.activations, product.static
        )
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in made.items()}
        kinds.setdefault(layout, []).append(name)
    groups = {
        f"group_{i}": _group(layout, ["Linear"] if len(kinds) == 1 else names)
        for i, (layout, names) in enumerate(kinds.items())
    }
    formats = {layout.format for layout in kinds}
    config = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(plain),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    return Written(tensors, config)


def _group(layout: CompressedTensors, targets: list[str]) -> dict[str, Any]:
    is_float = layout.format in (FLOAT8, NVFP4, MXFP4)
    kind = "float" if is_float else "int"
    strategy = "group" if layout.group_size else "channel"
    weights = {
        "num_bits": layout.bits,
        "type": kind,
        "symmetric": layout.symmetric,
        "strategy": "tensor_group" if layout.format == NVFP4 else strategy,
        "group_size": layout.group_size,
        "dynamic": False,
    }
    if layout.format == NVFP4:
        weights["scale_dtype"] = "torch.float8_e4m3fn"
    if layout.format == MXFP4:
        weights["scale_dtype"] = "torch.uint8"
    is_dynamic = layout.activations == "dynamic"
    activations = {
        "num_bits": 8,
        "type": kind,
        "symmetric": is_dynamic,
        "strategy": "token" if is_dynamic else "tensor",
        "dynamic": is_dynamic,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": activations if layout.activations != "none" else None,
        "output_activations": None,
        "format": layout.format,
    }


def _gptq(products: Mapping[str, Product], plain: Iterable[str], model: Any) -> Written:
    tensors: dict[str, Tensor] = {}
    layouts: dict[str, Gptq] = {}
    less_one = _less_one(products)
    for name, product in products.items():
        made, layouts[name] = gptq.written(product.weight, product.order, less_one=less_one)
        tensors |= {f"{name}.{leaf}": tensor for leaf, tensor in made.items()}
    chosen = list(layouts.values())
    most = max(dict.fromkeys(chosen), key=chosen.count)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    is_head = head is not None and any(m is head for n, m in model.named_modules() if n in products)
    rules: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in sorted(plain)}
    for name, layout in layouts.items():
        if layout != most:
            changes = {"bits": layout.bits, "group_size": layout.group_size or -1}
            rules[f"+:^{re.escape(name)}$"] = changes
    config = {
        "quant_method": "gptq",
        "bits": most.bits,
        "group_size": most.group_size or -1,
        "sym": all(p.weight.zeros is None for p in products.values()),
        "desc_act": any(p.order is not None for p in products.values()),
        "lm_head": is_head,
        "checkpoint_format": "gptq" if less_one else "gptq_v2",
        "pack_dtype": "int32",
    }
    return Written(tensors, config | ({"dynamic": rules} if rules else {}))


def _less_one(products: Mapping[str, Product]) -> bool:
    """Whether zeros can be stored less one: none is 0, counted from the smallest code."""
    zeros = ((p.weight.zeros, p.weight.scheme.limits[0]) for p in products.values())
    return not any(z is not None and bool((z == low).any()) for z, low in zeros)
