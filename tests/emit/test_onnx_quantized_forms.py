"""Forms of quantized operators by themselves: what holds, what is taken, what becomes of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.emit import onnx_runtime
from graphopt.emit.onnx_quantized import alone as alone_module
from graphopt.emit.onnx_quantized import choosing, lower
from graphopt.emit.onnx_quantized.alone import attempt, difference, exact
from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.form import Form
from graphopt.emit.onnx_quantized.forms import forms_of
from graphopt.errors import ExportError
from graphopt.kernels.quantized import QuantizedWeight, Scheme, Static, linear, quantize
from graphopt.passes import QuantizeMatmul

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

OPSET = 21
OUTPUTS, WIDTH, ROWS = 48, 128, 64


def call_of(scheme: Scheme, activations: str = "none", **fields: Any) -> Call:
    torch.manual_seed(0)
    weight = quantize(torch.randn(OUTPUTS, WIDTH), scheme)
    return Call("w", False, weight, activations, torch.float32, **fields)


def forms(call: Call, *, standard: bool = False) -> list[Form]:
    return forms_of(call, standard=standard, opset=OPSET)


def own_error(call: Call, x: Tensor) -> float:
    made = linear(x, call.weight, activations=call.activations, static=call.static)
    return difference(made, exact(call, x))[0]


CALLS = [
    call_of(Scheme(), "dynamic"),
    call_of(Scheme(symmetric=False), "dynamic"),
    call_of(Scheme(4), "dynamic"),
    call_of(Scheme(dtype="fp8"), "dynamic"),
    call_of(Scheme()),
    call_of(Scheme(4, group_size=32)),
    call_of(Scheme(4, group_size=32, symmetric=False)),
    call_of(Scheme(4, group_size=8)),
    call_of(Scheme(2, group_size=16)),
    call_of(Scheme(4, "nf4", 64)),
    call_of(Scheme(4, "mxfp4")),
    call_of(Scheme(dtype="fp8")),
    call_of(Scheme(), "static", static=Static(0.03, 121)),
    call_of(Scheme(symmetric=False), "static", static=Static(0.03, 121)),
    call_of(Scheme(4), "static", static=Static(0.03, 121)),
    call_of(Scheme(4, group_size=32), "static", static=Static(0.03, 121)),
]
EVERY = [(call, form) for call in CALLS for form in forms(call)]


@pytest.mark.parametrize(
    ("call", "form"), EVERY, ids=[f"{c.activations}-{c.scheme}-{f.name}" for c, f in EVERY]
)
def test_every_form(call: Call, form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """It holds to its bound; with a scale that is off by one percent it is found out."""
    torch.manual_seed(1)  # other numbers than the weight's
    x = torch.randn(ROWS, WIDTH)
    own = own_error(call, x)
    found = attempt(form, call, x, OPSET, own)
    assert found.fault == ""
    assert found.error < (0.04 if call.scheme.dtype == "fp8" else 0.012)
    assert found.error < 1e-6 or form.rounds
    monkeypatch.setattr(alone_module, "exact", lambda call, x: exact(call, x) / 1.01)
    fault = attempt(form, call, x, OPSET, own).fault
    assert "above the bound" in fault or "a scale is off by" in fault


def test_static_activations_are_quantized_by_what_is_given() -> None:
    """Numbers beyond the range of scale and zero point are cut off at its ends."""
    static = Static(0.0078125, 100)
    call, x = call_of(Scheme(), "static", static=static), torch.randn(ROWS, WIDTH)
    rounded = ((x / static.scale).round() + static.zero).clamp(0, 255) - static.zero
    wanted = exact(call, rounded * static.scale)
    assert difference(linear(x, call.weight, None, "static", static), wanted)[0] < 1e-5
    for form in forms(call):
        found = attempt(form, call, x, OPSET, own_error(call, x))
        assert not found.fault and found.error > 0.1  # what is cut off is no fault of a form
        (result,) = found.run()
        assert difference(torch.from_numpy(result), wanted)[0] < 1e-5
    with pytest.raises(ExportError, match="nf4 weights with static activations have no form"):
        forms(call_of(Scheme(4, "nf4", 64), "static", static=static))


def test_one_scale_for_all_is_not_taken_where_rows_differ() -> None:
    """Rows that are small beside another would be rounded to nothing."""
    call, x = call_of(Scheme(), "dynamic"), torch.randn(ROWS, WIDTH)
    whole = next(f for f in forms(call) if f.name == "DynamicQuantizeMatMul")
    assert not attempt(whole, call, x, OPSET, own_error(call, x)).fault
    x[0] *= 3
    found = attempt(whole, call, x, OPSET, own_error(call, x))
    assert found.fault.startswith("above the bound") and found.error < 0.03
    rows = next(f for f in forms(call) if "by rows" in f.name)
    assert not attempt(rows, call, x, OPSET, own_error(call, x)).fault


def test_rows_stand_by_themselves() -> None:
    call, x = call_of(Scheme(), "dynamic"), torch.randn(ROWS, WIDTH)
    broken = x.clone()
    broken[3, 5] = torch.inf
    for form in (f for f in forms(call) if "by rows" in f.name):
        session = alone_module.alone(form, call, 2, torch.float32, OPSET)
        clean, odd = (torch.from_numpy(session.run(None, {"x": t.numpy()})[0]) for t in (x, broken))
        assert not odd[3].isfinite().any()
        assert torch.equal(torch.cat((clean[:3], clean[4:])), torch.cat((odd[:3], odd[4:])))


@pytest.mark.parametrize(
    ("scheme", "name", "wanted"),
    [
        (Scheme(4, group_size=32), "MatMulNBits", {"MatMulNBits": 1}),
        (Scheme(4, "mxfp4"), "MatMulNBits", {"MatMulNBits": 1}),
        (Scheme(4, group_size=32), "DequantizeLinear", {"MatMulNBits": 1}),
        (Scheme(4, group_size=32), "table", {"MatMul": 1}),
        (Scheme(4, "nf4", 64), "table", {"MatMul": 1}),
        (Scheme(4, "nf4", 64), "MatMulBnb4", {"MatMulBnb4": 1}),
        (Scheme(dtype="fp8"), "table", {"MatMul": 1}),
    ],
)
def test_what_onnx_runtime_makes_of_a_form(
    scheme: Scheme, name: str, wanted: dict[str, int], tmp_path: Path, monkeypatch: Any
) -> None:
    """What is looked up in tables is so once, on loading; no weight is decoded on every call."""
    call = call_of(scheme)
    form = next(f for f in forms(call) if f.name.startswith(name))
    seen: list[bytes] = []
    monkeypatch.setattr(onnx_runtime, "open_session", seen.append)
    alone_module.alone(form, call, 2, torch.float32, OPSET)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    runtime.InferenceSession(seen[0], options, providers=["CPUExecutionProvider"])
    made = onnx.load(tmp_path / "o.onnx")
    assert Counter(n.op_type for n in made.graph.node) == wanted
    floats = [i for i in made.graph.initializer if i.data_type == onnx.TensorProto.FLOAT]
    decoded = any(torch.Size(i.dims).numel() >= OUTPUTS * WIDTH for i in floats)
    assert decoded == form.unpacks


class Layers(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, OUTPUTS), nn.Tanh(), nn.Linear(OUTPUTS, WIDTH))


def compiled(**options: Any) -> Any:
    torch.manual_seed(0)
    passes = ["Canonicalize", QuantizeMatmul(head=True, **options)]
    return graphopt.compile(
        Layers().eval(), example_inputs=(torch.randn(ROWS, WIDTH),), passes=passes, measure=False
    )


def lowered(module: Any, **options: Any) -> Any:
    kept = {"opset": None, "standard": False, "verify": True, "measure": True}
    return lower(module.program, **{**kept, **options})


def test_the_fastest_that_holds_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    module = compiled()
    for last in (False, True):

        def seconds(runs: list[Any], last: bool = last) -> list[float]:
            return sorted(map(float, range(len(runs))), reverse=last)

        monkeypatch.setattr(choosing, "quartiles", seconds)
        choices = lowered(module).choices
        held = [t for t in choices[0].trials if not t.fault]
        assert choices[0].form == held[0].form
        assert held[0].seconds == 0.0 and len(held) > 2
        assert (held[0].form.name == "MatMulIntegerToFloat by rows") != last


@pytest.mark.parametrize(("slower", "name"), [(1.4, "MatMulBnb4"), (1.6, "table")])
def test_a_weight_stays_small_where_that_costs_little(
    monkeypatch: pytest.MonkeyPatch, slower: float, name: str
) -> None:
    module = compiled(bits=4, dtype="nf4", group_size=16, activations=None)
    monkeypatch.setattr(choosing, "quartiles", lambda _runs: [slower, 1.0])
    lowering = lowered(module)
    assert all(c.form.name.startswith(name) for c in lowering.choices)
    assert any("float32 in the memory" in n for n in lowering.notes()) == (name == "table")


def test_nothing_runs_where_nothing_is_verified(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = compiled()
    monkeypatch.setattr(onnx_runtime, "open_session", lambda _model: pytest.fail("ran"))
    result = graphopt.export_onnx(module, tmp_path / "q.onnx", verify=False, measure=False)
    assert result.error is None and result.bytes > 0


def test_where_no_form_holds_the_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = compiled(bits=4, activations=None)
    monkeypatch.setattr(alone_module, "exact", lambda call, x: exact(call, x) * 1.01)
    with pytest.raises(ExportError, match=r"computes `0\.weight` in no form within the bound"):
        lowered(module)


def test_biases_are_part_of_operators_that_take_one(tmp_path: Path) -> None:
    module = compiled(bits=4, activations=None)
    graphopt.export_onnx(module, tmp_path / "q.onnx", measure=False)
    names = Counter(n.op_type for n in onnx.load(tmp_path / "q.onnx").graph.node)
    assert names == {"MatMulNBits": 2, "Tanh": 1}


def test_notes_tell_what_was_tried() -> None:
    (first, *_) = lowered(compiled()).notes()
    assert first.startswith("`0.weight`, 48x128, 64 rows: ")
    assert first.count(" ms, error ") > 2
    rounded = lowered(compiled(bits=4, activations=None), measure=False)
    assert 0.003 < rounded.tolerance < 0.05
    assert lowered(compiled(bits=4, group_size=8, activations=None)).tolerance == 0.0


def test_few_rows_that_all_lie_in_one_direction_are_no_scale_that_is_off() -> None:
    """As logits of one token, most of which is their mean: what rounding adds to that stays."""
    torch.manual_seed(0)
    codes = torch.randint(-127, 127, (1, 576)) + torch.randint(-1, 2, (2048, 576))
    scales = torch.full((2048, 1), 0.01)  # and so all outputs are alike
    weight = QuantizedWeight(Scheme(), 576, codes.clamp(-127, 127).to(torch.int8), scales)
    call = Call("head", False, weight, "dynamic", torch.float32, tied=True)
    tried = 0
    for seed in range(20):
        x = torch.randn(1, 576, generator=torch.Generator().manual_seed(seed))
        own = difference(linear(x, weight, activations="dynamic"), exact(call, x))[0]
        for form in forms_of(call, standard=False, opset=18):
            if "accuracy 4" in form.name:
                trial = attempt(form, call, x, 18, own)
                tried += abs(trial.gain - 1) > 2e-3 + 5 * trial.error / 2048**0.5
                assert "scale" not in trial.fault
    assert tried > 0, "without more rows one would have been taken for wrong"
