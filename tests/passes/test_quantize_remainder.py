"""What stands beside quantized products, end to end: nearer, counted, saved, exported, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import ExportError, RecipeError
from graphopt.interchange.recover import recovered
from graphopt.passes import QuantizeMatmul
from graphopt.passes.quantize import examples
from graphopt.pipeline import state_bytes
from graphopt.presets import resolve
from graphopt.rewrite.passes import parse_pass

WIDTH = 128
COLUMNS: dict[str, Any] = {"method": "outliers", "outliers": 4}
NUMBERS: dict[str, Any] = {"method": "outliers", "outliers": 0.005, "outlier_kind": "numbers"}
LOW_RANK: dict[str, Any] = {"method": "lowrank", "rank": 3}
ALL: dict[str, Any] = {"method": "outliers+lowrank", "outliers": 2, "rank": 2}
WANTED = [COLUMNS, NUMBERS, LOW_RANK, ALL]


class Layers(nn.Module):
    """A residual block, some inputs of whose first product are larger than others."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=bias)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=bias)
        with torch.no_grad():
            self.norm.weight[::40] *= 12

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x + self.down(F.gelu(self.up(self.norm(x)))), (WIDTH,))


def model(kind: torch.dtype = torch.float32, **options: Any) -> Layers:
    torch.manual_seed(0)
    return Layers(**options).to(kind).eval()


