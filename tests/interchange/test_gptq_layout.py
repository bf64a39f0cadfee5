"""The GPTQ layout: folders built bit by bit are read exactly, and what is written is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from checkpoints import GROUP, IDS, error, gptq_folder, gptq_layer, linears, logits

import graphopt
from graphopt.errors import LoadError
from graphopt.interchange.gptq import Gptq, refusal, written
from graphopt.interchange.modules import QuantizedLinear
from graphopt.kernels.quantized import QuantizedWeight, Scheme, quantize
from graphopt.loading import load_model

SHAPE = (96, 64)


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_is_read_exactly(bits: int, order: bool, less_one: bool) -> None:
    stored, wanted = gptq_layer(SHAPE, bits, GROUP, 1, less_one, order)
    layout = Gptq(bits, GROUP, less_one)
    for leaf, want in layout.wanted(*SHAPE).items():
        assert tuple(stored[leaf].shape) in want.shapes and stored[leaf].dtype in want.dtypes
    found = layout.read(stored, *SHAPE)
    assert (found.order is not None) == order
    read = found.weight.dequantize()
    columns = wanted if found.order is None else wanted[:, found.order]
    assert torch.equal(read, columns)
    assert torch.equal(found.weight.scales, stored["scales"].t())
    again, same = written(found.weight, found.order, less_one=less_one)
    assert same == layout
    assert again.keys() == stored.keys()
    assert all(torch.equal(again[leaf], stored[leaf]) for leaf in stored)


def test_zeros_in_the_middle_make_a_symmetric_layer() -> None:
    stored, _ = gptq_layer(SHAPE, 4, GROUP, 1, True, False)
    stored["qzeros"].fill_(0x77777777)
    found = Gptq(4, GROUP).read(stored, *SHAPE)
    assert found.weight.scheme == Scheme(4, group_size=GROUP)


@pytest.mark.parametrize(
    ("bits", "form", "order"),
    [(4, "gptq", False), (4, "gptq_v2", True), (3, "gptq", True), (8, "gptq", False)],
)
def test_a_folder_equals_its_float_model(bits: int, form: str, order: bool, tmp_path: Path) -> None:
    wanted = gptq_folder(tmp_path / "q", bits, form, order)
    loaded = load_model(tmp_path / "q")
    module: Any = loaded.module
    layers = [m for m in module.modules() if isinstance(m, QuantizedLinear)]
    assert len(layers) == len(linears(wanted)) == 14
    assert error(logits(module), logits(wanted)) < 1e-6
    assert any(
        f"14 quantized layers read as they are stored (GPTQ, {bits}" in n for n in loaded.notes
    )
    floats: Any = load_model(tmp_path / "q", dequantize=True).module
    assert not any(isinstance(m, QuantizedLinear) for m in floats.modules())
    for name, layer in linears(wanted).items():
        assert torch.equal(floats.get_submodule(name).weight, layer.weight)


def test_the_captured_program_calls_the_operator(tmp_path: Path) -> None:
    wanted = gptq_folder(tmp_path / "q", order=True)
    module: Any = load_model(tmp_path / "q").module
    call = {"input_ids": IDS, "use_cache": False}
    fast = graphopt.compile(module, example_kwargs=call, measure=False)
    operator = torch.ops.graphopt.quantized_linear.default
    found = list(fast.program.graph.find_nodes(op="call_function", target=operator))
    assert len(found) == 14
    assert error(logits(fast), logits(wanted)) < 1e-5
    assert not any(
        "q_proj.weight" in n and t.is_floating_point() and t.dim() == 2 and t.shape[1] > 2
        for n, t in fast.program.state.items()
    )
    again = graphopt.load(graphopt.save(fast, tmp_path / "m.pt2"))
    assert torch.equal(logits(again), logits(fast))


def test_layers_of_other_bits_and_none(tmp_path: Path) -> None:
    """`dynamic` of GPTQModel: patterns that change bits, or leave layers out."""
    wanted = gptq_folder(tmp_path / "q", 8, bits=4, dynamic={r"+:.*proj$": {"bits": 8}})
    assert error(logits(load_model(tmp_path / "q").module), logits(wanted)) < 1e-6
    gptq_folder(tmp_path / "n", dynamic={r"-:.*up_proj$": {}})
    with pytest.raises(LoadError, match="says it is not quantized"):
        load_model(tmp_path / "n")


def test_zero_biases_that_the_model_lacks_are_dropped(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    wanted = gptq_folder(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    state = load_file(file)
    name = "model.layers.0.mlp.up_proj.bias"
    state[name] = torch.zeros(96, dtype=torch.float16)
    save_file(state, file)
    module: Any = load_model(tmp_path / "q").module
    assert module.model.layers[0].mlp.up_proj.bias is None
    assert error(logits(module), logits(wanted)) < 1e-6
    state[name][3] = 1
    save_file(state, file)
    with pytest.raises(LoadError, match="has none in this model"):
        load_model(tmp_path / "q")


@pytest.mark.parametrize(
    ("scheme", "activations", "reason"),
    [
        (Scheme(8), "dynamic", "for weights alone"),
        (Scheme(6), "none", "2, 3, 4 or 8 bits, not int 6"),
        (Scheme(4, "nf4", 32), "none", "not nf4"),
        (Scheme(4, group_size=32, symmetric=False), "none", "integers for zero points"),
    ],
)
def test_what_the_layout_cannot_hold(scheme: Scheme, activations: str, reason: str) -> None:
    weight = quantize(torch.randn(64, 64), scheme)
    assert reason in str(refusal(weight, activations))


def test_sizes_that_fill_no_words_and_scales_beyond_float16() -> None:
    assert "fills words" in str(refusal(quantize(torch.randn(60, 64), Scheme(4)), "none"))
    assert "float16" in str(refusal(quantize(1e6 * torch.randn(64, 64), Scheme(4)), "none"))
    assert refusal(quantize(torch.randn(64, 64), Scheme(4)), "none") is None


def _integer_zeros(zeros: Tensor) -> QuantizedWeight:
    codes = torch.zeros((32, 64), dtype=torch.int8)
    return QuantizedWeight.from_codes(
        codes, torch.ones(32, 2), zeros, Scheme(4, group_size=32, symmetric=False)
    )


def test_zero_points_at_the_ends_of_the_range() -> None:
    for zero, less_one in ((-8.0, False), (-7.0, True), (7.0, True), (7.0, False)):
        weight = _integer_zeros(torch.full((32, 2), zero))
        assert refusal(weight, "none") is None
        tensors, layout = written(weight, None, less_one=less_one)
        found = layout.read(tensors, 32, 64).weight
        assert torch.equal(found.dequantize(), weight.dequantize())
    assert "from -8 to 7" in str(refusal(_integer_zeros(torch.full((32, 2), 8.0)), "none"))
