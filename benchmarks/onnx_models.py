"""Models whose ONNX files are raced: how each is called, and what it is timed on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import minilm, smollm2
from graphopt.huggingface_decoding import decoding, positions_of

Feed = dict[str, Tensor]
"""Inputs by the names that every file gives them."""


@dataclass(frozen=True)
class Subject:
    """A model, and how its files are made and timed.

    Attributes:
        call: arguments of ``model`` that files are made of.
        axes: dynamic axes of ``call`` by name, for each argument.
        kind: model type, heads and width for ``onnxruntime.transformers``; None where it has none.
        task: optimum's name for it; None where the model is not of transformers.
        feeds: what is timed, by a name for each shape.
    """

    name: str
    model: nn.Module
    call: Feed
    axes: dict[str, dict[int, str]]
    kind: tuple[str, int, int] | None
    task: str | None
    feeds: dict[str, Feed]
    decodes: bool = False

    def eager(self, feed: Feed) -> Tensor:
        """The first output."""
        with torch.no_grad():
            if self.decodes:
                found: Tensor = Flat(self.model)(*feed.values())[0]
                return found
            out = self.model(**feed)
        first: Tensor = out if isinstance(out, Tensor) else out[0]
        return first


class Flat(nn.Module):
    """A decoder that takes and gives keys and values as tensors, in turn."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, *past: Tensor
    ) -> tuple[Tensor, ...]:
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=self.model.config)
        for layer, pair in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(*pair, layer)
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": True}
        out = self.model(input_ids, past_key_values=cache, **given)
        tensors = (t for layer in out.past_key_values.layers for t in (layer.keys, layer.values))
        return (out.logits, *tensors)


def minilm_subject(_data: Path | None) -> Subject:
    model, call, axes = minilm(8, 128)
    feeds = {"batch 1, 128 tokens": minilm(1, 128)[1], "batch 8, 128 tokens": call}
    kind = ("bert", 12, 384)
    return Subject("MiniLM", model, call, axes, kind, "feature-extraction", feeds)


def resnet20_subject(data: Path | None) -> Subject | None:
    if data is None:
        return None
    from graphopt.loading import load_model

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    loaded = load_model(data / "weights" / "resnet20-12fca82f.th", arch="models.cnn:resnet20")
    assert loaded.module is not None
    return _images("ResNet-20", loaded.module, "x", (3, 32, 32), (1, 250), None, None)


def vit_subject(_data: Path | None) -> Subject:
    """ViT-S/16 with random weights."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes, num_labels=1000)).eval()
    kind, task = ("vit", 6, 384), "image-classification"
    return _images("ViT-S", model, "pixel_values", (3, 224, 224), (1, 8), kind, task)


def _images(
    name: str,
    model: nn.Module,
    argument: str,
    shape: tuple[int, ...],
    batches: tuple[int, ...],
    kind: tuple[str, int, int] | None,
    task: str | None,
) -> Subject:
    torch.manual_seed(0)
    feeds = {f"batch {n}": {argument: torch.randn(n, *shape)} for n in batches}
    call = feeds[f"batch {batches[-1]}"]
    return Subject(name, model, call, {argument: {0: "batch"}}, kind, task, feeds)


def smollm2_subject(data: Path | None) -> Subject | None:
    if (loaded := smollm2()) is None:
        return None
    model, tokenizer = loaded
    if data is None:
        text = torch.randint(49152, (1, 514), generator=torch.Generator().manual_seed(0))
    else:
        written = (data / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")[:8192]
        text = tokenizer(written, return_tensors="pt").input_ids[:, :514]
    return decoder_subject("SmolLM2", model, text, ("gpt2", 9, 576))


def decoder_subject(
    name: str, model: nn.Module, text: Tensor, kind: tuple[str, int, int] | None
) -> Subject:
    """A causal language model: a token behind all others of ``text`` ``(1, n)``, and a prompt.

    Prompts stand behind one token: a captured program of a cache has at least one in it.
    """
    decoder = decoding(model)
    call = dict(zip(decoder.input_names, _tensors(decoder.inputs.kwargs), strict=True))
    axes = {n: _axes_of(n) for n in call}
    last = text.shape[1] - 1
    feeds = {
        f"a token behind {last}": _feed(model, call, text, last),
        f"a prompt of {last - 1}": _feed(model, call, text[:, :last], 1),
    }
    return Subject(name, model, call, axes, kind, "text-generation-with-past", feeds, True)


def _tensors(values: Any) -> list[Tensor]:
    from torch.utils import _pytree as pytree

    return [t for t in pytree.tree_leaves(values) if isinstance(t, Tensor)]


def _axes_of(name: str) -> dict[int, str]:
    if "." in name:
        return {0: "batch", 2: "past"}
    return {0: "batch", 1: "seen" if "mask" in name else "tokens"}


def _feed(model: nn.Module, call: Feed, text: Tensor, past: int) -> Feed:
    """What follows the first ``past`` tokens of ``text`` ``(1, n)``."""
    mask = torch.ones_like(text)
    with torch.no_grad():
        cache = model(text[:, :past], use_cache=True).past_key_values
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    names = [n for n in call if "." in n]
    return {
        "input_ids": text[:, past:].contiguous(),
        "attention_mask": mask,
        "position_ids": positions_of(mask)[:, past:].contiguous(),
        **dict(zip(names, tensors, strict=True)),
    }


SUBJECTS: dict[str, Callable[[Path | None], Subject | None]] = {
    "MiniLM": minilm_subject,
    "ResNet-20": resnet20_subject,
    "ViT-S": vit_subject,
    "SmolLM2": smollm2_subject,
}
