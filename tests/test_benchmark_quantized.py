"""The scripts that benchmark quantized products run, as far as a CPU without data can."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import quantized_gpu, quantized_smollm2, smollm2_tokens
from benchmarks.quantized_gpu import FOUR, LAYERS, SETUPS, Setup, measured
from benchmarks.quantized_peers import Format, nearest
from graphopt.kernels.quantized import Scheme

CEILINGS = {"bandwidth": 1e9, "bf16": 1e12, "fp8": 1e12, "int": 1e12}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_gpu, "ROUNDS", 1)
    monkeypatch.setattr(quantized_gpu, "WARM", 0)
    monkeypatch.setattr(quantized_gpu, "LARGE", 64)


@pytest.mark.parametrize(
    ("scheme", "activations", "limit"),
    [(FOUR, "none", 0.12), (Scheme(8, "fp8"), "dynamic", 0.05), (Scheme(), "dynamic", 0.02)],
)
def test_every_peer_gives_figures_or_an_error(
    scheme: Scheme, activations: str, limit: float
) -> None:
    setup = Setup(20, 48, 256, scheme, activations)
    found = measured(setup, torch.device("cpu"), CEILINGS)
    json.dumps(found)
    rows = {name: row for name, row in found.items() if isinstance(row, dict)}
    assert {"F.linear, bf16", "graphopt", "torchao"} <= rows.keys()
    for name in ("F.linear, bf16", "graphopt"):
        assert rows[name]["off"] < limit and rows[name]["median_us"] > 0
    assert rows["F.linear, bf16"]["over_bf16"] == 1.0
    assert any(name.startswith("graphopt, ") for name in rows)


def test_bounds_are_bytes_for_few_rows_and_operations_for_many() -> None:
    few, many = Setup(1, 48, 256), Setup(4096, 48, 256)
    weight = quantized_gpu._quantized(torch.randn(48, 256), FOUR)
    stored = 48 * 128 + 2 * 48 * 2
    for setup in (few, many):
        x = torch.empty(setup.rows, 256, dtype=torch.bfloat16)
        moved = stored + 2 * setup.rows * (256 + 48)
        made = quantized_gpu._bound(setup, x, weight, CEILINGS | {"bf16": 1e30})
        assert made == pytest.approx(moved / 1e9)
        made = quantized_gpu._bound(setup, x, weight, CEILINGS | {"bandwidth": 1e30})
        assert made == pytest.approx(2 * setup.rows * 48 * 256 / 1e12)


def test_setups_are_what_is_asked() -> None:
    assert len(SETUPS) == len({setup.name for setup in SETUPS}) == 6 * len(LAYERS)
    assert quantized_gpu._rate("bf16", torch.device("cpu")) > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs there")
def test_without_a_gpu_it_is_skipped() -> None:
    assert quantized_gpu.run(None) == {"skipped": "no CUDA device"}


def test_rounding_that_methods_are_compared_with() -> None:
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 8), "lm_head": torch.nn.Linear(8, 4)})
    model.bfloat16()
    layer, head = model["layer"].weight.clone(), model["lm_head"].weight.clone()
    nearest(model, Format(4, 32, True), [])
    step = layer.view(8, 2, 32).abs().amax(-1, keepdim=True) / 7
    off = (model["layer"].weight.view(8, 2, 32) - layer.view(8, 2, 32)).abs() / step
    assert off.max() < 1  # the largest may be clipped: codes go to -8, and to 7 only
    assert 0.2 < off.mean() < 0.3
    assert torch.equal(model["lm_head"].weight, head)


def test_a_contender_that_fails_says_why(tmp_path: Path) -> None:
    process = quantized_smollm2.Process("ONNX Runtime float32", tmp_path)
    process.end()
    assert "inputs.pt" in process.loaded["error"] or "plain.onnx" in process.loaded["error"]


def test_a_contender_that_takes_too_long_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized_smollm2, "PATIENCE", 0.01)
    process = quantized_smollm2.Process("eager float32", tmp_path)
    assert "no answer within" in process.loaded["error"]
    assert process.pipe.poll() is not None
    assert process.ask("decode") == {"error": "the process ended"}


def test_tokens_are_counted_up_to_the_first_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2_tokens, "PAUSE", 0.0)
    texts = {1: torch.tensor([[5, 6, 7, 8]]), 2: torch.tensor([[1, 2, 3, 4]])}
    other = {1: texts[1], 2: torch.tensor([[1, 9, 3, 4]])}
    ways = {
        smollm2_tokens.EAGER: lambda prompt: texts[int(prompt)],
        smollm2_tokens.EXACT: lambda prompt: other[int(prompt)],
    }
    found = smollm2_tokens.compared(ways, [torch.tensor([[1]]), torch.tensor([[2]])])
    assert found[smollm2_tokens.EAGER]["prompts with the same tokens"] == 2
    row = found[smollm2_tokens.EXACT]
    assert row["prompts with the same tokens"] == 1 and row["same tokens before another"] == 2.5
