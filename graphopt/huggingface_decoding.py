"""A Hugging Face causal language model called with a cache: example inputs, names in a file."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt import huggingface
from graphopt.capture_errors import first_line
from graphopt.errors import CaptureError
from graphopt.huggingface_caches import CACHE_ARGUMENTS, PAST, PRESENT
from graphopt.huggingface_inputs import SENTENCES, random_tokens
from graphopt.inputs import Inputs

TOKENS, LENGTH = 4, 16
"""Tokens of the example call, and how many stand in it together with those of the cache."""

WITHOUT = "--format onnx writes the model without a cache"


@dataclass(frozen=True)
class Decoding:
    """A call of a model on some tokens behind others, whose keys and values are in a cache.

    Attributes:
        inputs: ``input_ids`` ``(batch, tokens)``, ``attention_mask`` ``(batch, seen)``,
            ``position_ids`` ``(batch, tokens)`` where the model takes it, and the cache, with keys
            and values ``(batch, heads, past, width)``.
        input_names: what a file calls the tensors of the inputs, in their flat order.
        output_names: the same of the outputs.
    """

    inputs: Inputs
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]


def decoding(model: nn.Module, tokenizer: Callable[..., Any] | None = None) -> Decoding:
    """The call that a file for prompts and tokens alike is made from; batch and lengths dynamic.

    The cache holds every position, also of layers that attend to a window: their masks hide what
    is out of it, and the file needs no other graph once the window is full.

    Raises:
        CaptureError: the model is no causal language model, or keeps something else than keys and
            values of positions.
    """
    argument = cache_argument(model)
    refuse_other_caches(model)
    huggingface.register_caches([model])
    ids, mask = _tokens(model, tokenizer)
    values = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        values["position_ids"] = positions_of(mask)
    past = ids.shape[1] - TOKENS
    cache = _cache_of(model, argument, {k: v[:, :past] for k, v in values.items()})
    kwargs: dict[str, Any] = {
        k: v if k == "attention_mask" else v[:, past:].contiguous() for k, v in values.items()
    }
    axes = {k: {0: "batch", 1: "seen" if "mask" in k else "tokens"} for k in kwargs}
    leaves = pytree.tree_leaves(cache)
    dynamic: dict[str, Any] = {**axes, argument: [{0: "batch", 2: "past"}] * len(leaves)}
    named = _names(leaves, cache, PAST, model)
    outputs = _output_names(model, {**kwargs, argument: copy.deepcopy(cache)})
    inputs = Inputs({**kwargs, argument: cache, "use_cache": True}, dynamic)
    return Decoding(inputs, (*kwargs, *named), outputs)


def whole_sequences(example: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    """A decoding call like the example, of whole sequences ``(B, S)``.

    They stand behind one position that is masked, as if they were padded on their left: the
    program of a cache has at least one.
    """
    rows, length = ids.shape
    seen = torch.cat([ids.new_zeros(rows, 1), ids.new_ones(rows, length)], 1)
    kwargs = {**example, "input_ids": ids, "attention_mask": seen}
    if "position_ids" in example:
        kwargs["position_ids"] = torch.arange(length).expand(rows, length).contiguous()
    for name in CACHE_ARGUMENTS:
        if name in example:
            kwargs[name] = copy.deepcopy(example[name])
            for layer in kwargs[name].layers:
                layer.keys = _one_position(layer.keys, rows)
                layer.values = _one_position(layer.values, rows)
    return kwargs


def _one_position(tensor: Tensor, rows: int) -> Tensor:
    """The first position of the first row, for all rows: ``(B, heads, 1, width)``."""
    return tensor[:1, :, :1].repeat(rows, 1, 1, 1)


def is_causal(model: nn.Module) -> bool:
    """Whether the model makes text, token by token, from tokens alone."""
    able = getattr(model, "can_generate", None)
    names = inspect.signature(model.forward).parameters
    return bool(able and able()) and "input_ids" in names and not _is_encoder_decoder(model)


def cache_argument(model: nn.Module) -> str:
    """What the model calls its cache.

    Raises:
        CaptureError: it is no causal language model, or has no cache of keys and values.
    """
    names = inspect.signature(model.forward).parameters
    found = next((name for name in CACHE_ARGUMENTS if name in names), None)
    if not is_causal(model):
        what = "an encoder and a decoder" if _is_encoder_decoder(model) else "no language model"
        raise CaptureError(
            f"{type(model).__name__} is {what}, and not one decoder that generates text",
            where="config.json, architectures",
            fix=WITHOUT,
        )
    if any(name in names for name in ("pixel_values", "input_features", "input_values")):
        raise CaptureError(
            f"{type(model).__name__} reads images or sounds besides tokens",
            where="config.json, architectures",
            fix="export its language model as a folder of its own",
        )
    if found is None or getattr(model, "_is_stateful", False):
        raise CaptureError(
            f"{type(model).__name__} keeps a state, and no keys and values of positions",
            where="config.json, architectures",
            fix=WITHOUT,
        )
    return found


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(model.config, "is_encoder_decoder", False))


def refuse_other_caches(model: nn.Module) -> None:
    """Refuse a model some of whose layers cache no keys and values of positions.

    Raises:
        CaptureError: names the kind of layer, such as that of linear attention.
    """
    caches = importlib.import_module("transformers.cache_utils")
    text = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    for layer in caches.DynamicCache(config=text).layers:
        _refuse_layer(layer, (caches.DynamicLayer, caches.DynamicSlidingWindowLayer), model)


def _refuse_layer(layer: Any, allowed: Sequence[type], model: nn.Module) -> None:
    if type(layer) not in allowed:
        raise CaptureError(
            f"a layer of {type(model).__name__} keeps a {type(layer).__name__}, and no keys and "
            "values of every position",
            where="config.json, layer_types",
            fix=WITHOUT,
        )


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token among those that ``mask`` ``(B, S)`` shows; 0 of padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def _tokens(model: nn.Module, tokenizer: Callable[..., Any] | None) -> tuple[Tensor, Tensor]:
    """Two rows of ``(2, LENGTH)`` tokens, and their mask: the second is padded on its left."""
    ids = random_tokens(model.config, (2, LENGTH))
    if tokenizer is not None:
        for row, text in enumerate(SENTENCES):
            found = torch.as_tensor(tokenizer(text)["input_ids"])[:LENGTH]
            ids[row, LENGTH - len(found) :] = found
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return ids, mask


def _cache_of(model: nn.Module, argument: str, values: dict[str, Tensor]) -> Any:
    """A cache of these tokens, with all of their positions in every layer."""
    caches = importlib.import_module("transformers.cache_utils")
    cache = caches.DynamicCache()
    _called(model, {**values, argument: cache})
    for layer in cache.layers:
        _refuse_layer(layer, (caches.DynamicLayer,), model)
    return cache


def _called(model: nn.Module, kwargs: dict[str, Any]) -> Any:
    """What the model gives, with a cache in it.

    Raises:
        CaptureError: the call fails, or no keys and values come back.
    """
    try:
        with torch.no_grad():
            output = model(**kwargs, use_cache=True)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} fails on tokens with a cache: {first_line(error)}", fix=WITHOUT
        ) from error
    found = (output.get(name) for name in CACHE_ARGUMENTS)
    if not any(getattr(cache, "layers", None) for cache in found if cache is not None):
        raise CaptureError(
            f"{type(model).__name__} gives no keys and values of its tokens",
            where="config.json, is_decoder",
            fix=WITHOUT,
        )
    return output


def _output_names(model: nn.Module, kwargs: dict[str, Any]) -> tuple[str, ...]:
    """In the order in which capture takes the output apart: logits first, then the cache."""
    output = _called(model, kwargs)
    cache = next(output[name] for name in CACHE_ARGUMENTS if output.get(name) is not None)
    leaves = pytree.tree_leaves(output)
    kept = {id(leaf) for leaf in pytree.tree_leaves(cache)}
    other = [key for key, value in output.items() if isinstance(value, Tensor)]
    names = iter(_names([leaf for leaf in leaves if id(leaf) in kept], cache, PRESENT, model))
    rest = iter(other)
    return tuple(next(names) if id(leaf) in kept else next(rest) for leaf in leaves)


def _names(leaves: Sequence[Any], cache: Any, prefix: str, model: nn.Module) -> list[str]:
    """``PREFIX.LAYER.key`` and ``.value`` of the tensors of a cache, in their flat order."""
    known = {}
    for index, layer in enumerate(cache.layers):
        known[id(layer.keys)] = f"{prefix}.{index}.key"
        known[id(layer.values)] = f"{prefix}.{index}.value"
    if strange := [leaf for leaf in leaves if id(leaf) not in known]:
        shape = list(getattr(strange[0], "shape", ()))
        raise CaptureError(
            f"the cache of {type(model).__name__} has a tensor {shape} besides keys and values",
            fix=WITHOUT,
        )
    return [known[id(leaf)] for leaf in leaves]
