"""Models of image and text: contrastive pairs, and language models that read patches."""

from __future__ import annotations

from dataclasses import replace

from models.entry import Entry
from models.huggingface import inputs as kind
from models.huggingface.spec import GROUPED, TINY, Row, entry
from models.huggingface.vision import VIT

PAIR = kind.Modality(
    kind.image_and_text,
    {**kind.TEXT_AXES, "pixel_values": kind.BATCH},
    kind.contrastive,
)
QUESTION = replace(
    PAIR,
    make=kind.cacheless(kind.question_and_image),
    label=kind.token_labels,
    label_axes={"labels": kind.TOKENS},
    seq=20,
    unseen_seq=25,
)

TOWERS = {"text_config": TINY, "vision_config": VIT, "projection_dim": 16}
LLAVA = {
    "text_config": {**GROUPED, "model_type": "llama"},
    "vision_config": {**VIT, "model_type": "clip_vision_model"},
    "image_token_id": 3,
    "vision_feature_layer": -1,
}

TABLE: list[Row] = [
    ("clip", "CLIPModel", PAIR, TOWERS),
    ("siglip", "SiglipModel", PAIR, TOWERS),
    ("chinese-clip", "ChineseCLIPModel", PAIR, TOWERS),
    ("metaclip-2", "MetaClip2Model", PAIR, TOWERS),
    ("llava", "LlavaForConditionalGeneration", QUESTION, LLAVA),
]

ENTRIES: list[Entry] = [entry("multimodal", *row) for row in TABLE]
