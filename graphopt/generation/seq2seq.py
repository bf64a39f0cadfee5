"""An encoder and a decoder in three files: of the source, of first tokens, and of those behind."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from graphopt.errors import GraphoptError, LoadError
from graphopt.generation.files import (
    FIELD,
    OnnxFile,
    OnnxModel,
    check_names,
    started_layers,
)
from graphopt.huggingface_caches import PAST, PRESENT, filled_layer
from graphopt.huggingface_seq2seq import (
    DECODER,
    ENCODER,
    KINDS,
    MAIN_INPUTS,
    WITH_PAST,
)

MASK, STATES = "encoder_attention_mask", "encoder_hidden_states"
FRAMES = 2
"""Of a sound that become one state, in Whisper."""
POSITIONS = "cache_position"
"""What files of optimum take besides, where a model of its time did."""


class OnnxEncoder(nn.Module):
    """The encoder's file, as ``generate`` calls encoders."""

    def __init__(self, file: OnnxFile) -> None:
        super().__init__()
        self._file = file
        found = [name for name in MAIN_INPUTS if name in file.inputs]
        self.main_input_name = found[0] if found else MAIN_INPUTS[0]
        what = "the source of a text"
        check_names(file, [self.main_input_name], ["last_hidden_state"], what, ["attention_mask"])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_features: Tensor | None = None,
        return_dict: bool = True,
        **asked: Any,
    ) -> Any:
        """``BaseModelOutput`` with ``last_hidden_state`` ``(B, S, E)``.

        Args:
            input_ids: ``(B, S)`` int64, or ``input_features`` ``(B, bins, frames)``.
            attention_mask: ``(B, S)`` of zeros and ones; default: all is seen.
            return_dict: if not, a tuple is given.

        Raises:
            GraphoptError: attentions or hidden states are asked for, which the file does not give.
        """
        if found := sorted(name for name, value in asked.items() if value):
            raise GraphoptError(
                f"an ONNX file gives last_hidden_state alone, and nothing for {found[0]}",
                where=found[0],
                fix="leave it out",
            )
        main = input_ids if self.main_input_name == "input_ids" else input_features
        if main is None:
            raise GraphoptError(
                f"the encoder reads {self.main_input_name}, and none was given",
                where=self.main_input_name,
                fix=f"give {self.main_input_name}=, or encoder_outputs=",
            )
        values = {self.main_input_name: main}
        if self.main_input_name == "input_ids":
            mask = torch.ones_like(main) if attention_mask is None else attention_mask
            values["attention_mask"] = mask.to(torch.int64)
        else:
            values[self.main_input_name] = main.to(self._file.dtype(self.main_input_name))
        length = main.shape[1] if self.main_input_name == "input_ids" else main.shape[2] // FRAMES
        shape = (main.shape[0], length, self._file.outputs["last_hidden_state"].shape[2])
        made = self._file.run(values, {"last_hidden_state": shape})
        output = BaseModelOutput(last_hidden_state=made["last_hidden_state"])
        return output if return_dict else output.to_tuple()


