"""Quantized folders that are damaged or strange: one error with file, tensor and advice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from checkpoints import gptq_folder
from safetensors.torch import load_file, save_file

from graphopt.errors import LoadError
from graphopt.loading import load_model

LAYER = "model.layers.1.mlp.up_proj"
State = dict[str, Tensor]


def _without(leaf: str) -> Callable[[State], None]:
    def drop(state: State) -> None:
        del state[f"{LAYER}.{leaf}"]

    return drop


def _cut(leaf: str) -> Callable[[State], None]:
    def cut(state: State) -> None:
        state[f"{LAYER}.{leaf}"] = state[f"{LAYER}.{leaf}"][:-1].clone()

    return cut


def _with(leaf: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def put(state: State) -> None:
        state[f"{LAYER}.{leaf}"] = change(state[f"{LAYER}.{leaf}"])

    return put


def _renamed(state: State) -> None:
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        state[f"model.layers.1.mlp.experts.0.up_proj.{leaf}"] = state.pop(f"{LAYER}.{leaf}")


DAMAGE = [
    (_without("scales"), "lacks scales"),
    (_without("qzeros"), "lacks qzeros"),
    (_cut("qweight"), r"qweight .* is int32 \[7, 96\]; it should be int32 \[8, 96\]"),
    (_cut("g_idx"), r"g_idx .* \[63\]"),
    (_with("scales", lambda t: t.to(torch.int32)), "scales .* is int32"),
    (_with("scales", lambda t: t * torch.inf), "NaN or infinity"),
    (_with("g_idx", lambda t: t + 1), "g_idx has groups 1 to 2; there are 2"),
    (_with("g_idx", lambda t: t - 1), "g_idx has groups -1 to 0"),
    (_with("g_idx", lambda t: t * 0), "g_idx gives group 0 64 inputs instead of 32"),
    (_renamed, "no linear layer of the model"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGE, ids=[reason for _, reason in DAMAGE])
def test_damaged_tensors(damage: Callable[[State], None], reason: str, tmp_path: Path) -> None:
    gptq_folder(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    state = load_file(file)
    damage(state)
    save_file(state, file)
    with pytest.raises(LoadError, match=reason) as caught:
        load_model(tmp_path / "q")
    where = str(caught.value.where)
    assert "model.safetensors" in where or reason == DAMAGE[-1][1]
    assert "up_proj" in f"{where}{caught.value.what}" and caught.value.fix


CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "magic"}, "quantized by 'magic'"),
    ({"quant_method": "graphopt"}, "quantized by 'graphopt'"),
    ({"quant_method": None}, "quantized by"),
    ({"checkpoint_format": "marlin"}, "in the format 'marlin'"),
    ({"is_marlin_format": True, "checkpoint_format": None}, "format 'marlin', made"),
    ({"bits": 5}, "2, 3, 4 or 8 bits, not 5"),
    ({"group_size": 0}, "group_size is 0"),
    ({"group_size": 40}, "group_size 40 does not divide K = 96"),
    ({"bits": 8}, r"qweight .* is int32 \[12, 64\]; it should be int32 \[24, 64\]"),
    ({"pack_dtype": "int16"}, "packed in int32"),
    ({"dynamic": {"+:(": {}}}, "is no pattern"),
    ({"quant_method": "compressed-tensors"}, "without config_groups"),
]


@pytest.mark.parametrize(("changes", "reason"), CONFIGS, ids=[reason for _, reason in CONFIGS])
def test_strange_configs(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    gptq_folder(tmp_path / "q", **changes)
    with pytest.raises(LoadError, match=reason) as caught:
        load_model(tmp_path / "q")
    assert caught.value.where


def test_a_config_for_weights_that_are_not_quantized(tmp_path: Path) -> None:
    from checkpoints import llama

    folder = tmp_path / "m"
    llama().save_pretrained(folder)
    facts = json.loads((folder / "config.json").read_text())
    facts["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32}
    (folder / "config.json").write_text(json.dumps(facts))
    with pytest.raises(LoadError, match="the files hold none"):
        load_model(folder)


def test_pickled_weights_are_read_without_pickle(tmp_path: Path) -> None:
    gptq_folder(tmp_path / "q")
    file = tmp_path / "q" / "model.safetensors"
    torch.save(load_file(file), tmp_path / "q" / "pytorch_model.bin")
    file.unlink()
    assert any("14 quantized layers" in note for note in load_model(tmp_path / "q").notes)
