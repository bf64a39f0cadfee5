"""Text from ONNX files is the text of the torch model, token by token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.emit.onnx_folder import export_onnx_folder
from graphopt.errors import GraphoptError, LoadError
from graphopt.huggingface_decoding import whole_sequences
from graphopt.passes import QuantizeMatmul
from graphopt.passes.quantize.plan import rounded

pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

from graphopt.generation import OnnxCausalLM  # noqa: E402

WINDOW = 6
SIZES = {
    "vocab_size": 192,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
"""Weights so large that texts do not repeat themselves."""


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES))


def gpt2() -> Any:
    sizes = {"vocab_size": 192, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    config = transformers.GPT2Config(**sizes, initializer_range=0.2, eos_token_id=1, bos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def gemma3() -> Any:
    kinds = ["sliding_attention", "full_attention"]
    heads = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
    config = transformers.Gemma3TextConfig(
        **SIZES, **heads, layer_types=kinds, tie_word_embeddings=False
    )
    return transformers.Gemma3ForCausalLM(config)


def bloom() -> Any:
    sizes = {"vocab_size": 192, "hidden_size": 64, "n_layer": 2, "n_head": 4}
    config = transformers.BloomConfig(**sizes, initializer_range=0.2, tie_word_embeddings=False)
    return transformers.BloomForCausalLM(config)


FAMILIES = {f.__name__: f for f in (llama, qwen2, gpt2, gemma3, bloom)}


def build(name: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[name]().eval()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model, folder = build(request.param), tmp_path_factory.mktemp("text") / "out"
    export_onnx_folder(model, folder, passes="exact", measure=False)
    return model, OnnxCausalLM(folder)


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model, folder = build("llama"), tmp_path_factory.mktemp("llama") / "out"
    export_onnx_folder(model, folder, passes=[], measure=False)
    return model, folder


def test_a_token_at_a_time_whatever_the_model_was_trained_with(
    llamas: tuple[Any, Path], tmp_path: Path
) -> None:
    """Configs of trained models say ``use_cache: false``, which made each token a whole prompt."""
    folder = shutil.copytree(llamas[1], tmp_path / "trained")
    (folder / "generation_config.json").write_text('{"use_cache": false, "eos_token_id": null}')
    fast, sizes = OnnxCausalLM(folder), []
    run = fast._run
    fast._run = lambda values, past: sizes.append(values["input_ids"].shape[1]) or run(values, past)
    fast.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False)
    assert sizes == [5, 1, 1, 1]


def test_torch_keeps_one_thread_while_a_file_generates(
    llamas: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    fast, seen = OnnxCausalLM(llamas[1], threads=2), []
    run, before = fast._run, torch.get_num_threads()
    monkeypatch.setattr(fast, "_run", lambda *a: seen.append(torch.get_num_threads()) or run(*a))
    torch.set_num_threads(2)
    try:
        fast.generate(torch.arange(5)[None], max_new_tokens=2, do_sample=False)
        with pytest.raises(ValueError, match="greater than 0"):
            fast.generate(torch.arange(5)[None], max_new_tokens=-1)
        assert seen == [1, 1] and torch.get_num_threads() == 2
        fast.generate(torch.arange(5)[None], max_new_tokens=3, assistant_model=llamas[0])
        assert set(seen[2:]) == {2}
    finally:
        torch.set_num_threads(before)


def batch() -> dict[str, Tensor]:
    """Three rows, two of which are padded on their left."""
    ids = torch.randint(2, 192, (3, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def same(model: Any, file: Any, **options: Any) -> Tensor:
    """What both generate, which must be one text."""
    found = []
    for able in (model, file):
        torch.manual_seed(1)
        found.append(able.generate(**{"eos_token_id": None, "pad_token_id": 0, **options}))
    assert torch.equal(*found)
    return found[0]


def test_greedy_tokens_are_those_of_the_model(pair: tuple[Any, Any]) -> None:
    made = same(*pair, **batch(), do_sample=False, max_new_tokens=30)
    assert made.shape == (3, 39) and len(made[0, 9:].unique()) > 5
    alone = same(*pair, input_ids=batch()["input_ids"][:1], do_sample=False, max_new_tokens=30)
    assert alone.shape == (1, 39)
    same(*pair, input_ids=torch.tensor([[7]]), do_sample=False, max_new_tokens=5)


def test_sampled_tokens_are_too(pair: tuple[Any, Any]) -> None:
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "max_new_tokens": 20}
    made = same(*pair, **batch(), do_sample=True, **options)
    assert not torch.equal(made, same(*pair, **batch(), do_sample=False, max_new_tokens=20))


def test_beams_reorder_the_cache(llamas: tuple[Any, Path]) -> None:
    same(llamas[0], OnnxCausalLM(llamas[1]), **batch(), num_beams=3, max_new_tokens=12)


def test_a_row_ends_with_its_eos(llamas: tuple[Any, Path]) -> None:
    file = OnnxCausalLM(llamas[1], threads=1)
    free = same(llamas[0], file, **batch(), do_sample=False, max_new_tokens=12)
    last = int(free[1, 12])
    ended = same(llamas[0], file, **batch(), max_new_tokens=12, eos_token_id=last, pad_token_id=0)
    assert int(ended[1, 12]) == last and not ended[1, 13:].any()


def test_the_cache_goes_on(llamas: tuple[Any, Path]) -> None:
    """A cache that is given is written, and read where it lies."""
    file, cache = OnnxCausalLM(llamas[1]), transformers.DynamicCache()
    ids = batch()["input_ids"][:1]
    first = file(ids[:, :5], past_key_values=cache)
    held = cache.layers[0].keys
    assert held.shape == (1, 2, 5, 16) and first.logits.shape == (1, 5, 192)
    bound: dict[str, int] = {}
    run = file._run
    file._run = lambda values, past: bound.update(first=past[0].data_ptr()) or run(values, past)
    rest = file(ids[:, 5:], past_key_values=cache)
    assert bound["first"] == held.data_ptr() and cache.get_seq_length() == 9
    with torch.no_grad():
        wanted = llamas[0](ids).logits
    torch.testing.assert_close(
        torch.cat([first.logits, rest.logits], 1), wanted, rtol=1e-3, atol=1e-4
    )


def test_without_a_cache_the_text_is_the_same(llamas: tuple[Any, Path]) -> None:
    file = OnnxCausalLM(llamas[1])
    same(llamas[0], file, **batch(), do_sample=False, max_new_tokens=4, use_cache=False)
    assert file(batch()["input_ids"], use_cache=False).to_tuple()[1:] == ()
    assert isinstance(file(batch()["input_ids"], return_dict=False), tuple)


def test_what_a_file_cannot_do_is_refused(llamas: tuple[Any, Path]) -> None:
    file, ids = OnnxCausalLM(llamas[1]), torch.tensor([[5, 6, 7]])
    with pytest.raises(GraphoptError, match="cannot be the cache of an ONNX file"):
        file.generate(ids, max_new_tokens=3, cache_implementation="static", eos_token_id=None)
    with pytest.raises(GraphoptError, match=r"attention_mask is \(1, 2\).*0 in the cache"):
        file(ids, attention_mask=torch.ones(1, 2))
    cache = file(ids).to_tuple()[1]
    with pytest.raises(GraphoptError, match=r"of 1 rows.*input 2 rows"):
        file(ids.repeat(2, 1), past_key_values=cache)
    with pytest.raises(GraphoptError, match="no state dict"):
        file.save_pretrained("anywhere")
    with pytest.raises(GraphoptError, match="input_ids is int32"):
        file(ids.int())


def test_folders_that_do_not_decode_are_refused(llamas: tuple[Any, Path], tmp_path: Path) -> None:
    import onnx

    with pytest.raises(LoadError, match=r"no model\.onnx"):
        OnnxCausalLM(tmp_path)
    folder = tmp_path / "other"
    shutil.copytree(llamas[1], folder)
    model = onnx.load(folder / "model.onnx")
    model.graph.input[0].name = "tokens"
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(LoadError):
        OnnxCausalLM(folder)
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(LoadError):
        OnnxCausalLM(folder)
    del model


def test_four_bits_say_what_their_numbers_say(tmp_path: Path) -> None:
    """Logits are those of a torch model with the numbers that the codes stand for, up to what
    products lose that round activations to eight bits."""
    model = build("llama")
    small = QuantizeMatmul(bits=4, group_size=32, activations=None, head=True, embeddings=True)
    result = export_onnx_folder(model, tmp_path / "out", passes=["exact", small], measure=False)
    assert any("MatMulNBits(4 bits" in note for note in result.file.notes)
    twin = build("llama")
    for weight in {p for p in twin.parameters() if p.dim() == 2}:
        weight.data = rounded(weight.data, small.scheme, small._methods).dequantize()
    file = OnnxCausalLM(tmp_path / "out")
    with torch.no_grad():
        found, rounding, free = (able(batch()["input_ids"]).logits for able in (file, twin, model))
    assert float((found - rounding).norm() / rounding.norm()) < 0.05
    assert float((found - free).norm() / free.norm()) > 0.15
    made = file.generate(**batch(), do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert torch.equal(made[:, 9], found_next(twin))


def found_next(model: Any) -> Tensor:
    """The tokens behind the batch, one for each row."""
    made: Tensor = model.generate(**batch(), do_sample=False, max_new_tokens=1, eos_token_id=None)
    return made[:, 9]


def test_whole_sequences_stand_behind_a_masked_position(llamas: tuple[Any, Path]) -> None:
    from graphopt.huggingface_decoding import decoding

    model, ids = llamas[0], batch()["input_ids"]
    example = decoding(model).inputs.kwargs
    call = whole_sequences(example, ids)
    with torch.no_grad():
        found, wanted = model(**call).logits, model(ids).logits
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert call["attention_mask"].shape == (3, 10)


def test_the_folder_tells_its_defaults(llamas: tuple[Any, Path], tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(llamas[1], folder)
    given = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**given, "max_new_tokens": 3}))
    made = OnnxCausalLM(folder).generate(torch.tensor([[5, 6]]), eos_token_id=None)
    assert made.shape == (1, 5)
