"""Quantized weights in ONNX files: every scheme, in ONNX Runtime, against float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models.huggingface import ENTRIES
from torch import Tensor, nn

import graphopt
from graphopt.emit import onnx_runtime
from graphopt.emit.onnx_quantized import calls_of, lower, nbits
from graphopt.emit.onnx_quantized.alone import difference
from graphopt.errors import ExportError
from graphopt.kernels.quantized import QuantizedWeight, Scheme, embedding, linear, quantize
from graphopt.passes import QuantizeMatmul
from graphopt.verify.unrounded import unrounded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OUTPUTS = 48
ONLY = {"activations": None}
FOUR = {"bits": 4, **ONLY}


def compiled(model: nn.Module, x: Tensor, axes: Any = None, **options: Any) -> Any:
    passes = ["Canonicalize", QuantizeMatmul(head=True, **options)]
    return graphopt.compile(
        model.eval(), example_inputs=(x,), passes=passes, measure=False, dynamic_shapes=axes
    )


def ran(path: Path, *inputs: Tensor) -> list[Tensor]:
    session = onnx_runtime.open_session(path)
    named = {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, named)]


def assert_near(found: Tensor, wanted: Tensor, most: float = 0.012) -> None:
    """Noise of rounded activations at the most, and no scale that is off by half a percent."""
    error, gain = difference(found, wanted)
    assert error < most
    assert abs(gain - 1) < 2e-3
    flat, true = found.double().flatten(0, -2), wanted.flatten(0, -2)
    channels = (flat * true).sum(0) / true.square().sum(0)
    assert (channels - 1).abs().max() < most / 2


def most_of(scheme: Scheme, activations: str) -> float:
    """The error of activations in 8 bits; E4M3 has 3 bits behind the point."""
    return 0.04 if scheme.dtype == "fp8" and activations == "dynamic" else 0.012


class Product(nn.Module):
    """A product with a weight of random numbers, with a bias or without."""

    def __init__(self, scheme: Scheme, activations: str, width: int, bias: bool) -> None:
        super().__init__()
        self.scheme, self.activations, self.width = scheme, activations, width
        weight = quantize(torch.randn(OUTPUTS, width), scheme)
        for name, tensor in weight.tensors.items():
            self.register_buffer(name, tensor)
        self.bias = nn.Parameter(torch.randn(OUTPUTS), requires_grad=False) if bias else None

    @property
    def stored(self) -> QuantizedWeight:
        return QuantizedWeight(self.scheme, self.width, **dict(self.named_buffers()))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.stored, self.bias, self.activations)

    def exact(self, x: Tensor) -> Tensor:
        """The product with the stored weight in float64, activations as they are."""
        made = x.double() @ self.stored.dequantize(torch.float64).t()
        return made if self.bias is None else made + self.bias.double()


class Several(nn.Module):
    """Products of inputs, one each, or all of one."""

    def __init__(self, products: list[Product]) -> None:
        super().__init__()
        self.products = nn.ModuleList(products)

    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        xs = xs if len(xs) > 1 else xs * len(self.products)
        return tuple(p(x) for p, x in zip(self.products, xs, strict=True))


def exported(model: nn.Module, inputs: tuple[Tensor, ...], path: Path, **options: Any) -> Any:
    axes = options.pop("dynamic_shapes", None)
    module = graphopt.compile(
        model.eval(),
        example_inputs=inputs,
        passes=["Canonicalize"],
        measure=False,
        dynamic_shapes=axes,
    )
    return graphopt.export_onnx(module, path, **{"measure": False, **options})


WIDTH = 96
SCHEMES = [
    ("dynamic", Scheme()),
    ("dynamic", Scheme(symmetric=False)),
    ("dynamic", Scheme(6)),
    ("dynamic", Scheme(4)),
    ("dynamic", Scheme(4, symmetric=False)),
    ("dynamic", Scheme(2, symmetric=False)),
    ("dynamic", Scheme(4, group_size=32)),
    ("dynamic", Scheme(4, group_size=24)),
    ("dynamic", Scheme(8, group_size=32, symmetric=False)),
    ("dynamic", Scheme(dtype="fp8")),
    ("none", Scheme()),
    ("none", Scheme(6)),
    ("none", Scheme(8, group_size=32, symmetric=False)),
    ("none", Scheme(4)),
    ("none", Scheme(4, group_size=32)),
    ("none", Scheme(4, group_size=32, symmetric=False)),
    ("none", Scheme(4, group_size=48, symmetric=False)),
    ("none", Scheme(4, group_size=24)),
    ("none", Scheme(3, group_size=32)),
    ("none", Scheme(3, symmetric=False)),
    ("none", Scheme(2, group_size=32)),
    ("none", Scheme(2, group_size=16, symmetric=False)),
    ("none", Scheme(4, "nf4", 32)),
    ("none", Scheme(4, "nf4", 24)),
    ("none", Scheme(4, "fp4", 32)),
    ("none", Scheme(4, "fp4")),
    ("none", Scheme(4, "mxfp4")),
    ("none", Scheme(4, "nvfp4")),
    ("none", Scheme(dtype="fp8")),
]


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "standard"])
def every_scheme(request: Any, tmp_path_factory: Any) -> Any:
    """A model of all schemes, its file, and its outputs on other sizes than it was captured on."""
    torch.manual_seed(0)
    parts = [Product(s, a, WIDTH, i % 2 == 0) for i, (a, s) in enumerate(SCHEMES)]
    path = tmp_path_factory.mktemp("q") / "q.onnx"
    axes = (({0: "batch", 1: "seq"},),)
    exported(
        Several(parts), (torch.randn(3, 40, WIDTH),), path, fuse=request.param, dynamic_shapes=axes
    )
    x = torch.randn(5, 31, WIDTH)
    return parts, path, x, ran(path, x), request.param


@pytest.mark.parametrize("index", range(len(SCHEMES)), ids=[f"{a}-{s}" for a, s in SCHEMES])
def test_every_scheme(index: int, every_scheme: Any) -> None:
    parts, _, x, found, _ = every_scheme
    activations, scheme = SCHEMES[index]
    assert_near(found[index], parts[index].exact(x), most_of(scheme, activations))


def test_nothing_of_our_own_is_in_the_file(every_scheme: Any) -> None:
    _, path, _, _, fused = every_scheme
    model = onnx.load(path)
    domains = {n.domain for n in model.graph.node} | {o.domain for o in model.opset_import}
    assert domains == ({"", "com.microsoft"} if fused else {""})


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("scheme", [Scheme(4), Scheme(4, "nf4", 64), Scheme(4, "mxfp4")], ids=str)
def test_files_are_small(scheme: Scheme, fuse: bool, tmp_path: Path) -> None:
    model = Product(scheme, "none", 2048, bias=False)
    result = exported(model, (torch.randn(4, 2048),), tmp_path / "q.onnx", fuse=fuse)
    groups = 2048 // (scheme.group_size or 2048)
    if fuse and scheme == Scheme(4):
        groups = 2048 // 32  # the smallest of the blocks that a channel may be cut into
    assert result.bytes < OUTPUTS * (2048 / 2 + 4 * groups) + 8000


SHAPES = [(101,), (7, 101), (2, 1, 3, 101), (4, 10), (1, 1, 300)]
KINDS = [
    ("dynamic", Scheme()),
    ("dynamic", Scheme(4, symmetric=False)),
    ("none", Scheme(4)),
    ("none", Scheme(3, symmetric=False)),
    ("none", Scheme(4, "fp4")),
    ("none", Scheme(4, "nf4")),
    ("dynamic", Scheme(dtype="fp8")),
]


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "standard"])
def test_inputs_of_any_shape(fuse: bool, tmp_path: Path) -> None:
    """K that no block divides; codes that end within a byte; results that are outputs."""
    torch.manual_seed(0)
    cases = [(kind, shape) for kind in KINDS for shape in SHAPES]
    parts = [Product(s, a, sh[-1], i % 2 == 0) for i, ((a, s), sh) in enumerate(cases)]
    inputs = tuple(torch.randn(shape) for _, shape in cases)
    exported(Several(parts), inputs, tmp_path / "q.onnx", fuse=fuse)
    found = ran(tmp_path / "q.onnx", *inputs)
    for ((activations, scheme), _), part, x, made in zip(cases, parts, inputs, found, strict=True):
        wanted = part.exact(x)
        assert made.shape == wanted.shape
        assert difference(made, wanted)[0] < most_of(scheme, activations)


@pytest.mark.parametrize("scheme", [Scheme(bits, "int", 16, False) for bits in (2, 3, 4, 6, 8)])
def test_zero_points_that_are_codes(scheme: Scheme, tmp_path: Path) -> None:
    """They are packed as codes are, for products and for rows; others are a product of sums."""
    torch.manual_seed(0)
    whole, other = (Tied(scheme, "none", 16 * 5, bias=False) for _ in range(2))
    low, high = scheme.limits
    whole.zeros = torch.randint(low, high + 1, whole.zeros.shape).to(whole.zeros.dtype)
    other.zeros = whole.zeros + 0.25
    for part, count in ((whole, 0), (other, 1)):
        x = torch.randint(OUTPUTS, (2, 7))
        exported(part, (x,), tmp_path / "z.onnx")
        rows, made = ran(tmp_path / "z.onnx", x)
        stored = part.stored.dequantize(torch.float64)
        assert difference(rows, stored[x])[0] < 1e-6
        assert difference(made, stored[x].tanh() @ stored.t())[0] < 0.012
        nodes = [n.op_type for n in onnx.load(tmp_path / "z.onnx").graph.node]
        assert nodes.count("ReduceSum") == nodes.count("Sub") == count


def test_files_are_held_to_activations_as_they_are() -> None:
    part, x = Product(Scheme(), "dynamic", WIDTH, bias=True), torch.randn(9, WIDTH)
    module = graphopt.compile(
        part.eval(), example_inputs=(x,), passes=["Canonicalize"], measure=False
    )
    (made,) = unrounded(module.program).run([x])
    assert difference(made, part.exact(x))[0] < 1e-6
    assert difference(module(x), part.exact(x))[0] > 1e-3


def test_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kinds = [("dynamic", Scheme()), ("none", Scheme(4, group_size=32)), ("none", Scheme(2))]
    parts = [Product(scheme, activations, 64, True) for activations, scheme in kinds]
    x = torch.randn(5, 64).half()
    exported(Several(parts), (x,), tmp_path / "q.onnx")
    for part, made in zip(parts, ran(tmp_path / "q.onnx", x), strict=True):
        assert made.dtype == torch.float16
        assert difference(made, part.exact(x))[0] < 0.012


def test_float_parts_keep_their_fusions(tmp_path: Path) -> None:
    entry = ENTRIES["bert"]
    module = graphopt.compile(
        entry.build(),
        example_kwargs=entry.inputs(),
        dynamic_shapes=entry.dynamic_axes,
        passes=["Canonicalize", QuantizeMatmul()],
        measure=False,
    )
    products = [a.rule for a in module.report.applied].count("QuantizeLinear")
    result = graphopt.export_onnx(module, tmp_path / "m.onnx", measure=False)
    fused = result.fusions
    assert products > 8
    assert (fused["skip_layer_normalization"], fused["bias_gelu"], fused["mha2"]) == (4, 3, 2)


class Tied(Product):
    """A language model's ends: rows of a weight, and products with all of it."""

    def forward(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        rows = embedding(indices, self.stored)
        return rows, super().forward(rows.tanh())


TIED = [
    Scheme(),
    Scheme(symmetric=False),
    Scheme(4, group_size=32),
    Scheme(4, group_size=48, symmetric=False),
    Scheme(2, group_size=16),
    Scheme(3),
    Scheme(4, "nf4", 32),
    Scheme(4, "mxfp4"),
    Scheme(4, "nvfp4"),
    Scheme(dtype="fp8"),
]


class Ends(Several):
    def forward(self, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(made for p, x in zip(self.products, xs, strict=True) for made in p(x))


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_a_tied_weight_is_stored_once(activations: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    known = [s for s in TIED if activations == "none" or s.dtype in ("int", "fp8")]
    parts = [Tied(scheme, activations, WIDTH, bias=False) for scheme in known]
    inputs = tuple(torch.randint(OUTPUTS, (2, 7)) for _ in parts)
    exported(Ends(parts), inputs, tmp_path / "t.onnx")
    held = onnx.load(tmp_path / "t.onnx").graph.initializer
    codes = [i for i in held if i.data_type in (onnx.TensorProto.UINT8, onnx.TensorProto.INT8)]
    assert len([i for i in codes if np.prod(i.dims) >= OUTPUTS * WIDTH // 4]) == len(known)
    found = ran(tmp_path / "t.onnx", *inputs)
    for part, x, rows, made in zip(parts, inputs, found[::2], found[1::2], strict=True):
        stored = part.stored.dequantize(torch.float64)
        assert difference(rows, stored[x])[0] < 1e-6
        wanted = stored[x].tanh() @ stored.t()
        assert difference(made, wanted)[0] < most_of(part.scheme, activations)


def test_standard_forms_say_where_a_tied_weight_is_stored_twice(tmp_path: Path) -> None:
    model, x = Tied(Scheme(8), "none", WIDTH, bias=False), torch.randint(OUTPUTS, (2, 7))
    result = exported(model, (x,), tmp_path / "t.onnx", fuse=False)
    assert any("`codes` is stored twice" in note for note in result.notes)


def test_a_scale_that_is_off_is_never_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By one percent, which is less than what rounding activations does."""
    plain = nbits._scales
    module = compiled(nn.Linear(64, OUTPUTS), torch.randn(64, 64), bits=2, group_size=32, **ONLY)

    def off(emit: Any, call: Any, found: Any, block: int) -> Any:
        return plain(emit, call, found._replace(scales=found.scales * 1.01), block)

    monkeypatch.setattr(nbits, "_scales", off)
    result = graphopt.export_onnx(module, tmp_path / "q.onnx")  # in another form
    tried = [t for note in result.notes for t in note.split("; ") if "MatMulNBits" in t]
    assert tried and all("a scale is off by 1.0%" in t or "above the bound" in t for t in tried)
    choice = lower(module.program, opset=None, standard=False, verify=True, measure=False)
    assert "MatMulNBits" not in choice.choices[0].form.name


def test_a_weight_laid_out_for_one_machine_is_refused(tmp_path: Path) -> None:
    module = compiled(nn.Linear(64, 64), torch.randn(3, 64), bits=4, group_size=32, **ONLY)
    for node in calls_of(module.program):
        node.kwargs = {**node.kwargs, "layout": "int4pack"}
    with pytest.raises(ExportError, match="laid out for this machine"):
        calls_of(module.program)


def test_operator_sets(tmp_path: Path) -> None:
    """What an operator set lacks is written otherwise, or refused with what has it."""
    x = torch.randn(3, 64)
    module = compiled(nn.Linear(64, 64), x, bits=4, group_size=32, **ONLY)
    for opset, form in ((18, "table"), (21, "DequantizeLinear"), (None, "DequantizeLinear")):
        result = graphopt.export_onnx(module, tmp_path / "q.onnx", opset=opset, fuse=False)
        assert any(form in note for note in result.notes)
    float8 = compiled(nn.Linear(64, 64), x, dtype="fp8")
    with pytest.raises(ExportError, match="no form in operator set 18"):
        graphopt.export_onnx(float8, tmp_path / "f.onnx", opset=18)
    assert graphopt.export_onnx(float8, tmp_path / "f.onnx", opset=19).error < 0.04
