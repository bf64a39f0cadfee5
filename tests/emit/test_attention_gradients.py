"""In eval mode gradients of inputs through recognised attention are those of the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt

LOWEST = torch.finfo(torch.float32).min


class Attend(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return (q @ k.mT / 2 + torch.where(seen, 0.0, LOWEST)).softmax(-1) @ v


def first(call: Any, tensors: list[Tensor], seen: Tensor) -> tuple[Tensor, ...]:
    q, k, v = tensors
    return torch.autograd.grad((call(q, k, v, seen) ** 2).sum(), tensors)


def second(call: Any, tensors: list[Tensor], seen: Tensor) -> tuple[Tensor, ...]:
    q, k, v = tensors
    (slope,) = torch.autograd.grad((call(q, k, v, seen) ** 2).sum(), q, create_graph=True)
    return torch.autograd.grad((slope**2).sum(), tensors)


@pytest.fixture(scope="module")
def module() -> Any:
    inputs = (*torch.randn(3, 2, 3, 5, 4), torch.ones(5, 5, dtype=torch.bool))
    made = graphopt.compile(Attend().eval(), example_inputs=inputs, measure=False)
    assert "RecognizeAttention" in [applied.rule for applied in made.report.applied]
    return made


@pytest.mark.parametrize("gradient", [first, second])
@pytest.mark.parametrize("form", ["compiled", "loaded", "torch.compile"])
def test_of_inputs_where_a_finite_mask_hides_a_row(
    gradient: Any, form: str, module: Any, tmp_path: Any, fresh_dynamo: None
) -> None:
    if form == "loaded":
        path = graphopt.save(module, tmp_path / "attend.pt2")
        module = graphopt.load(path)
    elif form == "torch.compile":
        module = torch.compile(module, backend="eager")
    tensors = [t.requires_grad_() for t in torch.randn(3, 2, 3, 5, 4).unbind()]
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[2] = False
    wanted = gradient(Attend(), tensors, seen)
    made = gradient(module, tensors, seen)
    for a, b in zip(wanted, made, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
