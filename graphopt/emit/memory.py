"""Writing what a graph updated, and giving results the memory they lie in by contract."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.memory import share_memory

Write = tuple[Tensor, Tensor]
"""A new value and the tensor it is written into."""


def store(
    given: list[Write], buffers: list[Write], user: list[tuple[Any, Write | None]]
) -> list[Any]:
    """Write inputs and buffers; returns the outputs, each in the memory it lies in by contract.

    Nothing that is still to be written or returned may change on the way, so what shares memory
    with a tensor to be written is copied first.

    Args:
        user: each output, and the write to the buffer whose memory it shows.
    """
    places = [place for _, place in (*given, *buffers)]
    values = [_apart(value.detach(), places) for value, _ in (*given, *buffers)]
    outputs = [_returned(o, [*given, *([w] if w else [])], places) for o, w in user]
    with torch.no_grad():
        for place, value in zip(places, values, strict=True):
            place.copy_(value)
    return outputs


def _returned(output: Any, writes: list[Write], places: list[Tensor]) -> Any:
    for value, place in writes:
        if (found := in_memory_of(place, value, output)) is not output:
            return found
    return _apart(output, places) if isinstance(output, Tensor) else output


def _apart(value: Tensor, places: list[Tensor]) -> Tensor:
    return value.clone() if any(share_memory(value, place) for place in places) else value


def in_memory_of(given: Tensor, value: Tensor, output: Any) -> Any:
    """The output as a view of an input, where it views the value that was written into it."""
    if output is value:
        return given
    if not isinstance(output, Tensor) or output.requires_grad or not share_memory(output, value):
        return output
    if value.stride() != given.stride():
        whole = (output.shape, output.stride()) == (value.shape, value.stride())
        return given.view_as(given) if whole else output
    start = given.storage_offset() + output.storage_offset() - value.storage_offset()
    return given.as_strided(output.shape, output.stride(), start)
