"""Small modules, each awkward in one way. ``ENTRIES`` can be captured, ``REFUSED`` cannot."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.entry import Axes, Entry, Inputs, generator, perturb, seeded, settle
from models.plain import attention, interfaces, layers, mutation, pointwise, refused, sharing

TOKENS = {0: "batch", 1: "seq"}
# For modules whose graph depends on the length of the sequence.
ROWS = {"x": {0: "batch"}}
Example = Callable[[int, int], Inputs]


def _floats(batch: int, seq: int, width: int = 8, salt: str = "x") -> torch.Tensor:
    return torch.randn(batch, seq, width, generator=generator(salt, batch, seq))


def _features(batch: int, seq: int) -> Inputs:
    return {"x": _floats(batch, seq)}


def _wide(batch: int, seq: int) -> Inputs:
    return {"x": _floats(batch, seq, 16)}


def _ids(batch: int, seq: int) -> Inputs:
    return {"ids": torch.randint(29, (batch, seq), generator=generator("ids", batch, seq))}


def _entry(
    name: str,
    make: Callable[[], nn.Module],
    example: Example = _features,
    axes: Axes | None = None,
    family: str = "plain",
) -> Entry:
    def build() -> nn.Module:
        with seeded("weights", name) as source:
            return settle(perturb(make(), source), example(8, 6), source)

    axes = axes or {next(iter(example(1, 3))): TOKENS}
    unseen_seq = 6 if axes is ROWS else 9
    return Entry(name, family, build, example, axes, seq=6, unseen_seq=unseen_seq)


def _kebab(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower().replace("_", "-")


# Inputs and dynamic axes of the modules that do not take one tensor ``x`` of (batch, seq, 8).
INTERFACES: dict[type[nn.Module], tuple[Example, dict[str, Any]]] = {
    interfaces.DictInOut: (
        lambda b, s: {"features": {"left": _floats(b, s), "right": _floats(b, s, salt="right")}},
        {"features": {"left": TOKENS, "right": TOKENS}},
    ),
    interfaces.DataclassInOut: (
        lambda b, s: {"batch": interfaces.Batch(_floats(b, s), _floats(b, s, 1))},
        {"batch": [TOKENS, TOKENS]},
    ),
    interfaces.KeywordOnly: (
        lambda b, s: {**_features(b, s), "scale": torch.tensor(0.5), "power": 3},
        {"x": TOKENS},
    ),
    interfaces.ListInOut: (
        lambda b, s: {"tensors": [_floats(b, s), _floats(b, s, salt="second")]},
        {"tensors": [TOKENS, TOKENS]},
    ),
    interfaces.UnusedInput: (
        lambda b, s: {**_features(b, s), "ignored": _floats(b, s)},
        {"x": TOKENS, "ignored": TOKENS},
    ),
    interfaces.LogitsAndLoss: (
        lambda b, s: {**_features(b, s), "targets": _ids(b, s)["ids"]},
        {"x": TOKENS, "targets": TOKENS},
    ),
    sharing.TiedHead: (_ids, {"ids": TOKENS}),
}


def _of(*modules: type[nn.Module]) -> list[Entry]:
    return [_entry(_kebab(m.__name__), m, *INTERFACES.get(m, ())) for m in modules]


def _attention(attend: attention.Attend, family: str) -> Entry:
    make = functools.partial(attention.HandAttention, attend)
    axes = ROWS if attend in attention.FIXED_LENGTH else None
    return _entry(f"attention-{_kebab(attend.__name__)}", make, _wide, axes, family)


def _layer(name: str, make: Callable[..., nn.Module], *args: Any, **rest: Any) -> Entry:
    return _entry(name, functools.partial(make, *args), **rest)


LAYERS = [
    _layer("mlp", layers.Mlp, example=lambda b, s: {"input": _floats(b, s)}),
    _layer("lstm", layers.Recurrent, "LSTM", axes=ROWS),
    _layer("lstm-bidirectional", layers.Recurrent, "LSTM", True, 2, axes=ROWS),
    _layer("gru", layers.Recurrent, "GRU", axes=ROWS),
    _layer("rnn", layers.Recurrent, "RNN", axes=ROWS),
    _layer("lstm-cell", layers.Cell, axes=ROWS),
    _layer("multihead-attention", layers.SelfAttention, False),
    _layer("multihead-attention-weights", layers.SelfAttention, True),
    _layer("encoder-norm-first", layers.Encoder, True),
    _layer("encoder-norm-last", layers.Encoder, False, "relu"),
    _layer("decoder-layer", layers.Decoder),
    _layer("tiny-gpt", layers.TinyGpt, example=_ids),
    _layer("tiny-gpt-tied", functools.partial(layers.TinyGpt, tied=True), example=_ids),
    _layer("attention-grouped", attention.FusedGrouped, example=_wide),
]
# Keys left untransposed multiply only where the sequence is as long as there are heads.
UNTRANSPOSED = _entry(
    "attention-key-untransposed",
    functools.partial(attention.HandAttention, attention.key_untransposed),
    lambda batch, seq: _wide(batch, 4),
    ROWS,
    "near-miss",
)

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *_of(*mutation.MODULES, *sharing.MODULES, *interfaces.MODULES, *pointwise.MODULES),
        *LAYERS,
        *(_attention(attend, "plain") for attend in attention.SPELLINGS),
        *(_attention(attend, "near-miss") for attend in attention.NEAR_MISSES),
        UNTRANSPOSED,
    )
}
REFUSED: dict[str, Entry] = {
    entry.name: entry
    for entry in (_entry(_kebab(m.__name__), m, family="refused") for m in refused.MODULES)
}
