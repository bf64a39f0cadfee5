"""What models in ONNX files share: the folder, sessions, and tensors bound by their memory."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from graphopt.errors import GraphoptError, LoadError, MissingDependencyError
from graphopt.huggingface_caches import CACHE_ARGUMENTS
from graphopt.onnx_types import RUNTIME

_TAKEN = ("float32", "float64", "float16", "int64")
"""Types that inputs and outputs may have."""
FIELD = next(n for n in CACHE_ARGUMENTS if n in {f.name for f in fields(CausalLMOutputWithPast)})
"""What transformers calls the cache among outputs, from 5.24 on and before."""

_lock, _inside = Lock(), list[int]()


class OnnxModel(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A model of transformers whose weights are in the ONNX files of a folder.

    Args:
        files: that the folder must have, besides ``config.json``.
    """

    _supports_sdpa = True

    def __init__(self, folder: str | os.PathLike[str], files: Sequence[str]) -> None:
        place = Path(folder)
        for name in (*files, "config.json"):
            if not (place / name).is_file():
                raise LoadError(
                    f"the folder has no {name}",
                    where=str(place),
                    fix="graphopt export MODEL --format optimum writes such a folder",
                )
        super().__init__(read_config(place))
        self.generation_config: Any = _generation_config(place, self.config)
        self.eval()

    @property
    def device(self) -> torch.device:
        """The CPU, where inputs and the cache are."""
        return torch.device("cpu")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens, as ``GenerationMixin.generate`` of transformers makes them.

        Between runs of the files torch is left one thread: others would spin on the cores of ONNX
        Runtime's, and both take half as long again. With an ``assistant_model``, which may be one
        of torch, it keeps its threads.
        """
        with nullcontext() if kwargs.get("assistant_model") is not None else _one_thread():
            return super().generate(*args, **kwargs)

    def save_pretrained(self, *_args: Any, **_kwargs: Any) -> None:
        """Refused: weights are in the ONNX files.

        Raises:
            GraphoptError: always.
        """
        raise GraphoptError(
            "an ONNX file's weights are no state dict of transformers", fix="copy the folder"
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread of torch, and their number again; calls beside each other share the first's."""
    with _lock:
        _inside.append(_inside[0] if _inside else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            torch.set_num_threads(_inside.pop())


class OnnxFile:
    """A file in ONNX Runtime, whose inputs and outputs are tensors of torch.

    Attributes:
        session: the ``onnxruntime.InferenceSession``.
        inputs: what ONNX Runtime says of them, by their names; ``outputs`` the same.
    """

    def __init__(self, path: Path, threads: int | None) -> None:
        self.path, self.session = path, _open(path, threads)
        self.inputs = {entry.name: entry for entry in self.session.get_inputs()}
        self.outputs = {entry.name: entry for entry in self.session.get_outputs()}
        for entry in (*self.inputs.values(), *self.outputs.values()):
            if RUNTIME.get(entry.type) not in _TAKEN:
                raise LoadError(f"{entry.name} is a {entry.type}", where=str(path))

    def dtype(self, name: str) -> torch.dtype:
        """Of an input or an output."""
        entry = self.inputs.get(name) or self.outputs[name]
        found: torch.dtype = getattr(torch, RUNTIME[entry.type])
        return found

    def empty(self, name: str, rows: int) -> Tensor:
        """Keys or values ``(rows, heads, 0, width)`` for an input."""
        _, heads, _, width = self.inputs[name].shape
        return torch.empty(rows, heads, 0, width, dtype=self.dtype(name))

    def run(
        self, values: Mapping[str, Tensor], wanted: Mapping[str, Sequence[int]]
    ) -> dict[str, Tensor]:
        """One run, which writes outputs of the shapes ``wanted`` into tensors that are made here.

        Values that the file does not take are left out.
        """
        made = {name: torch.empty(*shape, dtype=self.dtype(name)) for name, shape in wanted.items()}
        held = {name: v.contiguous() for name, v in values.items() if name in self.inputs}
        binding = self.session.io_binding()
        for name, tensor in held.items():
            self._bind(binding.bind_input, binding.bind_cpu_input, name, tensor)
        for name, tensor in made.items():
            self._bind(binding.bind_output, None, name, tensor)
        self.session.run_with_iobinding(binding)
        return made

    def _bind(self, bind: Any, empty: Any, name: str, tensor: Tensor) -> None:
        """Bind a tensor by its memory; one without elements has none, and is given as it is."""
        if tensor.dtype != self.dtype(name):
            taken = self.inputs[name].type
            raise GraphoptError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, the file takes {taken}",
                where=name,
            )
        if not math.prod(tensor.shape) and empty is not None:
            empty(name, tensor.numpy())
            return
        kind = tensor.numpy().dtype.type
        bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())


def read_config(place: Path) -> Any:
    """The config of transformers in a folder."""
    return AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)


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
    """With the cache in use, which the files have whatever the model was trained with."""
    if (place / "generation_config.json").is_file():
        found = GenerationConfig.from_pretrained(place, local_files_only=True)
    else:
        found = GenerationConfig.from_model_config(config)
    found.use_cache = True
    return found


def started_layers(cache: Any) -> list[Any]:
    """Layers of a cache that hold something.

    Raises:
        GraphoptError: it is of another kind: layers that dropped positions cannot be continued.
    """
    if cache is None:
        return []
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
    return started


def check_names(
    file: OnnxFile, taken: Sequence[str], given: Sequence[str], what: str, optional: Sequence[str]
) -> None:
    """Refuse a file with other inputs or outputs.

    Raises:
        LoadError: names the first of them.
    """
    strange = sorted(set(file.inputs) - {*taken, *optional})
    missing = sorted((set(taken) - set(file.inputs)) | (set(given) - set(file.outputs)))
    if strange or missing:
        told = f"takes {strange[0]!r}" if strange else f"has no {missing[0]!r}"
        raise LoadError(
            f"the file {told}, and is none for {what}",
            where=str(file.path),
            fix="graphopt export MODEL --format optimum writes one",
        )
