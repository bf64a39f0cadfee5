"""The script that races ONNX files, on models of a few weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from benchmarks import onnx_exports, onnx_makers, onnxruntime_cuda
from benchmarks.onnx_models import Subject, decoder_subject

Make = Callable[[Subject, Path], Path]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_exports, "ROUNDS", 1)
    monkeypatch.setattr(onnx_exports, "TURN", 0.0)
    monkeypatch.delenv("ONNX_FILES", raising=False)
    monkeypatch.delenv("OPTIMUM_PATH", raising=False)


def _only(monkeypatch: pytest.MonkeyPatch, **more: Make) -> None:
    names = ("dynamo export", "onnxruntime.transformers", "optimum", "graphopt")
    made = {name: onnx_makers.MAKERS[name] for name in names}
    monkeypatch.setattr(onnx_exports, "MAKERS", {**made, **more})


def _subject() -> Subject:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    call, axes = {"input": torch.randn(6, 8)}, {"input": {0: "batch"}}
    return Subject("tiny", model, call, axes, None, None, {"batch 6": call})


def test_every_maker_has_times_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(subject: Subject, folder: Path) -> Path:
        """A file of another model."""
        twin = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
        (folder / "twin").mkdir()
        call = (subject.name, twin, subject.call, subject.axes, None, None, subject.feeds)
        return onnx_makers.plain(Subject(*call), folder / "twin")

    _only(monkeypatch, other=other)
    found = onnx_exports.raced(_subject())
    json.dumps(found)
    assert "models of transformers" in found["not made"]["optimum"]
    shape = found["shapes"]["batch 6"]
    assert shape["best peer"] in ("dynamo export", "onnxruntime.transformers")
    rows = shape["rows"]
    assert rows["graphopt"]["difference"] < 1e-6
    best = rows[shape["best peer"]]["median_ms"]
    assert rows["graphopt"]["of the best peer"] == round(rows["graphopt"]["median_ms"] / best, 3)
    assert "not timed" in rows["other"]["error"] and "median_ms" not in rows["other"]


def test_optimum_that_does_not_import_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "optimum").mkdir()
    (tmp_path / "optimum" / "__init__.py").write_text("raise ImportError('not with this one')")
    monkeypatch.setenv("OPTIMUM_PATH", str(tmp_path))
    given = tmp_path / "transformers"
    given.mkdir()
    (given / "config.json").write_text('{"rope_parameters": {"rope_theta": 7.0}}')
    call = (nn.Identity(), {}, {}, None, "feature-extraction", {})
    with pytest.raises(onnx_makers.NotMade, match="ImportError: not with this one"):
        onnx_makers.optimum(Subject("tiny", *call), tmp_path)
    assert json.loads((given / "config.json").read_text())["rope_theta"] == 7.0


def test_a_decoder_is_timed_on_a_token_and_a_prompt_and_weighed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=64)).eval()
    subject = decoder_subject("tiny", model, torch.randint(64, (1, 12)), None)
    made = {"dynamo export": onnx_makers.plain}
    monkeypatch.setattr(onnx_exports, "MAKERS", made)
    found = onnx_exports.raced(subject)
    assert list(found["shapes"]) == ["a token behind 11", "a prompt of 10"]
    for shape in found["shapes"].values():
        row = shape["rows"]["dynamo export"]
        assert row["difference"] < 1e-5 and row["median_ms"] > 0
    memory = found["memory"]["dynamo export, default"]
    assert 0 < memory["loaded"] <= memory["most"]
    assert "loaded, of the file" in memory


def test_regions_that_are_right_fail_in_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_cuda, "ROUNDS", 1)
    found = onnxruntime_cuda.checked(_subject(), torch.device("cpu"), "cpu")
    json.dumps(found)
    assert found["failed"] == []
    assert [set(r["runs on"]) for r in found["partition"]["regions"]] == [{"CPUExecutionProvider"}]
    assert set(found["milliseconds"]["batch 6"]) == {"eager", *onnxruntime_cuda.TARGETS}


def test_regions_that_are_wrong_are_told() -> None:
    subject = _subject()
    calls: list[None] = []

    class Drifting(nn.Module):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            calls.append(None)
            return subject.model(input) * (1 + 1e-3 * len(calls))

    exact = copy.deepcopy(subject.model).double()
    told = list(onnxruntime_cuda._of_a_feed(Drifting(), exact, subject.call))
    for text in ("outputs are off by", "behind other work on torch's stream", "threads got"):
        assert any(text in line for line in told), text


def test_operators_on_another_provider_are_told() -> None:
    subject, options = _subject(), onnxruntime_cuda.TARGETS["graphopt, ONNX Runtime"]
    fast = graphopt.compile(subject.model, example_kwargs=subject.call, **options)
    assert not list(onnxruntime_cuda._of_the_partition(fast, "cpu"))
    (told,) = onnxruntime_cuda._of_the_partition(fast, "cuda")
    assert "runs on CPUExecutionProvider" in told
