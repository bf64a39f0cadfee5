"""Turns a line of a family table into an ``Entry``: class name, input kind, shrunken config."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from models.entry import Entry, Inputs, perturb, seeded, settle
from models.huggingface.inputs import Modality

# A row of a family table: entry name, class name, kind of input, configuration values.
Row = tuple[str, str, Modality, dict[str, Any]]
VOCAB = 101
TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**TINY, "num_key_value_heads": 2}


def entry(
    family: str, name: str, class_name: str, modality: Modality, config: dict[str, Any]
) -> Entry:
    """An entry for ``transformers.CLASS_NAME``, its config class filled with ``config``'s values.

    A value that is itself a dict becomes the sub-config of that name where the class has one.
    """

    def configured() -> Any:
        return getattr(transformers, class_name).config_class(**config)

    def build() -> nn.Module:
        with seeded("weights", name) as source:
            model = perturb(getattr(transformers, class_name)(configured()), source)
            return settle(model, example(8, modality.seq), source)

    def example(batch: int, seq: int) -> Inputs:
        return modality.example(configured(), batch, seq)

    def label(inputs: Inputs) -> Inputs:
        return modality.labelled(configured(), inputs)

    return Entry(
        name=name,
        family=family,
        build=build,
        example=example,
        dynamic_axes=modality.axes,
        label=label if modality.label else None,
        label_axes=modality.label_axes,
        seq=modality.seq,
        unseen_seq=modality.unseen_seq,
    )