class OnnxSeq2SeqLM(OnnxModel):
    """An encoder and a decoder of text in ONNX files, on the CPU (T5, BART, Marian).

    ``generate`` is that of transformers with its options, as for `OnnxCausalLM`; sources may be
    padded, with their ``attention_mask``.

    Args:
        folder: with ``encoder_model.onnx``, ``decoder_model.onnx``,
            ``decoder_with_past_model.onnx`` and ``config.json``, such as
            `graphopt.export_onnx_folder` or optimum writes it.
        threads: that an operator may use; by default as many as torch.

    Attributes:
        config: of transformers.
        generation_config: its defaults for ``generate``.
        encoder: called by itself, gives ``encoder_outputs`` that many texts can begin with.

    Raises:
        LoadError: the folder is not complete, or its files take and give other tensors.
        MissingDependencyError: onnxruntime is not installed.
    """

    main_input_name = "input_ids"

    def __init__(self, folder: str | os.PathLike[str], *, threads: int | None = None) -> None:
        super().__init__(folder, [ENCODER, DECODER, WITH_PAST])
        place = Path(folder)
        self.encoder = OnnxEncoder(OnnxFile(place / ENCODER, threads))
        if self.encoder.main_input_name != self.main_input_name:
            raise LoadError(
                f"the encoder reads {self.encoder.main_input_name}, not {self.main_input_name}",
                where=str(place / ENCODER),
                fix="graphopt.generation.load_onnx(folder) takes the class that fits",
            )
        self._first = OnnxFile(place / DECODER, threads)
        self._behind = OnnxFile(place / WITH_PAST, threads)
        self._layers = _layers(self._first, self._behind)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._behind.dtype(f"{PAST}.0.{KINDS[0]}")

    def get_encoder(self, *_args: Any, **_kwargs: Any) -> Any:
        """The encoder, as ``generate`` asks for it."""
        return self.encoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        input_features: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Logits of tokens, and the cache with keys and values of them and of the source.

        Args:
            input_ids: ``(B, S)`` int64 of the source, unless ``encoder_outputs`` are given;
                ``input_features`` ``(B, bins, frames)`` of a sound.
            attention_mask: ``(B, S)`` of zeros and ones, of the source; default: all is seen.
            decoder_input_ids: ``(B, T)`` int64, behind what is in the cache.
            decoder_attention_mask: the files take none; of ones alone it says nothing.
            encoder_outputs: ``BaseModelOutput`` with ``last_hidden_state`` ``(B, S, E)``.
            cache: a ``transformers.EncoderDecoderCache`` of two ``DynamicCache``, which is written;
                ``past_key_values`` is the same.
            use_cache: whether the output has a cache.
            return_dict: if not, a tuple is given.

        Returns:
            ``Seq2SeqLMOutput`` with ``logits`` ``(B, T, V)``.

        Raises:
            GraphoptError: a cache of another kind, or tokens that a mask hides.
        """
        if decoder_input_ids is None:
            raise GraphoptError(
                "no tokens were given to decode",
                where="decoder_input_ids",
                fix="give the first token of a text, config.decoder_start_token_id, or call "
                "generate",
            )
        given = cache if cache is not None else past_key_values
        past = self._past(given, decoder_input_ids.shape[0])
        _check_all_seen(decoder_attention_mask)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, input_features)
        states = encoder_outputs[0]
        values = {"input_ids": decoder_input_ids, STATES: states.to(self._first.dtype(STATES))}
        if MASK in self._first.inputs:
            seen = states.new_ones(states.shape[:2]) if attention_mask is None else attention_mask
            values[MASK] = seen.to(torch.int64)
        wants = use_cache is not False or given is not None
        logits, present = self._run(values, past, wants=wants)
        kept = {FIELD: self._kept(given, present)} if wants else {}
        output = Seq2SeqLMOutput(logits=logits, encoder_last_hidden_state=states, **kept)
        return output if return_dict else output.to_tuple()

    def _past(self, cache: Any, rows: int) -> list[Tensor]:
        """Four keys and values of the layers in turn; none before the first tokens."""
        if cache is not None and type(cache) is not EncoderDecoderCache:
            raise GraphoptError(
                f"a {type(cache).__name__} cannot be the cache of an encoder and a decoder",
                where="cache",
                fix="give transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())",
            )
        own = started_layers(getattr(cache, "self_attention_cache", None))
        other = started_layers(getattr(cache, "cross_attention_cache", None))
        if not own or own[0].keys.shape[2] == 0:
            return []
        count = len(self._layers) // len(KINDS)
        if not len(own) == len(other) == count or own[0].keys.shape[0] != rows:
            raise GraphoptError(
                f"the cache has {len(own)} and {len(other)} layers of {own[0].keys.shape[0]} rows, "
                f"the file {count}, and the input {rows} rows",
                where="cache",
                fix="start with cache=None",
            )
        pairs = zip(own, other, strict=True)
        return [t for a, b in pairs for t in (a.keys, a.values, b.keys, b.values)]

    def _run(
        self, values: dict[str, Tensor], past: Sequence[Tensor], *, wants: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """One run of the file that fits: logits, and keys and values if they are wanted."""
        file = self._behind if past else self._first
        rows, count = values["input_ids"].shape
        start = past[0].shape[2] if past else 0
        shapes: dict[str, tuple[int, ...]] = {
            "logits": (rows, count, file.outputs["logits"].shape[-1])
        }
        if wants:
            shapes |= self._shapes(file, rows, start + count, values[STATES].shape[1])
        held = dict(zip(self._layers, past, strict=False))
        positions = {POSITIONS: torch.arange(start, start + count)}
        made = file.run({**positions, **values, **held}, shapes)
        logits = made.pop("logits")
        held |= {name.replace(PRESENT, PAST): tensor for name, tensor in made.items()}
        return logits, [held[name] for name in self._layers if name in held]

    def _shapes(
        self, file: OnnxFile, rows: int, seen: int, source: int
    ) -> dict[str, tuple[int, ...]]:
        """Of the keys and values that a file gives."""
        found: dict[str, tuple[int, ...]] = {}
        for name in self._layers:
            made = name.replace(PAST, PRESENT)
            if made in file.outputs:
                _, heads, _, width = self._behind.inputs[name].shape
                found[made] = (rows, heads, source if ".encoder." in name else seen, width)
        return found

    def _kept(self, cache: Any, present: Sequence[Tensor]) -> Any:
        """The cache that was given, or a new one, holding these very tensors."""
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if cache is None else cache
        layers = [present[i : i + len(KINDS)] for i in range(0, len(present), len(KINDS))]
        cache.self_attention_cache.layers = [filled_layer(*layer[:2]) for layer in layers]
        cache.cross_attention_cache.layers = [filled_layer(*layer[2:]) for layer in layers]
        cache.is_updated = dict.fromkeys(range(len(layers)), True)
        return cache


def _check_all_seen(mask: Tensor | None) -> None:
    if mask is not None and not bool((mask != 0).all()):
        raise GraphoptError(
            "the files of a decoder take no mask of its tokens, and decoder_attention_mask hides "
            "some",
            where="decoder_attention_mask",
            fix="decode texts whose first tokens are of different lengths one by one",
        )


def _layers(first: OnnxFile, behind: OnnxFile) -> list[str]:
    """Names of the four keys and values of each layer in turn, among inputs behind a cache.

    Raises:
        LoadError: a file has other inputs or outputs.
    """
    found: list[str] = []
    while f"{PAST}.{len(found) // len(KINDS)}.{KINDS[0]}" in behind.inputs:
        found += [f"{PAST}.{len(found) // len(KINDS)}.{kind}" for kind in KINDS]
    presents = [name.replace(PAST, PRESENT) for name in found]
    what = "the first tokens of a text"
    check_names(first, ["input_ids", STATES], ["logits", *presents], what, [MASK, POSITIONS])
    taken = ["input_ids", *(found or [f"{PAST}.0.{KINDS[0]}"])]
    own = [name for name in presents if ".decoder." in name]
    check_names(behind, taken, ["logits", *own], "tokens behind a cache", [MASK, STATES, POSITIONS])
    return found
