"""Hugging Face architectures from shrunken configurations: seeded weights, nothing downloaded."""

from __future__ import annotations

from models.entry import Entry
from models.huggingface import (
    audio,
    decoders,
    encoders,
    experts,
    multimodal,
    seq2seq,
    state_space,
    vision,
)

FAMILIES = (encoders, decoders, seq2seq, vision, audio, experts, state_space, multimodal)
ENTRIES: dict[str, Entry] = {entry.name: entry for family in FAMILIES for entry in family.ENTRIES}