def batches(count: int = 5, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(WIDTH, WIDTH, generator=generator) * torch.rand(WIDTH, generator=generator)
    generator.manual_seed(seed)
    return [torch.randn(4, 64, WIDTH, generator=generator) @ mix / 6 for _ in range(count)]


def quantized(given: nn.Module | None = None, samples: Any = None, **options: Any) -> Any:
    given, calibrated = given or model(), options.pop("calibration", None)
    axes = options.pop("axes", None)
    options = {"bits": 3, "activations": None, "group_size": 32, **options}
    kind = next(given.parameters()).dtype
    return graphopt.compile(
        given,
        example_inputs=samples or (batches(1)[0].to(kind),),
        calibration=calibrated,
        dynamic_shapes=axes,
        passes=["Canonicalize", QuantizeMatmul(**options)],
        measure=False,
    )


def error(fast: Any, given: nn.Module | None = None) -> float:
    """On inputs that were not calibrated on."""
    given = given or model()
    with torch.no_grad():
        pairs = [(fast(x), given(x)) for x in batches(3, seed=7)]
    return float(sum((a - b).square().sum() for a, b in pairs)) ** 0.5


@pytest.mark.parametrize("base", ["rtn", "gptq", "awq+gptq", "hqq"])
@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_it_comes_nearer_and_says_what_it_costs(wanted: dict[str, Any], base: str) -> None:
    options: dict[str, Any] = {"calibration": batches(), "symmetric": base != "hqq"}
    plain = quantized(method=base, **options)
    fast = quantized(**{**options, **wanted, "method": f"{base}+{wanted['method']}"})
    assert fast.report.verified
    assert error(fast) < 0.99 * error(plain)
    layers = fast.report.quantization.layers
    assert [layer.bits for layer in layers] == [3, 3]
    assert all(f"{layer.bytes_beside} bytes" in layer.note for layer in layers)
    beside = sum(layer.bytes_beside for layer in layers)
    assert state_bytes(fast.program) == state_bytes(plain.program) + beside


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_without_calibration_every_input_counts_the_same(wanted: dict[str, Any]) -> None:
    assert error(quantized(**wanted)) < 0.99 * error(quantized())


def test_calibration_tells_what_matters() -> None:
    blind, seen = quantized(**COLUMNS), quantized(**COLUMNS, calibration=batches())
    assert error(seen) < 0.9 * error(blind)
    state = seen.program.state["up.weight_columns_places"]
    assert set(state.tolist()) >= {0, 40, 80, 120}


def test_columns_in_floats_have_no_part_in_dynamic_activations() -> None:
    """Large inputs then do not make the others of their rows coarse."""
    options: dict[str, Any] = {"bits": 8, "activations": "dynamic", "group_size": None}
    options["calibration"] = batches()
    plain, fast = quantized(**options), quantized(**options, **COLUMNS)
    assert fast.report.verified
    assert error(fast) < 0.6 * error(plain)
    zeros = quantized(**{**options, "symmetric": False}, **COLUMNS)
    assert error(zeros) < 0.6 * error(plain)


@pytest.mark.parametrize("wanted", WANTED, ids=str)
@pytest.mark.parametrize("example", list(examples.examples()), ids=lambda e: e.name)
def test_every_form_of_product(example: Any, wanted: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given, inputs = example.module().eval(), example.inputs()
    for activations in (None, "dynamic"):
        fast = quantized(
            given,
            inputs,
            axes=example.dynamic_shapes,
            **{**wanted, "rank": 1 if "rank" in wanted else None},
            bits=4,
            activations=activations,
            group_size=None,
        )
        applied = [a.rule for a in fast.report.applied]
        assert applied.count("QuantizeLinear") == 1, fast.report.missed
        assert fast.report.verified


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_dynamic_sizes_gradients_and_half_precision(wanted: dict[str, Any]) -> None:
    axes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    fast = quantized(axes=axes, **wanted)
    for sizes in ((1, 3, WIDTH), (7, 1, WIDTH)):
        x = torch.randn(sizes, requires_grad=True)
        made = fast(x)
        assert made.shape == x.shape
        (slope,) = torch.autograd.grad(made.square().sum(), x)
        assert slope.isfinite().all()
        assert slope.any()
    low = quantized(model(torch.bfloat16), **{**wanted, "group_size": None})
    assert low.report.verified
    kept = [t for n, t in low.program.state.items() if "_values" in n or "lowrank" in n]
    assert {t.dtype for t in kept} == {torch.bfloat16}  # and not quantized in turn


@pytest.mark.parametrize("wanted", WANTED, ids=str)
def test_files(wanted: dict[str, Any], tmp_path: Path) -> None:
    x = batches(1, seed=3)[0]
    fast = quantized(**wanted, calibration=batches())
    graphopt.save(fast, tmp_path / "fast.pt2")
    again = graphopt.load(tmp_path / "fast.pt2")
    with torch.no_grad():
        assert torch.equal(again(x), fast(x))


@pytest.mark.parametrize("activations", [None, "dynamic"])
@pytest.mark.parametrize("wanted", [COLUMNS, LOW_RANK, ALL], ids=str)
def test_onnx(wanted: dict[str, Any], activations: Any, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = batches(1, seed=3)[0]
    fast = quantized(**{"bits": 4, **wanted}, activations=activations)
    graphopt.export_onnx(fast, tmp_path / "fast.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "fast.onnx")
    (made,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        off = (torch.from_numpy(made) - fast(x)).norm() / fast(x).norm()
    assert off < (1e-3 if activations is None else 0.02)


def test_onnx_has_no_form_of_single_numbers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    with pytest.raises(ExportError, match=r"up.weight keeps single numbers") as caught:
        graphopt.export_onnx(quantized(**NUMBERS), tmp_path / "fast.onnx")
    assert "columns" in str(caught.value.fix)


class Spiking(nn.Module):
    """One product hangs on one number of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.up.bias[9] = 300.0
            self.down.weight.mul_(0.2)[33, 9] = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x)).clamp(max=1e4)


@pytest.mark.parametrize("kind", ["columns", "numbers"])
def test_super_weights_are_kept_by_themselves(kind: str) -> None:
    torch.manual_seed(0)
    spiking = Spiking().eval()
    options: dict[str, Any] = {"calibration": batches(), "group_size": None}
    plain = quantized(spiking, **options)
    fast = quantized(spiking, method="outliers", outliers=0, outlier_kind=kind, **options)
    assert any("super weights among them: 1" in note for note in fast.report.quantization.notes)
    assert [n for n in fast.program.state if n.endswith("_values")] == [
        f"down.weight_{kind}_values"
    ]
    assert error(fast, spiking) < 0.5 * error(plain, spiking)
    assert not any(
        "beside" in n for n in quantized(method="outliers", outliers=0).report.quantization.notes
    )


class Tied(nn.Module):
    """A table of words that is the head too, and a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(300, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, index: Tensor) -> Tensor:
        return F.linear(self.inner(self.words(index)), self.words.weight)


def test_a_tied_head_has_codes_alone() -> None:
    """What is looked up cannot be split; layers beside it are."""
    index = torch.randint(300, (2, 5))
    fast = quantized(
        Tied().eval(), (index,), head=True, embeddings=True, calibration=[index], **COLUMNS
    )
    rows = fast.report.quantization.layers
    told = [row for row in rows if "looked up too: nothing stands beside it" in row.note]
    assert [row.shape[0] for row in told] == [300]
    assert [n for n in fast.program.state if "columns_values" in n] == [
        "inner.weight_columns_values"
    ]
    assert fast.report.verified


def test_what_would_not_be_smaller_is_codes_alone() -> None:
    low = model(torch.bfloat16)
    plain, fast = quantized(low), quantized(low, method="lowrank", rank=1000)
    assert sum("codes only" in n for n in fast.report.quantization.notes) == 2
    assert state_bytes(fast.program) == state_bytes(plain.program)


def test_layers_of_many_matrices_say_that_nothing_is_beside_them() -> None:
    convolution = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU()).eval()
    options: dict[str, Any] = {"bits": 8, "group_size": None}
    fast = quantized(convolution, (torch.randn(1, 8, 9, 9),), **options, **COLUMNS)
    assert any(
        "outliers calibrates layers of one matrix" in n for n in fast.report.quantization.notes
    )


def test_checkpoint_formats_have_no_place_for_it(tmp_path: Path) -> None:
    fast = quantized(**COLUMNS)
    graphopt.save(fast, tmp_path / "fast.pt2")
    for made in (fast, graphopt.load(tmp_path / "fast.pt2")):
        with pytest.raises(ExportError, match="numbers beside its codes") as caught:
            recovered(made.program, model())
        assert "without the methods" in str(caught.value.fix)


def test_options_and_methods_go_together() -> None:
    text = "QuantizeMatmul:bits=3,activations=null,method=gptq+outliers,outliers=0.01"
    assert parse_pass(text).outliers == 0.01
    both = QuantizeMatmul(bits=4, activations=None, method=["lowrank", "outliers"])
    assert (both.settings.beside.rank, both.settings.beside.outliers) == (8, 0.01)
    for given, reason in (
        ({"outliers": 0.01}, "options of method='outliers'"),
        ({"outlier_kind": "numbers"}, "options of method='outliers'"),
        ({"rank": 4}, "option of method='lowrank'"),
        ({"method": "outliers", "rank": 4}, "option of method='lowrank'"),
        ({"method": "outliers", "outliers": -1}, "no share"),
        ({"method": "outliers", "outliers": 1.5}, "no share"),
        ({"method": "lowrank", "rank": 0}, "rank=0"),
        ({"method": "outliers", "outlier_kind": "rows"}, "outlier_kind='rows' should be"),
    ):
        with pytest.raises(RecipeError, match=reason):
            resolve([{"QuantizeMatmul": given}])
