"""Norms of sums in ONNX files: one operator or two, whichever ONNX Runtime runs faster."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.emit import onnx_drafts
from graphopt.verify.timing import Pace

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

WIDTH = 16
AXES = ({0: "batch", 1: "seq"},)


class Layers(nn.Module):
    """Products added to a stream that is normalised behind the sum, or before the product."""

    def __init__(self, norm: type[nn.Module], first: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(WIDTH, eps=2**-10) for _ in range(3))
        self.products = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.first = first
        for tensor in self.norms.parameters():
            nn.init.normal_(tensor, mean=1.0, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        for norm, product in zip(self.norms, self.products, strict=True):
            x = x + product(norm(x)) if self.first else norm(x + product(x))
        return x


def written(
    model: nn.Module, path: Path, new: float, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[Counter[str], Any, Counter[str]]:
    """Operators of the file, the result, and operators that ONNX Runtime makes of them."""
    monkeypatch.setattr(onnx_drafts, "interleaved", lambda *_args, **_kw: Pace(1.0, new))
    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    module = graphopt.compile(
        model.eval(),
        example_inputs=(torch.randn(2, 5, WIDTH, dtype=dtype),),
        dynamic_shapes=AXES,
        measure=False,
    )
    result = graphopt.export_onnx(module, path / "m.onnx", **options)
    given = runtime.SessionOptions()
    given.optimized_model_filepath = str(path / "o.onnx")
    given.log_severity_level = 3
    runtime.InferenceSession(path / "m.onnx", given, providers=["CPUExecutionProvider"])
    files = (onnx.load(path / f"{name}.onnx") for name in "mo")
    made, run = (Counter(node.op_type for node in model.graph.node) for model in files)
    return made, result, run


NORMS = [(nn.LayerNorm, "LayerNormalization"), (nn.RMSNorm, "SimplifiedLayerNormalization")]


@pytest.mark.parametrize(("norm", "name"), NORMS)
@pytest.mark.parametrize("first", [True, False])
def test_two_operators_where_these_are_faster(
    norm: type[nn.Module],
    name: str,
    first: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """They stay two in ONNX Runtime, and give what one gave."""
    model = Layers(norm, first)
    made, result, run = written(model, tmp_path, 0.5, monkeypatch)
    sums = 2 if first else 3
    assert (made["Sum"], made[name]) == (sums, 3)
    assert not any("Skip" in op for op in (made | run))
    assert not any("skip" in fusion for fusion in result.fusions)
    assert result.error < 2e-6
    assert any("2.00x the speed of one operator" in note for note in result.notes)


@pytest.mark.parametrize(("norm", "name"), NORMS)
def test_one_operator_where_that_is_faster(
    norm: type[nn.Module], name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, result, _ = written(Layers(norm, False), tmp_path, 1.5, monkeypatch)
    assert (made["Sum"], made[f"Skip{name}"]) == (0, 3)
    assert sum(count for fusion, count in result.fusions.items() if "skip" in fusion) == 3
    assert any("left as one" in note for note in result.notes)


def test_halves_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made, result, _ = written(Layers(nn.LayerNorm, False).half(), tmp_path, 0.5, monkeypatch)
    assert not made["Sum"] and made["SkipLayerNormalization"] == 3
    assert not any("one operator" in note for note in result.notes)


def test_doubles_are_never_one_operator(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ONNX Runtime has none for them, and would not load the file."""
    model = Layers(nn.LayerNorm, False).double()
    made, result, _ = written(model, tmp_path, 0.5, monkeypatch, measure=False)
    assert (made["Sum"], made["LayerNormalization"]) == (3, 3)
    assert not any("skip" in fusion for fusion in result.fusions)
    assert result.error < 1e-12


def test_nothing_is_timed_where_that_is_not_wanted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = Layers(nn.LayerNorm, False)
    made, _, _ = written(model, tmp_path, 0.5, monkeypatch, measure=False)
    assert not made["Sum"] and made["SkipLayerNormalization"] == 3
    made, _, _ = written(model, tmp_path, 0.5, monkeypatch, fuse=False)
    assert not made["Sum"] and made["LayerNormalization"] == 3
