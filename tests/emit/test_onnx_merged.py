"""Quantized products of one input become one in ONNX files, where ONNX Runtime runs that faster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.emit import onnx_drafts
from graphopt.emit.onnx_quantized import choosing, lower, lower_merged, quantized_nodes
from graphopt.emit.onnx_quantized.merged import merged_siblings, together
from graphopt.passes import QuantizeMatmul
from graphopt.program import Program
from graphopt.verify.timing import Pace

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

WIDTH = 64
AXES = ({0: "batch", 1: "seq"},)


class Siblings(nn.Module):
    """Three products of one input, of other widths, one without a bias; and one behind them."""

    def __init__(self, variant: str = "") -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(WIDTH, width, bias=bias)
            for width, bias in ((64, True), (32, False), (32, True))
        )
        self.out, self.variant = nn.Linear(128, WIDTH), variant

    def forward(self, x: Tensor) -> Tensor:
        q, others = self.q(x), x.tanh() if self.variant == "other inputs" else x
        k = self.q(x.sin())[..., :32] if self.variant == "read twice" else self.k(others)
        v = others[..., :32] if self.variant else self.v(others)
        return x + self.out(torch.cat([q.sin(), k.cos(), v], -1))


def inputs() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 50, WIDTH)


def compiled(model: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(1)
    calibration = [(inputs(),)] if options.get("activations") == "static" else None
    return graphopt.compile(
        (model or Siblings()).eval(),
        example_inputs=(inputs(),),
        dynamic_shapes=AXES,
        passes=["Canonicalize", QuantizeMatmul(head=True, **options)],
        calibration=calibration,
        measure=False,
    )


SCHEMES: list[dict[str, Any]] = [
    {},
    {"symmetric": False},
    {"activations": "static"},
    {"dtype": "fp8"},
    {"bits": 4, "group_size": 32, "activations": None},
    {"bits": 3, "group_size": 16, "symmetric": False, "activations": None},
    {"bits": 4, "dtype": "mxfp4", "activations": None},
    {"bits": 4, "dtype": "nf4", "group_size": 32, "activations": None},
]


@pytest.mark.parametrize("options", SCHEMES, ids=str)
def test_one_product_gives_the_same_bits(options: dict[str, Any]) -> None:
    program = compiled(**options).program
    twin = merged_siblings(program)
    assert twin is not None
    assert len(quantized_nodes(twin)) == len(quantized_nodes(program)) - 2
    for x in (inputs(), torch.randn(3, 7, WIDTH)):
        assert torch.equal(twin.run([x])[0], program.run([x])[0])
    assert "q_k_v.weight_codes" in twin.state and "q.weight_codes" not in twin.state


def test_products_that_differ_stay_apart() -> None:
    """In format, in what they read, in a scale for the whole, or where something else reads one."""
    formats = {"q": {"bits": 4}, "k": {"activations": None}}
    for module in (
        compiled(layers=formats, tolerance=0.9),
        compiled(bits=4, dtype="nvfp4", activations=None),
        compiled(Siblings("other inputs")),
        compiled(Siblings("read twice")),
        compiled(method="outliers", outliers=2),  # each without columns of its own
    ):
        assert merged_siblings(module.program) is None
    twin = merged_siblings(compiled(layers={"k": {"bits": 4}}, tolerance=0.9).program)
    assert twin is not None and {"q_v.weight_codes", "k.weight_codes"} <= twin.state.keys()


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (("a.b.q.weight_codes", "a.b.k.weight_codes"), "a.b.q_k.weight_codes"),
        (("q", "k", "v"), "q_k_v"),
        (("a.x.q.w", "a.k.w"), "a.x.q_k.w"),
    ],
)
def test_a_merged_weight_tells_its_parts(names: tuple[str, ...], wanted: str) -> None:
    assert together(names) == wanted


@pytest.mark.parametrize(("new", "said"), [(0.9, "1.11x"), (1.1, "left apart")])
def test_the_faster_form_is_written(
    new: float, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx_drafts, "interleaved", lambda *_args, **_kw: Pace(1.0, new))
    result = graphopt.export_onnx(compiled(), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    names = " ".join(i.name for i in model.graph.initializer)
    assert ("q_k_v.weight" in names) == ("Split" in {n.op_type for n in model.graph.node})
    assert ("q_k_v.weight" in names) == (new < 1)
    assert sum("products of one input as one" in n and said in n for n in result.notes) == 1
    assert 0 < result.error < 0.03


def test_nothing_is_merged_where_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(onnx_drafts, "interleaved", lambda *_args, **_kw: pytest.fail("timed"))
    for options in ({"measure": False}, {"fuse": False}):
        result = graphopt.export_onnx(compiled(), tmp_path / "m.onnx", **options)
        assert not any("as one" in note for note in result.notes)


def test_other_operators_keep_their_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    program = compiled().program
    options: dict[str, Any] = {"opset": None, "standard": False, "verify": True, "measure": False}
    before = lower(program, **options)
    tried: list[str] = []

    def attempt(form: Any, call: Any, *rest: Any) -> Any:
        tried.append(call.name)
        return choosing_attempt(form, call, *rest)

    choosing_attempt = choosing.attempt
    monkeypatch.setattr(choosing, "attempt", attempt)
    found = lower_merged(program, before, **options)
    assert found is not None and set(tried) == {"q_k_v.weight"}
    assert [c.call.name for c in found.choices] == ["q_k_v.weight", "out.weight"]
    assert found.choices[-1].form == before.choices[-1].form


def test_a_program_without_siblings_is_lowered_once() -> None:
    program: Program = compiled(nn.Sequential(nn.Linear(WIDTH, WIDTH))).program
    options: dict[str, Any] = {"opset": None, "standard": False, "verify": False, "measure": False}
    assert lower_merged(program, lower(program, **options), **options) is None
