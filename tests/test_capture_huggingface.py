"""Hugging Face models: flags, names, labels, caches, and modules that contain them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.capture import capture
from graphopt.emit.guards import CallBinder, InputGuard
from graphopt.errors import CaptureError, GraphoptError
from graphopt.program import Program
from graphopt.source import source_line

transformers = pytest.importorskip("transformers")

TOKENS = {0: "batch", 1: "seq"}
TINY = {
    "vocab_size": 99,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**TINY)).eval()


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY)).eval()


def inputs(batch: int = 2, seq: int = 5) -> dict[str, Any]:
    ids = torch.randint(99, (batch, seq))
    mask = torch.ones_like(ids)
    mask[-1, -1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def call(program: Program, *args: Any, **kwargs: Any) -> Any:
    flat = CallBinder(program)(args, kwargs)
    InputGuard(program)(flat)
    assert program.call is not None
    return pytree.tree_unflatten(program.run(flat), program.call.out_spec)


@torch.no_grad()
def test_an_encoder_serves_other_sizes_and_ways_to_call_it() -> None:
    model = bert()
    program = capture(model, (), inputs(), dynamic_shapes=dict.fromkeys(inputs(), TOKENS))
    assert set(program.axis_names.values()) == {"batch", "seq"}
    assert any("(`seq`) must be at most 32" in note for note in program.notes)
    for batch, seq in ((2, 5), (1, 32), (4, 1)):
        example = inputs(batch, seq)
        wanted = model(**example)
        found = call(program, **example)
        assert type(found) is type(wanted)
        assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
        by_position = call(program, example["input_ids"], example["attention_mask"])
        assert torch.equal(by_position.pooler_output, wanted.pooler_output)
    with pytest.raises(GraphoptError, match="`seq` must be between 1 and 32"):
        call(program, **inputs(2, 33))


def test_flags_become_part_of_the_program() -> None:
    model, example = llama(), inputs()
    program = capture(model, (), {**example, "use_cache": False, "return_dict": False})
    assert [n.name for n in program.user_inputs()] == list(example)
    flags = {"use_cache": False, "return_dict": False}
    assert isinstance(call(program, **example, **flags), tuple)
    with pytest.raises(GraphoptError, match="captured with use_cache=False, not True"):
        call(program, **example, use_cache=True)
    with pytest.raises(GraphoptError, match="captured with position_ids=None, not a tensor"):
        call(program, **example, **flags, position_ids=torch.arange(5)[None])
    assert "forward" not in vars(model)


@pytest.mark.parametrize("usual", [True, False])
def test_a_flag_may_be_left_out_where_the_config_says_the_same(usual: bool) -> None:
    model, example = llama(), inputs()
    model.config.use_cache = usual
    program = capture(model, (), {**example, "use_cache": False, "output_attentions": False})
    assert call(program, **example, use_cache=False).past_key_values is None
    if usual:
        with pytest.raises(GraphoptError, match="needs use_cache=False: it was captured so"):
            call(program, **example)
    else:
        assert call(program, **example).past_key_values is None


def test_a_flag_that_changes_nothing_may_be_left_out() -> None:
    """An encoder keeps no cache, whatever its config says."""
    model, example = bert(), inputs()
    assert model.config.use_cache
    program = capture(model, (), {**example, "use_cache": False, "output_attentions": True})
    assert call(program, **example, output_attentions=True).attentions is not None
    with pytest.raises(GraphoptError, match="needs output_attentions=True"):
        call(program, **example)


def test_a_cache_is_returned_as_the_model_returns_it() -> None:
    model, example = llama(), inputs()
    found = call(capture(model, (), example), **example).past_key_values
    wanted = model(**example).past_key_values
    assert type(found) is type(wanted)
    assert torch.equal(found.layers[0].keys, wanted.layers[0].keys)


def test_a_model_trains_on_its_labels() -> None:
    model = llama().train()
    example = {**inputs(), "use_cache": False}
    example["labels"] = example["input_ids"]
    names = [k for k in example if k != "use_cache"]
    program = capture(model, (), example, dynamic_shapes=dict.fromkeys(names, TOKENS))
    fresh = inputs(3, 7)
    fresh["labels"] = fresh["input_ids"]
    call(program, **fresh, use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(**fresh).loss.backward()
    assert all(torch.equal(p.grad, found[name]) for name, p in model.named_parameters())


def test_a_backward_that_equals_the_derivative_is_traced() -> None:
    config = transformers.BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2)
    model, example = transformers.BloomModel(config).train(), inputs()
    config.hidden_dropout = config.attention_dropout = 0.0
    program = capture(model, (), {**example, "use_cache": False})
    name = "h.0.mlp.dense_h_to_4h.weight"
    weight = program.state[name]
    (found,) = torch.autograd.grad(
        call(program, **example, use_cache=False)[0].square().sum(), weight
    )
    (wanted,) = torch.autograd.grad(model(**example)[0].square().sum(), weight)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_module_around_a_model_is_captured_with_its_patches() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = bert()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask[..., None].float()
            return (hidden * weights).sum(1) / weights.sum(1)

    model, example = Pooled().eval(), inputs()
    program = capture(model, (), example, dynamic_shapes=dict.fromkeys(example, TOKENS))
    fresh = inputs(3, 9)
    assert torch.equal(call(program, **fresh), model(**fresh))


def test_lines_point_into_the_modeling_file() -> None:
    program = capture(bert(), (), inputs())
    lines = [source_line(n) for n in program.graph.nodes if n.op == "call_function"]
    files = {line.rsplit(":", 1)[0].rsplit("/", 1)[-1] for line in lines if line}
    assert files == {"modeling_bert.py"}


def test_positions_computed_from_values_are_refused_at_the_models_line() -> None:
    class Skips(transformers.BertModel):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids if input_ids.max() > 3 else -input_ids  # here

    with pytest.raises(CaptureError) as caught:
        capture(Skips(transformers.BertConfig(**TINY)).eval(), (), {"input_ids": torch.ones(2, 3)})
    assert str(caught.value.where).startswith(__file__)
