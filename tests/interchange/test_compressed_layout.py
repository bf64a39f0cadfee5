"""The layouts of compressed-tensors: laid out by loops, and by the library where it is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checkpoints import numbers, packed, random_layer
from torch import Tensor

from graphopt.errors import LoadError
from graphopt.interchange.compressed_tensors import CompressedTensors, refusal, written
from graphopt.interchange.declared import declared
from graphopt.kernels.quantized import QuantizedWeight, Scheme, Static, quantize

SHAPE = (96, 64)


def packed_layer(bits: int, group: int, symmetric: bool) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of ``pack-quantized``, and the numbers that they stand for."""
    codes, scales, zeros = random_layer(SHAPE, bits, group, 3)
    middle = 1 << bits - 1
    zeros = torch.full_like(zeros, middle) if symmetric else zeros
    stored = {
        "weight_packed": packed(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(SHAPE),
    }
    if not symmetric:
        stored["weight_zero_point"] = packed(zeros.t(), bits).t().contiguous()
    return stored, numbers(codes, scales, zeros, torch.arange(SHAPE[1]) // group)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_packed_codes_are_read_exactly(bits: int, group: int, symmetric: bool) -> None:
    stored, wanted = packed_layer(bits, group, symmetric)
    layout = CompressedTensors("pack-quantized", bits, group, symmetric)
    for leaf, want in layout.wanted(*SHAPE).items():
        assert want.optional or tuple(stored[leaf].shape) in want.shapes
    found = layout.read(stored, *SHAPE).weight
    assert torch.equal(found.dequantize(), wanted)
    assert torch.equal(found.scales, stored["weight_scale"])
    if bits in (1, 5, 7):  # held in more
        return
    again, _ = written(found, "none")
    assert all(torch.equal(again[leaf], stored[leaf]) for leaf in stored)


def test_codes_with_gaps_of_older_writers() -> None:
    """3 bits, ten to a word: two bits of each word are empty."""
    stored, wanted = packed_layer(3, 16, True)
    codes, _, _ = random_layer(SHAPE, 3, 16, 3)
    rows = torch.nn.functional.pad(codes, (0, 6)).unflatten(1, (7, 10))
    words = sum(rows[..., k] << (3 * k) for k in range(10))
    stored["weight_packed"] = torch.as_tensor(words).to(torch.int32)
    layout = CompressedTensors("pack-quantized", 3, 16)
    assert (96, 7) in layout.wanted(*SHAPE)["weight_packed"].shapes
    assert torch.equal(layout.read(stored, *SHAPE).weight.dequantize(), wanted)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_int8_and_float8(per_tensor: bool) -> None:
    scales = torch.tensor([0.25]) if per_tensor else torch.rand(96, 1) + 0.5
    codes = torch.randint(-128, 128, SHAPE, dtype=torch.int8)
    layout = CompressedTensors("int-quantized", 8, None, True, per_tensor, "dynamic")
    found = layout.read({"weight": codes, "weight_scale": scales}, *SHAPE)
    assert torch.equal(found.weight.codes, codes) and found.activations == "dynamic"
    assert torch.equal(found.weight.dequantize(), codes.float() * scales)
    floats = torch.randn(SHAPE).to(torch.float8_e4m3fn)
    layout = CompressedTensors("float-quantized", 8, None, True, per_tensor, "dynamic")
    found = layout.read({"weight": floats, "weight_scale": scales}, *SHAPE)
    assert torch.equal(found.weight.dequantize(), floats.float() * scales)


def test_int8_with_zero_points() -> None:
    codes = torch.randint(-128, 128, SHAPE, dtype=torch.int8)
    zeros = torch.randint(-128, 128, (96, 1), dtype=torch.int8)
    raw = {"weight": codes, "weight_scale": torch.ones(96, 1), "weight_zero_point": zeros}
    layout = CompressedTensors("int-quantized", 8, None, False)
    found = layout.read(raw, *SHAPE).weight
    assert torch.equal(found.dequantize(), codes.float() - zeros.float())
    made, _ = written(found, "dynamic")
    assert all(torch.equal(made[leaf], raw[leaf]) for leaf in raw)


SCHEMES = [
    (Scheme(8), "dynamic"),
    (Scheme(8, "fp8"), "dynamic"),
    (Scheme(8), "none"),
    (Scheme(6, group_size=32), "none"),
    (Scheme(4, group_size=32), "dynamic"),
    (Scheme(3), "none"),
    (Scheme(4, "nvfp4"), "none"),
    (Scheme(4, "mxfp4"), "none"),
]


@pytest.mark.parametrize(("scheme", "activations"), SCHEMES, ids=str)
def test_what_is_written_is_read_again(scheme: Scheme, activations: str) -> None:
    torch.manual_seed(0)
    weight = quantize(torch.randn(50, 96), scheme)  # words and bytes that are not full
    assert refusal(weight) is None
    tensors, layout = written(weight, activations)
    for leaf, want in layout.wanted(50, 96).items():
        if leaf in tensors or not want.optional:
            assert tuple(tensors[leaf].shape) in want.shapes
            assert tensors[leaf].dtype in want.dtypes
    found = layout.read(tensors, 50, 96)
    assert found.activations == activations and found.weight.scheme == scheme
    for name, tensor in weight.tensors.items():
        same = found.weight.tensors[name]
        if name == "tensor_scale":  # stored as its reciprocal
            torch.testing.assert_close(same, tensor, rtol=2e-7, atol=0)
        else:
            assert torch.equal(same.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("static", [Static(0.015625, 3), Static(0.25, 128), Static(2.0, 255)])
def test_static_activations_are_written_and_read_again(static: Static) -> None:
    weight = quantize(torch.randn(50, 96), Scheme(8))
    tensors, layout = written(weight, "static", static)
    for leaf, want in layout.wanted(50, 96).items():
        if not want.optional:
            assert tuple(tensors[leaf].shape) in want.shapes
            assert tensors[leaf].dtype in want.dtypes
    found = layout.read(tensors, 50, 96)
    assert (found.activations, found.static) == ("static", static)
    whole = {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False}
    given = config(input_activations=whole, format="int-quantized", num_bits=8)
    plain = declared(given, "config.json").layout("q_proj")
    assert isinstance(plain, CompressedTensors)
    assert (plain.activations, plain.zero_input) == ("static", False)
    with pytest.raises(ValueError, match="input_scale is 0"):
        layout.read(tensors | {"input_scale": torch.zeros(1)}, 50, 96)


def test_what_the_formats_cannot_hold() -> None:
    weight = torch.randn(32, 64)
    assert "no nf4" in str(refusal(quantize(weight, Scheme(4, "nf4", 32))))
    fractions = quantize(weight, Scheme(4, group_size=32, symmetric=False))
    assert "integers for zero points" in str(refusal(fractions))


def config(**weights: Any) -> dict[str, Any]:
    acts = weights.pop("input_activations", None)
    form = weights.pop("format", "pack-quantized")
    base = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": base | weights, "input_activations": acts}
    facts = {"quant_method": "compressed-tensors", "format": form, "ignore": ["lm_head"]}
    return facts | {"config_groups": {"group_0": group}}


def test_targets_and_ignored_layers() -> None:
    given = config()
    given["ignore"].append("re:.*down_proj$")
    other = {"targets": ["re:.*q_proj$"], "weights": {"num_bits": 8, "strategy": "channel"}}
    given["config_groups"]["group_1"] = other
    said = declared(given, "config.json")
    assert said.layout("lm_head") is None and said.layout("layers.0.down_proj") is None
    assert said.layout("layers.0.q_proj") == CompressedTensors("pack-quantized", 8)
    assert said.layout("layers.0.up_proj") == CompressedTensors("pack-quantized", 4, 32)


TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "marlin-24"}, "'marlin-24'"),
        ({"format": "int-quantized", "num_bits": 16}, "of 16 bits int"),
        ({"strategy": "block", "group_size": None}, "scales per 'block'"),
        ({"group_size": "many"}, "group_size is 'many'"),
        ({"input_activations": TOKENS | {"dynamic": False}}, "static"),
        ({"input_activations": TOKENS | {"num_bits": 4}}, "activations of 4 bits"),
        ({"input_activations": TOKENS | {"strategy": "group"}}, "per group"),
    ],
)
def test_configs_that_cannot_be_read(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(LoadError, match=reason) as caught:
        declared(config(**changes), "config.json").layout("layers.0.q_proj")
    assert caught.value.fix and "config.json" in str(caught.value.where)


def test_dynamic_activations_per_token() -> None:
    said = declared(config(input_activations=TOKENS, format="int-quantized"), "config.json")
    layout = said.layout("q_proj")
    assert isinstance(layout, CompressedTensors) and layout.activations == "dynamic"
    said = declared(config(input_activations=TOKENS | {"strategy": "tensor"}), "config.json")
    assert said.layout("q_proj") and "finer than per tensor" in said.notes[0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_the_library_writes(bits: int, symmetric: bool) -> None:
    """`compressed_tensors`' own compressor, its own decompression beside ours."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    limit = 1 << bits - 1
    zeros = torch.randint(-limit, limit, (96, 2), dtype=torch.int8) * (not symmetric)
    given = {
        "weight": torch.randn(SHAPE),
        "weight_scale": torch.rand(96, 2) + 0.1,
        "weight_zero_point": zeros,
    }
    library = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = library.compress(given, scheme)
    theirs = library.decompress(dict(stored), scheme)["weight"]
    found = CompressedTensors("pack-quantized", bits, 32, symmetric).read(stored, *SHAPE).weight
    assert torch.equal(found.dequantize(), theirs)
    assert _codes(found) == bits
    again, _ = written(found, "none")
    assert all(torch.equal(again[leaf], stored[leaf]) for leaf in again)


def _codes(weight: QuantizedWeight) -> int:
    return weight.scheme.bits
