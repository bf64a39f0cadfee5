"""``--calibration FILE``: batches from a file of tensors, or from a text for a language model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from graphopt.cli.subject import Subject
from graphopt.errors import GraphoptError
from graphopt.huggingface_caches import CACHE_ARGUMENTS
from graphopt.huggingface_decoding import whole_sequences
from graphopt.huggingface_inputs import tokenizer_of
from graphopt.inputs import from_file

SEQUENCES, LENGTH = 128, 512
"""Of a text at most so many sequences, of so many tokens each, as in Frantar et al. 2023 (GPTQ)."""


def calibration_of(path: str | None, subject: Subject) -> list[dict[str, Any]] | None:
    """Batches as large as the example inputs.

    Raises:
        GraphoptError: the file cannot be read, holds less than one batch, or is a text and the
            model reads no tokens.
    """
    if path is None:
        return None
    example = subject.inputs.kwargs or _captured(subject)
    if Path(path).suffix.lower() == ".txt":
        return _text(path, subject)
    return list(batches(from_file(path).kwargs, example))


def _captured(subject: Subject) -> dict[str, Any]:
    """Example inputs of a ``.pt2``, under the names of its arguments."""
    if subject.module is not None:
        return {}
    program = subject.capture()[0]
    named = zip(program.user_inputs(), program.example_inputs, strict=False)
    return {node.name: value for node, value in named}


def batches(given: Mapping[str, Any], example: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Tensors that hold several batches of the example's size along axis 0, taken apart."""
    rows = _rows(given)
    size = _rows({k: v for k, v in example.items() if k in given})
    if rows is None or size is None or rows <= size:
        yield dict(given)
        return
    for start in range(0, rows - rows % size, size):
        yield {name: tensor[start : start + size] for name, tensor in given.items()}


def _rows(tensors: Mapping[str, Any]) -> int | None:
    """The size of axis 0 where all tensors have the same."""
    sizes = {v.shape[0] if v.dim() else None for v in tensors.values() if isinstance(v, Tensor)}
    return sizes.pop() if len(sizes) == 1 else None


def _text(path: str, subject: Subject) -> list[dict[str, Any]]:
    tokenizer = tokenizer_of(subject.loaded)
    example = subject.inputs.kwargs
    if tokenizer is None or "input_ids" not in example:
        raise GraphoptError(
            "a text calibrates a Hugging Face folder that has a tokenizer",
            where=f"--calibration {path}",
            fix="give a .pt, .safetensors or .npz file with one named tensor per input",
        )
    ids = _tokens(path, tokenizer, _longest(subject))
    size = len(example["input_ids"])
    if len(ids) < size:
        raise GraphoptError(
            f"the text has {len(ids)} sequences of {_longest(subject)} tokens, and a batch {size}",
            where=f"--calibration {path}",
            fix="give a longer text",
        )
    starts = range(0, len(ids) - len(ids) % size, size)
    return [_batch(example, ids[start : start + size]) for start in starts]


def _batch(example: Mapping[str, Any], ids: Tensor) -> dict[str, Any]:
    if any(name in example for name in CACHE_ARGUMENTS):
        return whole_sequences(example, ids)
    return {name: _like(name, value, ids) for name, value in example.items()}


def _longest(subject: Subject) -> int:
    config = getattr(subject.module, "config", None)
    return min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)


def _tokens(path: str, tokenizer: Any, length: int) -> Tensor:
    """The text as ``(sequences, length)`` tokens."""
    import torch

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GraphoptError(
            f"cannot read the text: {error}", where=f"--calibration {path}", fix="write it as UTF-8"
        ) from error
    made = tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)
    rows = made["input_ids"] if made["input_ids"] and isinstance(made["input_ids"][0], list) else []
    whole = [row for row in rows if len(row) == length]
    return torch.tensor(whole[:SEQUENCES], dtype=torch.int64).view(-1, length)


def _like(name: str, value: Any, ids: Tensor) -> Any:
    """What stands beside tokens: all of them are attended to, and of the first kind."""
    if not isinstance(value, Tensor):
        return value
    if name == "input_ids":
        return ids.to(value.dtype)
    if "mask" in name:
        return ids.new_ones(ids.shape).to(value.dtype)
    if "type" in name:
        return ids.new_zeros(ids.shape).to(value.dtype)
    raise GraphoptError(
        f"a text says nothing about the input {name!r}",
        where="--calibration",
        fix="give a .pt, .safetensors or .npz file with one named tensor per input",
    )
