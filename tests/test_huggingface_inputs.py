"""Example inputs of Hugging Face models: what they are called with, and which axes may change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models.huggingface import ENTRIES
from torch import nn

import graphopt
from graphopt.errors import GraphoptError, LoadError
from graphopt.huggingface_inputs import SENTENCES, huggingface_inputs, tokenizer_of


@pytest.mark.parametrize(
    ("name", "axes"),
    [
        ("bert", {"input_ids": {0: "batch", 1: "seq"}, "attention_mask": {0: "batch", 1: "seq"}}),
        ("vit", {"pixel_values": {0: "batch"}}),
        ("wav2vec2", {"input_values": {0: "batch"}}),
        ("ast", {"input_values": {0: "batch"}}),
        (
            "clip",
            {
                "input_ids": {0: "batch", 1: "seq"},
                "attention_mask": {0: "batch", 1: "seq"},
                "pixel_values": {0: "images"},
            },
        ),
        ("whisper", {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch"}}),
        (
            "t5",
            {
                "input_ids": {0: "batch", 1: "seq"},
                "attention_mask": {0: "batch", 1: "seq"},
                "decoder_input_ids": {0: "batch", 1: "target_seq"},
            },
        ),
    ],
)
def test_the_model_takes_them(name: str, axes: dict[str, Any]) -> None:
    model = ENTRIES[name].build()
    inputs = huggingface_inputs(model)
    assert inputs.dynamic == axes
    with torch.no_grad():
        model(**inputs.kwargs)


def test_a_cache_is_switched_off_and_the_axes_stay_dynamic() -> None:
    model = ENTRIES["gpt2"].build()
    model.config.use_cache = True
    inputs = huggingface_inputs(model)
    assert inputs.kwargs["use_cache"] is False
    fast = graphopt.compile(
        model, example_kwargs=inputs.kwargs, dynamic_shapes=inputs.dynamic, measure=False
    )
    ids = torch.randint(20, (3, 9))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    torch.testing.assert_close(fast(**given).logits, model(**given).logits, rtol=1e-4, atol=1e-5)


class Tokenizer:
    """Pads with what it has, as the tokenizers of GPT-2 and Llama do."""

    def __init__(self) -> None:
        self.pad_token, self.eos_token = None, "</s>"

    def __call__(self, texts: list[str], **options: Any) -> dict[str, torch.Tensor]:
        assert self.pad_token == "</s>" and options == {"padding": True, "return_tensors": "pt"}
        ids = torch.ones(len(texts), 5, dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": ids, "token_type_ids": ids * 0}


def test_a_tokenizer_without_padding_gets_one_and_unknown_inputs_are_left_out() -> None:
    model = ENTRIES["gpt2"].build()
    kwargs = huggingface_inputs(model, Tokenizer()).kwargs
    assert kwargs["input_ids"].shape == (len(SENTENCES), 5)
    distil = huggingface_inputs(ENTRIES["distilbert"].build(), Tokenizer()).kwargs
    assert set(distil) == {"input_ids", "attention_mask"}


def test_a_main_input_of_another_kind_is_refused() -> None:
    class Graphs(nn.Module):
        main_input_name = "nodes"

        def forward(self, nodes: torch.Tensor) -> torch.Tensor:
            return nodes

    with pytest.raises(GraphoptError, match="cannot guess inputs for Graphs"):
        huggingface_inputs(Graphs())


def test_a_folder_without_a_tokenizer_has_none() -> None:
    def refuse() -> None:
        raise LoadError("no tokenizer")

    assert tokenizer_of(SimpleNamespace(tokenizer=refuse)) is None
    assert tokenizer_of(SimpleNamespace(tokenizer=lambda: "found")) == "found"
