"""Text from an ONNX file that decodes, by transformers' own ``generate``.

The class is a model to `transformers.GenerationMixin`, which brings every way of decoding and all
processors of logits, and asks a ``PreTrainedModel`` for more in every release; so it is one,
without weights of its own, and its forward is a run of the file in ONNX Runtime. Keys and values
stay where ONNX Runtime wrote them: tensors are bound to its inputs and outputs by their memory, and
none is copied in between.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError, LoadError, MissingDependencyError

try:
    from transformers import (
        AutoConfig,
        DynamicCache,
        GenerationConfig,
        GenerationMixin,
        PreTrainedModel,
    )
    from transformers.cache_utils import DynamicLayer
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as _error:
    raise MissingDependencyError(
        "generation needs transformers", fix="pip install 'graphopt[hf]'"
    ) from _error

NAME = "model.onnx"
PAST, PRESENT = "past_key_values", "present"

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
}
_FIELD = "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else PAST
"""What transformers calls the cache among outputs, from 5.24 on and before."""


class OnnxCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
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
    _supports_sdpa = True

    def __init__(self, folder: str | os.PathLike[str], *, threads: int | None = None) -> None:
        place = Path(folder)
        for name in (NAME, "config.json"):
            if not (place / name).is_file():
                raise LoadError(
                    f"the folder has no {name}",
                    where=str(place),
                    fix="graphopt export MODEL --format optimum writes such a folder",
                )
        super().__init__(
            AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
        )
        self.generation_config: Any = _generation_config(place, self.config)
        self.session = _open(place / NAME, threads)
        self._inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self._outputs = {entry.name: entry for entry in self.session.get_outputs()}
        self._layers = _layers(self._inputs, self._outputs, place / NAME)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The CPU, where inputs and the cache are."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return _dtype(self._inputs[f"{PAST}.0.key"])

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> None:
        """Refused: weights are in the ONNX file.

        Raises:
            GraphoptError: always.
        """
        raise GraphoptError(
            "an ONNX file's weights are no state dict of transformers", fix="copy the folder"
        )

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
        kept = {} if use_cache is False else {_FIELD: self._kept(given, present)}
        output = CausalLMOutputWithPast(logits=logits, **kept)
        return output if return_dict else output.to_tuple()

    def _past(self, cache: Any, rows: int) -> list[Tensor]:
        """Keys and values of the layers in turn, ``(B, heads, P, width)``; P may be 0."""
        _check_cache(cache)
        layers = [] if cache is None else [layer for layer in cache.layers if layer.is_initialized]
        if not layers or layers[0].keys.shape[2] == 0:
            return [_empty(self._inputs[name], rows) for name in self._layers]
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
        """One run of the file, which writes into tensors that are made here."""
        rows, count = values["input_ids"].shape
        seen = past[0].shape[2] + count
        feeds = {n: values[n].contiguous() for n in self._inputs if n in values}
        feeds |= dict(zip(self._layers, past, strict=True))
        logits = torch.empty(
            rows, count, self._outputs["logits"].shape[-1], dtype=_dtype(self._outputs["logits"])
        )
        made = [t.new_empty(*t.shape[:2], seen, t.shape[3]) for t in past]
        binding = self.session.io_binding()
        for name, tensor in feeds.items():
            _bind(binding.bind_input, binding.bind_cpu_input, name, tensor, self._inputs[name])
        names = [name.replace(PAST, PRESENT) for name in self._layers]
        for name, tensor in zip(["logits", *names], [logits, *made], strict=True):
            _bind(binding.bind_output, None, name, tensor, self._outputs[name])
        self.session.run_with_iobinding(binding)
        return logits, made

    def _kept(self, cache: Any, present: Sequence[Tensor]) -> Any:
        """The cache that was given, or a new one, holding these very tensors."""
        cache = DynamicCache() if cache is None else cache
        cache.layers = [_layer(*pair) for pair in zip(present[::2], present[1::2], strict=True)]
        return cache


def _open(path: Path, threads: int | None) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "generation from ONNX files needs onnxruntime", fix="pip install 'graphopt[onnx]'"
        ) from error
    from graphopt.loading import check_external_data

    check_external_data(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        first = str(error).splitlines()[0]
        raise LoadError(f"ONNX Runtime cannot load the file: {first}", where=str(path)) from error


def _generation_config(place: Path, config: Any) -> Any:
    if (place / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(place, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def _layers(inputs: Mapping[str, Any], outputs: Mapping[str, Any], path: Path) -> list[str]:
    """Names of the keys and values of each layer in turn, among the inputs.

    Raises:
        LoadError: the file has other inputs or outputs.
    """
    found: list[str] = []
    while f"{PAST}.{len(found) // 2}.key" in inputs:
        found += [f"{PAST}.{len(found) // 2}.{kind}" for kind in ("key", "value")]
    known = {"input_ids", "attention_mask", "position_ids", *found}
    wanted = {"logits", *(name.replace(PAST, PRESENT) for name in found)}
    strange = sorted(set(inputs) - known)
    missing = sorted((set(found) - set(inputs)) | (wanted - set(outputs)))
    if strange or missing or not found or "input_ids" not in inputs:
        lacks = (missing or [f"{PAST}.0.key"])[0]
        told = f"takes {strange[0]!r}" if strange else f"has no {lacks!r}"
        raise LoadError(
            f"the file {told}, and is none for prompts and tokens behind a cache",
            where=str(path),
            fix="graphopt export MODEL --format optimum writes one",
        )
    for entry in (*inputs.values(), *(outputs[name] for name in wanted)):
        if entry.type not in _DTYPES:
            raise LoadError(f"{entry.name} is a {entry.type}", where=str(path))
    return found


def _dtype(entry: Any) -> torch.dtype:
    return _DTYPES[entry.type]


def _empty(entry: Any, rows: int) -> Tensor:
    heads, width = entry.shape[1], entry.shape[3]
    return torch.empty(rows, heads, 0, width, dtype=_dtype(entry))


def _check_cache(cache: Any) -> None:
    """A cache must hold every position: layers that dropped some cannot be continued."""
    if cache is None:
        return
    layers = getattr(cache, "layers", None)
    started = [layer for layer in layers or () if layer.is_initialized]
    if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in started):
        kinds = {type(layer).__name__ for layer in started} or {"no layers"}
        raise GraphoptError(
            f"a {type(cache).__name__} with {', '.join(sorted(kinds))} cannot be the cache of an "
            "ONNX file",
            where="cache",
            fix="leave cache_implementation and the cache out, or give transformers.DynamicCache()",
        )


def _layer(keys: Tensor, values: Tensor) -> Any:
    layer = DynamicLayer()
    layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer


def _bind(bind: Any, empty: Any, name: str, tensor: Tensor, entry: Any) -> None:
    """Bind a tensor by its memory; one without elements has none, and is given as it is."""
    if tensor.dtype != _dtype(entry):
        raise GraphoptError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')}, the file takes {entry.type}",
            where=name,
        )
    if not math.prod(tensor.shape) and empty is not None:
        empty(name, tensor.numpy())
        return
    kind = tensor.numpy().dtype.type
    bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
