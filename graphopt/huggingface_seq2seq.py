"""A Hugging Face encoder and decoder as the three calls that files are made from.

The encoder reads the source once. The decoder reads its first tokens beside the encoder's states,
and gives keys and values of both; from then on it reads tokens beside those. Files and tensors have
the names of optimum (``optimum/exporters/onnx/base.py``, ``OnnxSeq2SeqConfigWithPast``).
"""

from __future__ import annotations

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
from graphopt.huggingface_caches import CACHE_ARGUMENTS, PAST, PRESENT, filled_layer
from graphopt.huggingface_decoding import WITHOUT
from graphopt.huggingface_inputs import huggingface_inputs, random_tokens
from graphopt.inputs import Inputs

ENCODER = "encoder_model.onnx"
DECODER = "decoder_model.onnx"
WITH_PAST = "decoder_with_past_model.onnx"

PAST_TOKENS, TOKENS, PADDING = 5, 3, 3
"""Of the example call: tokens in the cache, tokens behind them, padding of the source."""
MAIN_INPUTS = ("input_ids", "input_features")
"""What encoders read that have such files."""
KINDS = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
"""Tensors of a layer in their order: of tokens, then of the encoder's states."""


@dataclass(frozen=True)
class Part:
    """One of the files: what it is made from, and how that is called.

    Attributes:
        file: its name.
        names: what it calls the tensors of the inputs, and of the outputs, in their flat order;
            ``None`` keeps those of the module.
    """

    file: str
    module: nn.Module
    inputs: Inputs
    names: tuple[tuple[str, ...], tuple[str, ...]] | None = None


