"""Example inputs of a Hugging Face model, from its config and its tokenizer, if it has one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError, LoadError
from graphopt.inputs import SEED, Inputs

if TYPE_CHECKING:
    from graphopt.loading import LoadedModel

SENTENCES = (
    "A graph rewrite must compute what the original computes.",
    "The quick brown fox jumps over the lazy dog, twice, and then rests for a while in the sun.",
)
BATCH, LENGTH = 2, 32
SECONDS = 1


def huggingface_inputs(model: nn.Module, tokenizer: Callable[..., Any] | None = None) -> Inputs:
    """Inputs for text, image and audio models, with batch and sequence axes dynamic.

    Raises:
        GraphoptError: the model's main input is of another kind; then ``--inputs`` must say it.
    """
    main = getattr(model, "main_input_name", "input_ids")
    names = set(inspect.signature(model.forward).parameters)
    if main == "pixel_values":
        return _image(model.config)
    if main in ("input_values", "input_features"):
        return _audio(model.config, main)
    if "input_ids" in names:
        return _text(model, names, tokenizer)
    raise GraphoptError(
        f"cannot guess inputs for {type(model).__name__} (main input {main!r})",
        fix="name them: --inputs 'NAME:DTYPE[DIM,...]'",
    )


def tokenizer_of(loaded: LoadedModel) -> Any:
    """The folder's tokenizer, or ``None`` where it has none that can be loaded."""
    try:
        return loaded.tokenizer()
    except LoadError:
        return None


def _text(model: nn.Module, names: set[str], tokenizer: Callable[..., Any] | None) -> Inputs:
    config: Any = model.config
    found = _tokens(config, tokenizer)
    axes = {0: "batch", 1: "seq"}
    kwargs: dict[str, Any] = {k: v for k, v in found.items() if k in names}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = kwargs["input_ids"].clone()
        return Inputs(
            kwargs,
            {k: dict(axes) for k in kwargs if k != "decoder_input_ids"}
            | {"decoder_input_ids": {0: "batch", 1: "target_seq"}},
        )
    dynamic = {k: dict(axes) for k in kwargs}
    if hasattr(model, "logit_scale") and "pixel_values" in names:  # image and text, contrasted
        image = _image(config)
        return Inputs(kwargs | image.kwargs, dynamic | {"pixel_values": {0: "images"}})
    if "use_cache" in names and getattr(config, "use_cache", False):
        kwargs["use_cache"] = False
    return Inputs(kwargs, dynamic)


def _tokens(config: Any, tokenizer: Callable[..., Any] | None) -> dict[str, Tensor]:
    if tokenizer is not None:
        if getattr(tokenizer, "pad_token", True) is None:
            tokenizer.pad_token = tokenizer.eos_token  # type: ignore[attr-defined]
        return dict(tokenizer(list(SENTENCES), padding=True, return_tensors="pt"))
    ids = random_tokens(config, (BATCH, LENGTH), decoder=None)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def random_tokens(
    config: Any, shape: tuple[int, int], seed: int = SEED, *, decoder: bool | None = True
) -> Tensor:
    """Of the vocabulary of a model's ``decoder``, or of all of its text."""
    text = config.get_text_config(decoder=decoder) if hasattr(config, "get_text_config") else config
    return torch.randint(text.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def _image(config: Any) -> Inputs:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    generator = torch.Generator().manual_seed(SEED)
    pixels = torch.randn(BATCH, channels, height, width, generator=generator)
    return Inputs({"pixel_values": pixels}, {"pixel_values": {0: "batch"}})


def _audio(config: Any, main: str) -> Inputs:
    generator = torch.Generator().manual_seed(SEED)
    if main == "input_values" and hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
        values = torch.randn(BATCH, config.max_length, config.num_mel_bins, generator=generator)
        return Inputs({main: values}, {main: {0: "batch"}})
    if main == "input_values":
        values = torch.randn(BATCH, 16_000 * SECONDS, generator=generator)
        return Inputs({main: values}, {main: {0: "batch"}})
    bins = getattr(config, "num_mel_bins", 80)
    frames = 2 * getattr(config, "max_source_positions", 1500)
    features = torch.randn(BATCH, bins, frames, generator=generator)
    kwargs: dict[str, Any] = {main: features}
    if getattr(config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = torch.zeros(BATCH, 4, dtype=torch.int64)
    return Inputs(kwargs, {k: {0: "batch"} for k in kwargs})
