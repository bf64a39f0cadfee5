"""What cannot be captured gives one cause, the user's line and what to change."""

from __future__ import annotations

import inspect
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from graphopt.capture import capture
from graphopt.errors import CaptureError


class Calls(nn.Module):
    """A linear layer around a function of the test."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.recurrent = nn.LSTM(4, 4)
        self.function = function
        self.plain = torch.ones(4)
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Box:
    def __init__(self, x: Tensor) -> None:
        self.x = x


def x() -> Tensor:
    return torch.randn(3, 4)


def branch(m: Calls, a: Tensor) -> Tensor:
    y = m.linear(a)
    if y.sum() > 0:  # here
        return y
    return -y


def loop(m: Calls, a: Tensor) -> Tensor:
    while a.norm() < 10:  # here
        a = a * 2
    return a


def assertion(m: Calls, a: Tensor) -> Tensor:
    assert (a < 100).all()  # here
    return a


def bound(m: Calls, a: Tensor) -> Tensor:
    for _ in range(int(a.argmax())):  # here
        a = m.linear(a)
    return a


def found_rows(m: Calls, a: Tensor) -> Tensor:
    kept = a[a.sum(1) > 0]
    return kept * 2 if kept.shape[0] > 1 else kept  # here


def packed(m: Calls, a: Tensor) -> Any:
    return m.recurrent(pack_padded_sequence(a[None], torch.tensor([3]), batch_first=True))  # here


def to_numpy(m: Calls, a: Tensor) -> Tensor:
    return a + torch.from_numpy(np.sin(a.numpy()))  # here


def as_array(m: Calls, a: Tensor) -> Tensor:
    return a + torch.as_tensor(np.asarray(a))  # here


def formatted(m: Calls, a: Tensor) -> Tensor:
    print(f"{a.mean():.3f}")  # here
    return a


def plain_tensor(m: Calls, a: Tensor) -> Tensor:
    m.plain.add_(1)
    return a * m.plain


def counter(m: Calls, a: Tensor) -> Tensor:
    m.calls += 1
    return a * m.calls


def remembered(m: Calls, a: Tensor) -> Tensor:
    last = getattr(m, "last", None)
    m.last = a * 2
    return a if last is None else a + last


def own_error(m: Calls, a: Tensor) -> Tensor:
    raise ValueError("the configuration is wrong")  # here


def own_shape(m: Calls, a: Tensor) -> Tensor:
    lengths = torch.tensor([3])
    return torch.ctc_loss(a[:, None], a[:1, :2].long(), lengths, lengths)  # here


def seeded(m: Calls, a: Tensor) -> Tensor:
    torch.manual_seed(0)
    return a + torch.randn(3, 4)


def python_random(m: Calls, a: Tensor) -> Tensor:
    return a * random.random()


def numpy_random(m: Calls, a: Tensor) -> Tensor:
    return a * float(np.random.rand())


def own_generator(m: Calls, a: Tensor) -> Tensor:
    return a + torch.randn(3, 4, generator=torch.Generator().manual_seed(1))  # here


def layer_drop(m: Calls, a: Tensor) -> Tensor:
    return a if torch.rand(1) < 0.5 else m.linear(a)  # here


def own_output(m: Calls, a: Tensor) -> Any:
    return Box(m.linear(a))


def generator_output(m: Calls, a: Tensor) -> Any:
    return (row for row in m.linear(a))


def other_device(m: Calls, a: Tensor) -> Tensor:
    return m.linear(a.to("meta"))  # here


def wrong_size(m: Calls, a: Tensor) -> Tensor:
    return m.linear(a[:, :3])  # here


def wrong_view(m: Calls, a: Tensor) -> Tensor:
    return a.view(5, 2)  # here


def written_parameter(m: Calls, a: Tensor) -> Tensor:
    with torch.no_grad():
        m.linear.weight.clamp_(-0.1, 0.1)
    return m.linear(a)


INSIDE = {
    branch: "control flow depends on the values of a tensor",
    loop: "control flow depends on the values of a tensor",
    assertion: "control flow depends on the values of a tensor",
    layer_drop: "control flow depends on the values of a tensor",
    found_rows: "control flow depends on the values of a tensor",
    bound: "used as a Python number",
    packed: "used as a Python number",
    to_numpy: "turned into a NumPy value",
    as_array: "turned into a NumPy value",
    formatted: "formatted for printing",
    plain_tensor: "writes a tensor that is a plain attribute",
    counter: "writes `calls`, and the next call depends on it",
    remembered: "writes `last`, and the next call depends on it",
    own_error: "ValueError: the configuration is wrong",
    own_shape: "the shape of a result depends on the values",
    seeded: "sets the seed",
    python_random: "Python's random",
    numpy_random: "NumPy's random",
    own_generator: "Generator",
    own_output: "returns an object that a graph cannot return",
    generator_output: "returns an object that a graph cannot return",
    other_device: "tensors on different devices meet",
    wrong_size: "shapes of the example inputs do not fit",
    wrong_view: "shapes of the example inputs do not fit",
    written_parameter: "writes the parameter linear.weight in place",
}


@pytest.mark.parametrize("function", INSIDE, ids=lambda f: f.__name__)
def test_a_forward_that_cannot_be_captured(
    function: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError) as caught:
        capture(Calls(function).eval(), (x(),))
    assert INSIDE[function] in caught.value.what
    assert caught.value.fix
    lines, start = inspect.getsourcelines(function)
    marked = [start + i for i, line in enumerate(lines) if line.rstrip().endswith("# here")]
    if marked:
        assert caught.value.where == f"{__file__}:{marked[0]}"
    assert capfd.readouterr() == ("", ""), "torch's own messages reached the terminal"


def _quantized() -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)))


def _made_in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Linear(4, 4)


class _NoForward(nn.Module):
    pass


def _with_sparse_buffer() -> nn.Module:
    model = nn.Linear(4, 4)
    model.register_buffer("graph", torch.eye(4).to_sparse())
    return model


MODELS = {
    "scripted": (lambda: torch.jit.script(nn.Linear(4, 4)), "TorchScript"),
    "scripted part": (lambda: nn.Sequential(torch.jit.script(nn.ReLU())), "TorchScript"),
    "quantized": (_quantized, "packed weights"),
    "lazy": (lambda: nn.LazyLinear(4), "not initialised"),
    "on meta": (lambda: nn.Linear(4, 4, device="meta"), "meta device"),
    "inference tensors": (_made_in_inference_mode, "torch.inference_mode"),
    "sparse buffer": (_with_sparse_buffer, "torch.sparse_coo"),
    "no forward": (_NoForward, "has no forward"),
    "a function": (lambda: torch.relu, "not an nn.Module"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_module_that_cannot_be_captured(name: str) -> None:
    make, what = MODELS[name]
    with pytest.raises(CaptureError, match=what) as caught:
        capture(make(), (x(),))
    assert caught.value.fix


INPUTS = {
    "an object": (lambda: Box(x()), "is a Box", "a[0]"),
    "a generator": (lambda: (x() for _ in range(2)), "is a generator", "a[0]"),
    "an array": (lambda: np.ones(4), "is a ndarray", "a[0]"),
    "inside a dict": (lambda: {"deep": [b"bytes"]}, "is a bytes", "a[0]['deep'][0]"),
    "a complex number": (lambda: 1 + 2j, "is a complex", "a[0]"),
    "a random generator": (torch.Generator, "is a Generator", "a[0]"),
    "a meta tensor": (lambda: x().to("meta"), "meta device", "a[0]"),
    "a sparse tensor": (lambda: x().to_sparse(), "torch.sparse_coo", "a[0]"),
    "a nested tensor": (
        lambda: torch.nested.nested_tensor([x(), x()], layout=torch.jagged),
        "torch.jagged",
        "a[0]",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_an_input_that_cannot_be_captured(name: str) -> None:
    make, what, where = INPUTS[name]

    class Anything(nn.Module):
        def forward(self, *a: Any) -> Any:
            return a

    with pytest.raises(CaptureError) as caught:
        capture(Anything(), (make(),))
    assert what in caught.value.what and caught.value.where == where and caught.value.fix


@pytest.mark.parametrize("args, kwargs", [((), {"inp": 1}), ((), {}), ((1, 2), {})])
def test_arguments_that_forward_does_not_take(args: Any, kwargs: Any) -> None:
    with pytest.raises(CaptureError, match=r"do not fit Linear\.forward\(input"):
        capture(nn.Linear(4, 4), args, kwargs)


def test_inference_tensors_as_examples_are_copied() -> None:
    with torch.inference_mode():
        example = x()
    program = capture(nn.Linear(4, 4), (example,))
    assert not program.example_inputs[0].is_inference()
