"""The operators under autograd, autocast, export, files, compilation and fake values."""

from __future__ import annotations

import io
from functools import partial

import pytest
import torch
from quantized_cases import SCHEMES, WIDTH, name
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.kernels.quantized import QuantizedWeight, Scheme, embedding, linear, quantize

OUTPUTS = 24
ZEROS = Scheme(4, group_size=32, symmetric=False)


def made(scheme: Scheme = ZEROS) -> QuantizedWeight:
    return quantize(torch.randn(OUTPUTS, WIDTH), scheme)


class Tied(nn.Module):
    """An embedding and a head on one storage, and a linear layer between."""

    def __init__(self, activations: str = "none") -> None:
        super().__init__()
        self.activations = activations
        self.table = self.kept("table", made(Scheme(3, group_size=48, symmetric=False)))
        square = quantize(torch.randn(WIDTH, WIDTH) / 10, Scheme())
        self.inner = self.kept("inner", square)

    def kept(self, place: str, weight: QuantizedWeight) -> tuple[Scheme, int]:
        for part, tensor in weight.tensors.items():
            self.register_buffer(f"{place}_{part}", tensor)
        return weight.scheme, weight.width

    def weight(self, place: str) -> QuantizedWeight:
        parts = ("codes", "scales", "zeros", "tensor_scale")
        stored = {part: getattr(self, f"{place}_{part}", None) for part in parts}
        return QuantizedWeight(*getattr(self, place), **stored)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = embedding(ids, self.weight("table"))
        hidden = linear(hidden, self.weight("inner"), None, self.activations).tanh()
        return linear(hidden, self.weight("table"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_gradients_are_those_of_the_product(scheme: Scheme) -> None:
    weight = made(scheme)
    x = torch.randn(2, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUTPUTS, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, bias: Tensor) -> Tensor:
        return (linear(x, weight, bias) / 10).sin()

    assert torch.autograd.gradcheck(run, (x, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, bias), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_rounding_of_activations_is_passed_straight_through(
    dtype: torch.dtype, activations: str
) -> None:
    weight = made()
    x = torch.randn(2, 3, WIDTH).to(dtype).requires_grad_()
    bias = torch.randn(OUTPUTS, requires_grad=True)
    slope = torch.randn(2, 3, OUTPUTS).to(dtype)
    found = torch.autograd.grad(linear(x, weight, bias, activations), (x, bias), slope)
    wanted = slope.double() @ weight.dequantize(torch.float64)
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert (found[0] - wanted).norm() < (1e-5 if dtype == torch.float32 else 8e-3) * wanted.norm()
    assert torch.allclose(found[1].double(), slope.double().sum((0, 1)), rtol=1e-2, atol=1e-1)


def test_a_vector_and_no_rows_have_gradients() -> None:
    weight, bias = made(), torch.randn(OUTPUTS, requires_grad=True)
    for shape in ((WIDTH,), (0, WIDTH)):
        x = torch.randn(shape, requires_grad=True)
        d_x, d_bias = torch.autograd.grad(linear(x, weight, bias).sum(), (x, bias))
        assert d_x.shape == shape
        assert torch.equal(d_bias, torch.full((OUTPUTS,), 1.0 if len(shape) == 1 else 0.0))


@pytest.mark.parametrize("part", ["scales", "zeros"])
def test_no_gradient_of_what_is_stored(part: str) -> None:
    weight, x = made(), torch.randn(2, WIDTH, requires_grad=True)
    weight.tensors[part].requires_grad_()
    with pytest.raises(RuntimeError, match=f"no gradient for its {part}"):
        linear(x, weight).sum().backward()
    with pytest.raises(RuntimeError, match=f"no gradient for its {part}"):
        embedding(torch.tensor([1]), weight).sum().backward()


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_autocast_casts_the_input(activations: str) -> None:
    weight, bias = made(), torch.randn(OUTPUTS, requires_grad=True)
    x = torch.randn(2, WIDTH, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear(x, weight, bias, activations)
        kept = linear(x.double(), weight, bias, activations)
        assert embedding(torch.tensor([1]), weight).dtype == torch.float32
    assert found.dtype == torch.bfloat16 and kept.dtype == torch.float64
    assert torch.equal(found, linear(x.bfloat16(), weight, bias, activations))
    found.sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert bias.grad is not None and bias.grad.dtype == torch.float32


@pytest.mark.parametrize(
    "scheme", [Scheme(), ZEROS, Scheme(8, "fp8"), Scheme(4, "nvfp4")], ids=name
)
def test_torch_finds_nothing_wrong_with_the_operators(scheme: Scheme) -> None:
    weight = made(scheme)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if scheme.dtype == "int":  # torch cannot compare float8 tensors
        checks.append("test_schema")
    opcheck = partial(torch.library.opcheck, test_utils=checks)
    rest = [weight.codes, weight.scales, weight.zeros, weight.tensor_scale]
    fields = [scheme.bits, scheme.dtype, scheme.group_size, scheme.symmetric]
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    bias = torch.randn(OUTPUTS, requires_grad=True)
    op = torch.ops.graphopt
    for activations in ("none", "dynamic"):
        if activations == "none" or scheme.dtype in ("int", "fp8"):
            call = (x, *rest, bias, *fields, activations)
            opcheck(op.quantized_linear.default, call)
    slope = torch.randn(2, 3, OUTPUTS, requires_grad=True)
    opcheck(op.quantized_linear_backward.default, (slope, *rest, WIDTH, *fields))
    indices = torch.tensor([[1, 2]])
    call = (indices, *rest, WIDTH, *fields, torch.bfloat16)
    opcheck(op.quantized_embedding.default, call)


def test_fake_values_check_what_real_ones_do() -> None:
    weight = made(Scheme(4, "mxfp4"))
    with FakeTensorMode() as mode:
        fake = {part: mode.from_tensor(tensor) for part, tensor in weight.tensors.items()}
        stored = QuantizedWeight(weight.scheme, WIDTH, **fake)
        assert linear(torch.empty(2, 0, WIDTH), stored).shape == (2, 0, OUTPUTS)
        with pytest.raises(ValueError, match="dtype int and fp8 have"):
            linear(torch.empty(2, WIDTH), stored, None, "dynamic")
        with pytest.raises(ValueError, match="codes are"):
            linear(torch.empty(2, WIDTH + 32), stored)


@pytest.mark.parametrize("activations", ["none", "dynamic"])
def test_files_hold_a_graph_with_dynamic_sizes(activations: str) -> None:
    model, ids = Tied(activations), torch.randint(0, OUTPUTS, (2, 5))
    sizes = {"ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(model, (ids,), dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    read = torch.export.load(file).module()
    for shape in ((2, 5), (3, 8), (1, 1)):
        ids = torch.randint(0, OUTPUTS, shape)
        assert torch.equal(read(ids), model(ids))


@pytest.mark.parametrize("scheme", [Scheme(8, "fp8"), Scheme(4, "mxfp4"), Scheme(4, "nvfp4")])
def test_files_hold_tensors_of_every_format(scheme: Scheme) -> None:
    weight = made(scheme)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for part, tensor in weight.tensors.items():
                self.register_buffer(part, tensor)

        def forward(self, x: Tensor) -> Tensor:
            return linear(x, QuantizedWeight(scheme, WIDTH, **dict(self.named_buffers())))

    file = io.BytesIO()
    torch.export.save(torch.export.export(Head(), (torch.randn(2, WIDTH),)), file)
    file.seek(0)
    x = torch.randn(2, WIDTH)
    assert torch.equal(torch.export.load(file).module()(x), linear(x, weight))


def test_compiled_forward_and_backward(fresh_dynamo: None) -> None:
    weight, bias = made(), torch.randn(OUTPUTS, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return linear(x * 2, weight, bias, "dynamic").square().sum()

    x = torch.randn(3, WIDTH, requires_grad=True)
    wanted = torch.autograd.grad(run(x), (x, bias))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    found = torch.autograd.grad(compiled(x), (x, bias))
    assert all(torch.allclose(f, w, rtol=1e-5) for f, w in zip(found, wanted, strict=True))
