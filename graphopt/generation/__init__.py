"""Text from ONNX files that decode, by transformers' own ``generate``.

The classes are models to `transformers.GenerationMixin`, which brings every way of decoding and all
processors of logits, and asks a ``PreTrainedModel`` for more in every release; so they are such,
without weights of their own, and their forward is a run of a file in ONNX Runtime. Keys and values
stay where ONNX Runtime wrote them: tensors are bound to its inputs and outputs by their memory, and
none is copied in between.
"""

from __future__ import annotations

import os
from pathlib import Path

from graphopt.errors import MissingDependencyError
from graphopt.huggingface_seq2seq import ENCODER

try:
    import transformers as _transformers  # noqa: F401
except ImportError as _error:
    raise MissingDependencyError(
        "generation needs transformers", fix="pip install 'graphopt[hf]'"
    ) from _error

from graphopt.generation.causal import OnnxCausalLM
from graphopt.generation.seq2seq import OnnxSeq2SeqLM
from graphopt.generation.speech import OnnxSpeechSeq2Seq
from graphopt.generation.speech import reads_sounds as _reads_sounds


def load_onnx(
    folder: str | os.PathLike[str], *, threads: int | None = None
) -> OnnxCausalLM | OnnxSeq2SeqLM:
    """The class that fits what lies in a folder; arguments as `OnnxCausalLM` takes them.

    Raises:
        LoadError: the folder is not complete, or its files take and give other tensors.
        MissingDependencyError: onnxruntime is not installed.
    """
    place = Path(folder)
    if not (place / ENCODER).is_file():
        return OnnxCausalLM(place, threads=threads)
    kind = OnnxSpeechSeq2Seq if _reads_sounds(place) else OnnxSeq2SeqLM
    return kind(place, threads=threads)


__all__ = ["OnnxCausalLM", "OnnxSeq2SeqLM", "OnnxSpeechSeq2Seq", "load_onnx"]
