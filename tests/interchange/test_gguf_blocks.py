"""Blocks of GGUF files: against the gguf package, and models against their dequantized selves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import error, llama, logits

from graphopt.errors import LoadError
from graphopt.interchange.gguf import TYPES, weight_of
from graphopt.interchange.modules import QuantizedEmbedding, QuantizedLinear
from graphopt.kernels.quantized import Scheme
from graphopt.loading import load_model

HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 numbers of blocks stand whose quantizer is in C alone."""


def half(number: float) -> list[int]:
    return list(np.float16(number).tobytes())


def test_the_bytes_of_small_blocks() -> None:
    """One block each: code k of 32 is k modulo 16, or k - 16."""
    nibbles = [low | high << 4 for low, high in zip(range(16), range(16), strict=True)]
    codes = torch.arange(32)
    q4_0 = weight_of("Q4_0", torch.tensor([half(-0.5) + nibbles], dtype=torch.uint8))
    assert torch.equal(q4_0.dequantize()[0], (codes % 16 - 8) * -0.5)
    assert q4_0.scheme == Scheme(4, group_size=32) and q4_0.scales.dtype == torch.float16
    q4_1 = weight_of("Q4_1", torch.tensor([half(0.5) + half(-3.0) + nibbles], dtype=torch.uint8))
    assert torch.equal(q4_1.dequantize()[0], (codes % 16) * 0.5 - 3)
    signed = [(k - 16) % 256 for k in range(32)]
    q8_0 = weight_of("Q8_0", torch.tensor([half(0.25) + signed], dtype=torch.uint8))
    assert torch.equal(q8_0.dequantize()[0], (codes - 16) * 0.25)


def test_a_group_without_a_scale_is_its_minimum() -> None:
    block = torch.tensor([half(0.0) + half(-3.0) + [0x21] * 16], dtype=torch.uint8)
    assert torch.equal(weight_of("Q4_1", block).dequantize(), torch.full((1, 32), -3.0))


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_against_the_gguf_package(kind: str) -> None:
    gguf = pytest.importorskip("gguf")
    draw = np.random.default_rng(0)
    code, size = gguf.GGMLQuantizationType[kind], TYPES[kind].bytes
    if kind in HALVES:
        stored = draw.integers(0, 256, (6, 512 // TYPES[kind].numbers * size), dtype=np.uint8)
        for place in HALVES[kind]:
            numbers = np.float16(draw.random(stored.size // size) * 0.01)
            blocks = stored.reshape(-1, size)
            blocks[:, place : place + 2] = numbers.view(np.uint8).reshape(-1, 2)
    else:
        stored = gguf.quantize(draw.standard_normal((6, 512)).astype(np.float32), code)
    wanted = torch.from_numpy(gguf.dequantize(stored, code))
    found = weight_of(kind, torch.from_numpy(stored))
    if TYPES[kind].middle is not None:
        assert torch.equal(found.dequantize(), wanted)
    else:
        torch.testing.assert_close(
            found.dequantize(), wanted, rtol=0, atol=2e-7 * wanted.abs().max()
        )


def test_damaged_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="no whole blocks of Q4_0"):
        weight_of("Q4_0", torch.zeros((2, 35), dtype=torch.uint8))
    with pytest.raises(ValueError, match="NaN or infinity"):
        weight_of("Q8_0", torch.full((1, 34), 0xFF, dtype=torch.uint8))


def small_file(path: Path, tied: bool = False, kind: str = "Q4_1", **options: Any) -> None:
    """A Llama as llama.cpp stores it: rows of q and k in the order of its rotary embedding."""
    gguf = pytest.importorskip("gguf")
    model = llama(tie_word_embeddings=tied, **options)
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_context_length(64)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        place = names.get_name(name, try_suffixes=(".weight",))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        numbers = tensor.numpy()
        for part, count in heads.items():
            if part in name:
                split = numbers.reshape(count, 2, len(numbers) // count // 2, -1)
                numbers = split.swapaxes(1, 2).reshape(numbers.shape)
        code = gguf.GGMLQuantizationType[kind if tensor.dim() == 2 else "F32"]
        if "embed" in name:
            code = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(place, gguf.quantize(np.ascontiguousarray(numbers), code), raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_model_equals_its_dequantized_self(kind: str, tied: bool, tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf", tied, kind)
    loaded = load_model(tmp_path / "m.gguf")
    module: Any = loaded.module
    assert any(
        f"read as they are stored: {14 + (not tied)} of {kind}" in n or kind == "Q8_0"
        for n in loaded.notes
    )
    kinds = [type(m) for m in module.modules()]
    assert kinds.count(QuantizedLinear) == 15 and kinds.count(QuantizedEmbedding) == 1
    wanted = load_model(tmp_path / "m.gguf", dequantize=True)
    assert any("dequantized to float32" in n for n in wanted.notes)
    assert error(logits(module), logits(wanted.module)) < 2e-6
    table, head = module.model.embed_tokens, module.lm_head
    assert (table.weight_codes is head.weight_codes) == tied


def test_types_that_no_scheme_holds_are_dequantized(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf", False, "F16")
    module: Any = load_model(tmp_path / "m.gguf").module
    assert type(module.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert isinstance(module.model.embed_tokens, QuantizedEmbedding)
    wanted = load_model(tmp_path / "m.gguf", dequantize=True).module
    assert error(logits(module), logits(wanted).float()) < 1e-2


def test_cut_files_are_refused(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(whole[: len(whole) - 200])
    with pytest.raises(LoadError, match="lies outside the file"):
        load_model(tmp_path / "m.gguf")
