"""RMS norms in ONNX files: one operator each, with a scale or without, and the addition before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.emit import onnx_norms
from graphopt.errors import VerificationError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WIDTH = 16
AXES = ({0: "batch", 1: "seq"},)
DECOMPOSED = {"Pow", "ReduceMean", "Sqrt", "Reciprocal"}


class Written(nn.Module):
    """The norm as models spell it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


class Blocks(nn.Module):
    """Two norms before products; the second reads what the first block was added to."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        given = {"eps": 1e-6, **options}
        self.norms = nn.ModuleList([Written(), nn.RMSNorm(WIDTH, **given)])
        self.products = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        if self.norms[1].weight is not None:
            nn.init.normal_(self.norms[1].weight, mean=1.0, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        for norm, product in zip(self.norms, self.products, strict=True):
            x = x + product(norm(x))
        return x


def written(
    model: nn.Module,
    path: Path,
    passes: Any,
    x: Tensor | None = None,
    axes: Any = AXES,
    **options: Any,
) -> tuple[Any, Any]:
    torch.manual_seed(0)
    x = torch.randn(2, 5, WIDTH) if x is None else x
    module = graphopt.compile(
        model.eval(),
        example_inputs=(x,),
        dynamic_shapes=axes,
        passes=passes,
        measure=False,
    )
    result = graphopt.export_onnx(module, path / "m.onnx", measure=False, **options)
    return onnx.load(path / "m.onnx"), result


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


FOLDED, SCALED = "exact", ["Canonicalize", "RecognizeComposites"]


@pytest.mark.parametrize("passes", [FOLDED, SCALED], ids=["folded", "scaled"])
@pytest.mark.parametrize("eps", [1e-6, 0.5, None])
def test_a_norm_is_one_operator(passes: Any, eps: Any, tmp_path: Path) -> None:
    """On unseen sizes too, and to float64, as the export compares it."""
    model, result = written(Blocks(eps=eps), tmp_path, passes)
    found = kinds(model)
    assert found["SimplifiedLayerNormalization"] == 1
    assert found["SkipSimplifiedLayerNormalization"] == 1
    assert not DECOMPOSED & found.keys()
    assert result.fusions["rms_normalization"] == 2
    assert result.fusions["skip_rms_normalization"] == 1
    assert result.error < 2e-6


def test_norms_without_a_scale_share_their_ones(tmp_path: Path) -> None:
    model, _ = written(Blocks(), tmp_path, FOLDED)
    norms = [n for n in model.graph.node if "LayerNormalization" in n.op_type]
    scales = {n.input[1 if n.op_type.startswith("Simplified") else 2] for n in norms}
    assert len(norms) == 2 and len(scales) == 1
    (held,) = (i for i in model.graph.initializer if i.name in scales)
    assert (onnx.numpy_helper.to_array(held) == 1).all()


@pytest.mark.parametrize(("opset", "wanted"), [(23, {"RMSNormalization": 2}), (20, {})])
def test_the_standard_has_the_norm_from_operator_set_23(
    opset: int, wanted: dict[str, int], tmp_path: Path
) -> None:
    model, result = written(Blocks(), tmp_path, FOLDED, fuse=False, opset=opset)
    onnx.checker.check_model(model)
    found = kinds(model)
    assert {name: found[name] for name in wanted} == wanted
    assert (found.keys() >= DECOMPOSED) == (not wanted)
    assert "ConstantOfShape" not in found and not any("Simplified" in name for name in found)
    assert result.error < 2e-6


def test_halves_are_normalised_in_float32(tmp_path: Path) -> None:
    x = 30 * torch.randn(2, 5, WIDTH, dtype=torch.float16)
    model, result = written(nn.RMSNorm(WIDTH).half(), tmp_path, [], x)
    assert kinds(model) == {"SimplifiedLayerNormalization": 1}
    assert result.error < 1e-3


def test_doubles_stay_doubles(tmp_path: Path) -> None:
    """ONNX Runtime joins additions and norms for smaller dtypes alone."""
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    model, result = written(Blocks().double(), tmp_path, SCALED, x)
    assert kinds(model).keys() >= DECOMPOSED
    assert result.error < 1e-12


@pytest.mark.parametrize("affine", [True, False])
def test_norms_over_several_axes(affine: bool, tmp_path: Path) -> None:
    norm = nn.RMSNorm((5, WIDTH), eps=1e-3, elementwise_affine=affine)
    if affine:
        nn.init.normal_(norm.weight)
    model, result = written(norm, tmp_path, [], torch.randn(3, 5, WIDTH), ({0: "batch"},))
    assert kinds(model) == {"SimplifiedLayerNormalization": 1}
    assert result.error < 2e-6


class Mixed(nn.Module):
    """The scale has another dtype than what it scales."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (WIDTH,), self.weight, 1e-6)


def test_what_has_no_kernel_stays_apart(tmp_path: Path) -> None:
    x = torch.randn(2, 5, WIDTH)
    program = graphopt.capture.capture(Mixed().eval(), (x,))
    assert onnx_norms.with_norms(program) is program
    half = graphopt.capture.capture(nn.RMSNorm(WIDTH).bfloat16().eval(), (x.bfloat16(),))
    assert onnx_norms.with_norms(half) is half


def test_a_wrong_epsilon_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_norms, "_epsilon", lambda _given: 1e-2)
    with pytest.raises(VerificationError, match="gives another"):
        written(Blocks(), tmp_path, SCALED)
