"""A causal language model in one file, for a prompt and for tokens behind a cache alike."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from graphopt.errors import GraphoptError
from graphopt.generation.files import (
    FIELD,
    OnnxFile,
    OnnxModel,
    check_names,
    started_layers,
)
from graphopt.huggingface_caches import CAUSAL, PAST, PRESENT, filled_layer


class OnnxCausalLM(OnnxModel):
    """A causal language model in an ONNX file, on the CPU.

    ``generate`` is that of transformers: greedy (``do_sample=False``), sampled (``temperature``,
    ``top_k``, ``top_p``; `torch.manual_seed` before it repeats what is drawn), beams,
    ``max_new_tokens``, stopping criteria, streamers, and batches that are padded on their left,
    with their ``attention_mask``.

    Args:
        folder: with ``model.onnx`` and ``config.json``, such as `graphopt.export_onnx_folder` or
            optimum writes it.
        threads: that an operator may use; by default as many as torch.

    Attributes:
        config: of transformers.
        generation_config: its defaults for ``generate``.
        session: the ``onnxruntime.InferenceSession``.

    Raises:
        LoadError: the folder is not complete, or its file takes and gives other tensors.
        MissingDependencyError: onnxruntime is not installed.
    """

    main_input_name = "input_ids"

    def __init__(self, folder: str | os.PathLike[str], *, threads: int | None = None) -> None:
        super().__init__(folder, [CAUSAL])
        self._file = OnnxFile(Path(folder) / CAUSAL, threads)
        self.session = self._file.session
        self._layers = _layers(self._file)

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self._file.dtype(f"{PAST}.0.key")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Logits of tokens, and the cache with their keys and values in it.

        Args:
            input_ids: ``(B, T)`` int64.
            attention_mask: ``(B, P + T)`` of zeros and ones, behind P positions in the cache;
                default: all are seen.
            position_ids: ``(B, T)``; default: from the mask.
            cache: a ``transformers.DynamicCache``, which is written; ``past_key_values`` is the
                same.
            use_cache: whether the output has a cache.
            return_dict: if not, a tuple is given.

        Returns:
            ``CausalLMOutputWithPast`` with ``logits`` ``(B, T, V)``.

        Raises:
            GraphoptError: a cache of another kind, or a mask of another size.
        """
        given = cache if cache is not None else past_key_values
        rows, count = input_ids.shape
        past = self._past(given, rows)
        seen = past[0].shape[2] + count
        mask = attention_mask if attention_mask is not None else input_ids.new_ones(rows, seen)
        if mask.shape != (rows, seen):
            raise GraphoptError(
                f"attention_mask is {tuple(mask.shape)}, for {rows} rows of {seen} positions: "
                f"{seen - count} in the cache and {count} tokens",
                where="attention_mask",
                fix="give zeros for padding and ones for every other position",
            )
        values = {"input_ids": input_ids, "attention_mask": mask.to(torch.int64)}
        if position_ids is None:
            position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -count:]
        values["position_ids"] = position_ids.expand(rows, count)
        logits, present = self._run(values, past)
        kept = {} if use_cache is False else {FIELD: self._kept(given, present)}
        output = CausalLMOutputWithPast(logits=logits, **kept)
        return output if return_dict else output.to_tuple()

    def _past(self, cache: Any, rows: int) -> list[Tensor]:
        """Keys and values of the layers in turn, ``(B, heads, P, width)``; P may be 0."""
        layers = started_layers(cache)
        if not layers or layers[0].keys.shape[2] == 0:
            return [self._file.empty(name, rows) for name in self._layers]
        found = [t for layer in layers for t in (layer.keys, layer.values)]
        if len(found) != len(self._layers) or found[0].shape[0] != rows:
            raise GraphoptError(
                f"the cache has {len(layers)} layers of {found[0].shape[0]} rows, the file "
                f"{len(self._layers) // 2}, and the input {rows} rows",
                where="cache",
                fix="start with cache=None",
            )
        return [t.contiguous() for t in found]

    def _run(
        self, values: Mapping[str, Tensor], past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """One run of the file: logits, and keys and values of all positions."""
        rows, count = values["input_ids"].shape
        seen = past[0].shape[2] + count
        names = [name.replace(PAST, PRESENT) for name in self._layers]
        shapes = {
            name: (*t.shape[:2], seen, t.shape[3]) for name, t in zip(names, past, strict=True)
        }
        logits = (rows, count, self._file.outputs["logits"].shape[-1])
        feeds = {**values, **dict(zip(self._layers, past, strict=True))}
        made = self._file.run(feeds, {"logits": logits, **shapes})
        return made["logits"], [made[name] for name in names]

    def _kept(self, cache: Any, present: Sequence[Tensor]) -> Any:
        """The cache that was given, or a new one, holding these very tensors."""
        cache = DynamicCache() if cache is None else cache
        pairs = zip(present[::2], present[1::2], strict=True)
        cache.layers = [filled_layer(*pair) for pair in pairs]
        return cache


def _layers(file: OnnxFile) -> list[str]:
    """Names of the keys and values of each layer in turn, among the inputs.

    Raises:
        LoadError: the file has other inputs or outputs.
    """
    found: list[str] = []
    while f"{PAST}.{len(found) // 2}.key" in file.inputs:
        found += [f"{PAST}.{len(found) // 2}.{kind}" for kind in ("key", "value")]
    given = ["logits", *(name.replace(PAST, PRESENT) for name in found)]
    taken = ["input_ids", *(found or [f"{PAST}.0.key"])]
    what = "prompts and tokens behind a cache"
    check_names(file, taken, given, what, ["attention_mask", "position_ids"])
    return found
