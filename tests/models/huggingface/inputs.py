"""The kinds of input that Hugging Face models take, with the labels that give each a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from models.entry import Axes, Inputs, generator, images

TOKENS = {0: "batch", 1: "seq"}
BATCH = {0: "batch"}
TEXT_AXES = {"input_ids": TOKENS, "attention_mask": TOKENS}
IGNORED = -100


@dataclass(frozen=True)
class Modality:
    """``make(config, batch, seq, source)`` gives inputs, ``label(config, inputs, source)`` labels.

    ``hints`` size what no configuration says, such as the image side of a convolutional network.
    """

    make: Callable[[Any, int, int, torch.Generator], Inputs]
    axes: Axes
    label: Callable[[Any, Inputs, torch.Generator], Inputs] | None = None
    label_axes: Axes = field(default_factory=dict)
    seq: int = 7
    unseen_seq: int = 11

    def example(self, config: Any, batch: int, seq: int) -> Inputs:
        return self.make(config, batch, seq, generator("inputs", batch, seq))

    def labelled(self, config: Any, inputs: Inputs) -> Inputs:
        assert self.label is not None
        return self.label(config, inputs, generator("labels"))


def token_ids(config: Any, shape: tuple[int, ...], source: torch.Generator) -> torch.Tensor:
    """Random ids in ``[4, vocab_size)``: the low ids are padding and markers in these configs."""
    return torch.randint(4, config.get_text_config().vocab_size, shape, generator=source)


def padded_mask(batch: int, seq: int) -> torch.Tensor:
    """``(batch, seq)`` int64 ones; the last row is padded on the right by a quarter."""
    mask = torch.ones(batch, seq, dtype=torch.int64)
    mask[-1, seq - seq // 4 :] = 0
    return mask


def text(config: Any, batch: int, seq: int, source: torch.Generator) -> Inputs:
    ids = token_ids(config, (batch, seq), source)
    return {"input_ids": ids, "attention_mask": padded_mask(batch, seq)}


def text_without_mask(config: Any, batch: int, seq: int, source: torch.Generator) -> Inputs:
    return {"input_ids": token_ids(config, (batch, seq), source)}


def cacheless(make: Callable[..., Inputs]) -> Callable[..., Inputs]:
    """The same inputs with ``use_cache=False``: what training and scoring pass."""

    def made(config: Any, batch: int, seq: int, source: torch.Generator) -> Inputs:
        return {**make(config, batch, seq, source), "use_cache": False}

    return made


def translation(config: Any, batch: int, seq: int, source: torch.Generator) -> Inputs:
    target = token_ids(config, (batch, seq - 2), source)
    return {**text(config, batch, seq, source), "decoder_input_ids": target}


def token_labels(config: Any, inputs: Inputs, source: torch.Generator) -> Inputs:
    """One label per token, ignored where the input is padding."""
    ids = inputs["input_ids"]
    labels = torch.randint(4, config.get_text_config().vocab_size, ids.shape, generator=source)
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    return {"labels": labels.masked_fill(mask == 0, IGNORED)}


def tag_labels(config: Any, inputs: Inputs, source: torch.Generator) -> Inputs:
    shape = inputs["input_ids"].shape
    return {"labels": torch.randint(config.num_labels, shape, generator=source)}


def target_labels(config: Any, inputs: Inputs, source: torch.Generator) -> Inputs:
    shape = inputs["decoder_input_ids"].shape
    labels = token_ids(config, tuple(shape), source)
    labels[:, -1] = IGNORED
    return {"labels": labels}


def class_labels(config: Any, inputs: Inputs, source: torch.Generator) -> Inputs:
    batch = next(iter(inputs.values())).shape[0]
    return {"labels": torch.randint(config.num_labels, (batch,), generator=source)}


def span_labels(config: Any, inputs: Inputs, source: torch.Generator) -> Inputs:
    batch, seq = inputs["input_ids"].shape
    starts, ends = torch.randint(seq, (2, batch), generator=source)
    return {"start_positions": starts, "end_positions": ends}


def image(config: Any, batch: int, side: int, source: torch.Generator) -> Inputs:
    """``pixel_values`` of ``(batch, 3, side, side)``, roughly normalised."""
    return {"pixel_values": images(batch, side, source)}


def waveform(config: Any, batch: int, samples: int, source: torch.Generator) -> Inputs:
    """``input_values`` of ``(batch, samples)`` at the model's own rate."""
    return {"input_values": torch.randn(batch, samples, generator=source)}


def spectrogram(config: Any, batch: int, frames: int, source: torch.Generator) -> Inputs:
    """``input_values`` of ``(batch, frames, mel bins)``."""
    return {"input_values": torch.randn(batch, frames, config.num_mel_bins, generator=source)}


def speech(config: Any, batch: int, frames: int, source: torch.Generator) -> Inputs:
    """Whisper's ``input_features`` ``(batch, mel bins, frames)`` and the text so far."""
    features = torch.randn(batch, config.num_mel_bins, frames, generator=source)
    return {"input_features": features, "decoder_input_ids": token_ids(config, (batch, 5), source)}


def pixel_labels(config: Any, inputs: Inputs, source: torch.Generator) -> Inputs:
    batch, _, height, width = inputs["pixel_values"].shape
    labels = torch.randint(config.num_labels, (batch, height, width), generator=source)
    return {"labels": labels}


def image_and_text(config: Any, batch: int, seq: int, source: torch.Generator) -> Inputs:
    """Contrastive pair: one image of the vision tower's size per caption."""
    side = config.vision_config.image_size
    return {**text(config, batch, seq, source), **image(config, batch, side, source)}


def contrastive(config: Any, inputs: Inputs, source: torch.Generator) -> Inputs:
    return {"return_loss": True}


def question_and_image(config: Any, batch: int, seq: int, source: torch.Generator) -> Inputs:
    """Text whose first tokens stand for the image's patches."""
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    inputs = text(config, batch, seq, source)
    inputs["input_ids"][:, : (side // patch) ** 2] = config.image_token_id
    return {**inputs, **image(config, batch, side, source)}
