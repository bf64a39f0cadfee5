"""A quantized Hugging Face model generates: one module for the prompt and for each new token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.passes import QuantizeMatmul
from graphopt.passes.quantize.plan import rounded

transformers = pytest.importorskip("transformers")

LAYERS = 2


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=192,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return transformers.LlamaForCausalLM(config).eval()


def padding(model: Any, length: int = 1) -> Any:
    """A cache with nothing to see in it: padding on the left of a prompt."""
    cache, dtype = transformers.DynamicCache(config=model.config), model.dtype
    for layer in range(LAYERS):
        cache.update(*torch.zeros(2, 1, 2, length, 16, dtype=dtype), layer)
    return cache


def example(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    with torch.no_grad():
        cache = model.to(dtype)(torch.randint(192, (1, 16)), use_cache=True).past_key_values
    mask = torch.ones(1, 19, dtype=torch.int64)
    mask[0, 0] = 0
    return {
        "input_ids": torch.randint(192, (1, 3)),
        "attention_mask": mask,
        "past_key_values": cache,
    }


SHAPES = {
    "input_ids": {1: "tokens"},
    "attention_mask": {1: "seen"},
    "past_key_values": [{2: "past"}] * (2 * LAYERS),
}


def generate(model: Any, start: Any, prompt: Tensor, count: int) -> list[int]:
    """Greedy decoding, as README has it."""
    cache, tokens, mask, made = start, prompt, torch.zeros(1, 1, dtype=torch.int64), []
    for _ in range(count):
        mask = torch.cat([mask, torch.ones_like(tokens)], 1)
        out = model(input_ids=tokens, attention_mask=mask, past_key_values=cache)
        cache, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)
        made.append(int(tokens))
    return made


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    model = llama()
    small = QuantizeMatmul(bits=4, group_size=32, activations=None, head=True, embeddings=True)
    made = graphopt.compile(
        model, example_kwargs=example(model), dynamic_shapes=SHAPES, passes=["exact", small]
    )
    return model, made


def rounded_twin(model: Any) -> Any:
    """The model with the numbers that the quantized weights stand for."""
    twin = llama()
    twin.load_state_dict(model.state_dict())
    small = QuantizeMatmul(bits=4, group_size=32, activations=None, head=True, embeddings=True)
    for weight in {p for p in twin.parameters() if p.dim() == 2}:
        weight.data = rounded(weight.data, small.scheme, small._methods).dequantize()
    return twin


@torch.no_grad()
def test_a_quantized_model_generates_what_its_rounded_twin_does(pair: tuple[Any, Any]) -> None:
    model, made = pair
    assert made.report.verified
    told = [any("cache were drawn" in note for note in c.notes) for c in made.report.whole]
    assert not any(told[:2]) and any(told[2:])  # the capture itself and its inputs are held
    twin = rounded_twin(model)
    prompt = torch.randint(192, (1, 7))
    found = generate(made, padding(model), prompt, 12)
    assert found == generate(twin, padding(model), prompt, 12)
    wanted = twin.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert found == wanted[0, 7:].tolist()