class Encoder(nn.Module):
    """``last_hidden_state`` ``(B, S, E)`` of the source."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder, self.training = model.get_encoder(), model.training

    def forward(self, **values: Tensor) -> Tensor:
        states: Tensor = self.encoder(**values)[0]
        return states


class Decoder(nn.Module):
    """Logits ``(B, T, V)`` of the first tokens, and four keys and values of each layer.

    Those of tokens are ``(B, heads, T, width)``, those of the encoder's states
    ``(B, heads, S, width)``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    def forward(
        self,
        input_ids: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        output = _decoded(self.model, input_ids, encoder_hidden_states, encoder_attention_mask)
        return output.logits, *(t for layer in layers_of(output) for t in layer)


class DecoderWithPast(nn.Module):
    """Logits ``(B, T, V)`` of tokens behind others, and keys and values of both.

    The encoder's states are not read again: their keys and values are in ``past``, which has for
    each layer a cache with two layers of its own, of tokens and of the encoder's states.
    """

    def __init__(self, model: nn.Module, states: int) -> None:
        super().__init__()
        self.model, self.states, self.training = model, states, model.training

    def forward(
        self,
        input_ids: Tensor,
        encoder_attention_mask: Tensor | None = None,
        past: Sequence[Any] = (),
    ) -> tuple[Tensor, ...]:
        caches = importlib.import_module("transformers.cache_utils")
        both = [caches.DynamicCache(), caches.DynamicCache()]
        for layer in past:
            for cache, kept in zip(both, layer.layers, strict=True):
                cache.layers.append(filled_layer(kept.keys, kept.values))
        keys = past[0].layers[1].keys
        read = keys.new_zeros(keys.shape[0], keys.shape[2], self.states)
        output = _decoded(
            self.model, input_ids, read, encoder_attention_mask, caches.EncoderDecoderCache(*both)
        )
        return output.logits, *(t for layer in layers_of(output) for t in layer[:2])


def seq2seq_parts(model: nn.Module, tokenizer: Callable[..., Any] | None = None) -> list[Part]:
    """The encoder, the decoder, and the decoder with a cache; batch and lengths are dynamic.

    Raises:
        CaptureError: the model reads something else than tokens or Whisper's features, or keeps
            something else than keys and values of every position.
    """
    source = _source(model, tokenizer)
    encoder = Encoder(model)
    states = _called(model, lambda: encoder(**source.kwargs))
    mask = {"encoder_attention_mask": source.kwargs["attention_mask"]} if _masks(model) else {}
    tokens = _tokens(model, states.shape[0])
    first, rest = tokens[:, :PAST_TOKENS].contiguous(), tokens[:, PAST_TOKENS:].contiguous()
    layers = _layers(model, first, states, mask)
    start = {"input_ids": first, "encoder_hidden_states": states, **mask}
    names = tuple(f"{index}.{kind}" for index in range(len(layers)) for kind in KINDS)
    presents = tuple(f"{PRESENT}.{name}" for name in names)
    past = [_one_cache(layer) for layer in layers]
    return [
        Part(ENCODER, encoder, source, (tuple(source.kwargs), ("last_hidden_state",))),
        Part(
            DECODER,
            Decoder(model),
            Inputs(start, {name: _axes(name) for name in start}),
            (tuple(start), ("logits", *presents)),
        ),
        Part(
            WITH_PAST,
            DecoderWithPast(model, states.shape[-1]),
            _behind(rest, mask, past),
            (
                ("input_ids", *mask, *_past_names(model, past)),
                ("logits", *(name for name in presents if ".decoder." in name)),
            ),
        ),
    ]


def layers_of(output: Any) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Keys and values of each layer, of tokens and then of the encoder's states."""
    cache = next(c for c in (getattr(output, n, None) for n in CACHE_ARGUMENTS) if c is not None)
    pairs = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    return [(own.keys, own.values, other.keys, other.values) for own, other in pairs]


def _decoded(
    model: Any, ids: Tensor, states: Tensor, mask: Tensor | None, cache: Any = None
) -> Any:
    outputs = importlib.import_module("transformers.modeling_outputs")
    names = inspect.signature(model.forward).parameters
    argument = next(name for name in CACHE_ARGUMENTS if name in names)
    return model(
        decoder_input_ids=ids,
        attention_mask=mask,
        encoder_outputs=outputs.BaseModelOutput(last_hidden_state=states),
        use_cache=True,
        return_dict=True,
        **{argument: cache},
    )


def _source(model: nn.Module, tokenizer: Callable[..., Any] | None) -> Inputs:
    """What the encoder reads; the last row of a text is padded on its right."""
    main = getattr(model, "main_input_name", "input_ids")
    _check_source(model, main)
    found = huggingface_inputs(model, tokenizer)
    if main != "input_ids":
        return Inputs({main: found.kwargs[main]}, {main: found.dynamic[main]})
    mask = found.kwargs["attention_mask"].clone()
    mask[-1, -PADDING:] = 0
    kwargs = {main: found.kwargs[main], "attention_mask": mask}
    return Inputs(kwargs, {name: {0: "batch", 1: "source"} for name in kwargs})


def _check_source(model: nn.Module, main: str) -> None:
    names = inspect.signature(model.forward).parameters
    told = ""
    if main not in MAIN_INPUTS or "decoder_input_ids" not in names:
        told = f"reads {main}, and such folders are for {' or '.join(MAIN_INPUTS)}"
    elif main != "input_ids" and _masks(model):
        told = "reads sounds with a mask, which its encoder makes shorter"
    if told:
        raise CaptureError(
            f"{type(model).__name__} {told}",
            where="config.json, architectures",
            fix="--format onnx writes the whole as one file without a cache",
        )


def _masks(model: Any) -> bool:
    """Whether the decoder is told which of the encoder's states are padding."""
    return "encoder_attention_mask" in inspect.signature(model.get_decoder().forward).parameters


def _tokens(model: Any, rows: int) -> Tensor:
    """``(rows, PAST_TOKENS + TOKENS)`` tokens, the first of which starts a text."""
    ids = random_tokens(model.config, (rows, PAST_TOKENS + TOKENS))
    start = getattr(model.generation_config, "decoder_start_token_id", None)
    ids[:, 0] = start if isinstance(start, int) else 0
    return ids


def _layers(
    model: nn.Module, ids: Tensor, states: Tensor, mask: Mapping[str, Tensor]
) -> list[tuple[Tensor, ...]]:
    """Keys and values behind these tokens, in every layer.

    Raises:
        CaptureError: the model keeps something else.
    """
    caches = importlib.import_module("transformers.cache_utils")
    output = _called(
        model, lambda: _decoded(model, ids, states, mask.get("encoder_attention_mask"))
    )
    found = [c for c in (getattr(output, n, None) for n in CACHE_ARGUMENTS) if c is not None]
    kept: Any = found[0] if found else None
    parts = (
        (kept.self_attention_cache, kept.cross_attention_cache)
        if type(kept) is caches.EncoderDecoderCache
        else ()
    )
    kinds = {type(layer).__name__ for part in parts for layer in part.layers}
    if kinds != {"DynamicLayer"}:
        told = ", ".join(sorted(kinds)) or type(kept).__name__
        raise CaptureError(
            f"{type(model).__name__} keeps a {told}, and no keys and values of tokens and of the "
            "encoder's states",
            where="config.json, architectures",
            fix=WITHOUT,
        )
    return list(layers_of(output))


def _called(model: nn.Module, call: Callable[[], Any]) -> Any:
    try:
        with torch.no_grad():
            return call()
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be called as an encoder and a decoder by themselves: "
            f"{first_line(error)}",
            fix=WITHOUT,
        ) from error


def _one_cache(layer: Sequence[Tensor]) -> Any:
    cache = importlib.import_module("transformers.cache_utils").DynamicCache()
    cache.layers = [filled_layer(*layer[:2]), filled_layer(*layer[2:])]
    return cache


def _behind(ids: Tensor, mask: dict[str, Tensor], past: list[Any]) -> Inputs:
    kwargs = {"input_ids": ids, **mask}
    axes: dict[str, Any] = {name: _axes(name) for name in kwargs}
    own, other = {0: "batch", 2: "past"}, {0: "batch", 2: "source"}
    axes["past"] = [[own, own, other, other]] * len(past)
    return Inputs({**kwargs, "past": past}, axes)


def _axes(name: str) -> dict[int, str]:
    return {0: "batch", 1: "tokens" if name == "input_ids" else "source"}


def _past_names(model: nn.Module, past: Sequence[Any]) -> list[str]:
    """``past_key_values.LAYER.decoder.key`` and so on of all tensors, in their flat order."""
    huggingface.register_caches([model])
    known: dict[int, str] = {}
    for index, cache in enumerate(past):
        tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        known |= {id(t): f"{PAST}.{index}.{k}" for t, k in zip(tensors, KINDS, strict=True)}
    return [known[id(leaf)] for leaf in pytree.tree_leaves(list(past))]
