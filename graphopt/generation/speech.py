"""Whisper in three files, with the ``generate`` that transformers has for it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from graphopt.errors import GraphoptError
from graphopt.generation.files import read_config
from graphopt.generation.seq2seq import OnnxSeq2SeqLM

STRIDES = (1, 2)
"""Of the two convolutions before Whisper's encoder, which are fixed in its code."""


class OnnxSpeechSeq2Seq(WhisperGenerationMixin, OnnxSeq2SeqLM):  # type: ignore[misc]
    """Whisper in ONNX files, on the CPU; see `OnnxSeq2SeqLM`.

    ``generate`` is Whisper's own of transformers: it takes ``input_features``
    ``(B, mel bins, frames)``, ``language``, ``task``, ``return_timestamps``, and sounds of more
    than 30 seconds, one part after another.

    Raises:
        LoadError: the folder is not complete, or its files take and give other tensors.
        MissingDependencyError: onnxruntime is not installed.
    """

    main_input_name = "input_features"

    def __init__(self, folder: str | os.PathLike[str], *, threads: int | None = None) -> None:
        super().__init__(folder, threads=threads)
        first, second = (SimpleNamespace(stride=(stride,)) for stride in STRIDES)
        encoder = SimpleNamespace(conv1=first, conv2=second, forward=self.encoder.forward)
        self.model = SimpleNamespace(encoder=encoder, config=self.config)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Tokens of what is said; arguments as ``WhisperForConditionalGeneration.generate``.

        Raises:
            GraphoptError: ``return_token_timestamps``, which are read off weights of attention.
        """
        if kwargs.get("return_token_timestamps"):
            raise GraphoptError(
                "an ONNX file gives no weights of attention, which times of tokens are read off",
                where="return_token_timestamps",
                fix="take return_timestamps=True, which are of segments",
            )
        return super().generate(*args, **kwargs)


def reads_sounds(place: Path) -> bool:
    """Whether a folder is Whisper's, by its config."""
    return bool(getattr(read_config(place), "model_type", "") == "whisper")
