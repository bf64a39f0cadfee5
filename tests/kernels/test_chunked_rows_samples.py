"""torch's own sample inputs for ``nn.functional.linear_cross_entropy``, on the operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from heads import assert_as_exact
from torch import Tensor

from graphopt.kernels.chunked_rows import chunked_rows

opinfo = pytest.importorskip("torch.testing._internal.common_methods_invocations")
NAME = "nn.functional.linear_cross_entropy"
OPS = [op for op in opinfo.op_db if op.name == NAME]
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass
class Sample:
    """The arguments of ``linear_cross_entropy``; ``leaves`` are those with a gradient."""

    hidden: Tensor
    weight: Tensor
    target: Tensor
    options: dict[str, Any]

    @classmethod
    def of(cls, sample: Any) -> Sample:
        options = {k: v for k, v in sample.kwargs.items() if k != "options"}
        return cls(sample.input, *sample.args, options)

    @property
    def tensors(self) -> list[Tensor]:
        tensors = [self.hidden, self.weight, self.target, self.options.get("linear_bias")]
        return [t for t in tensors if t is not None and t.is_floating_point()]

    def double(self) -> Sample:
        def copied(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return value.detach().double().requires_grad_(value.requires_grad)

        first = map(copied, (self.hidden, self.weight, self.target))
        return Sample(*first, {k: copied(v) for k, v in self.options.items()})


def dense(sample: Sample) -> Tensor:
    options = dict(sample.options)
    bias = options.pop("linear_bias", None)
    logits = torch.tensordot(sample.hidden, sample.weight, dims=([-1], [-1]))
    return F.cross_entropy(logits if bias is None else logits + bias, sample.target, **options)


def chunked(sample: Sample) -> Tensor:
    """A weight ``(C, d1, ..., dK, F)`` is ``d1 * ... * dK`` heads on the same hidden states."""
    features = sample.weight.shape[-1]
    batch, inner = sample.hidden.shape[:-1], sample.weight.shape[1:-1]
    heads = list(sample.weight.reshape(sample.weight.shape[0], -1, features).unbind(1))
    bias, classes = sample.options.get("linear_bias"), sample.options.get("weight")
    whole = [] if bias is None else list(bias.reshape(bias.shape[0], -1).unbind(1))
    groups = (
        [sample.hidden.reshape(-1, features)] * len(heads),
        heads,
        targets(sample, len(heads)),
        whole + ([] if classes is None else [classes]),
    )
    text = body(len(heads), bias is not None, classes is not None, sample.options)
    if sample.options.get("reduction") == "none":
        found = chunked_rows(*groups, text, 1, [True] * len(heads))
        return torch.stack(list(found), -1).reshape((*batch, *inner))
    (total,) = chunked_rows(*groups, text, 1, [True])
    return total if sample.options.get("reduction") == "sum" else total / mass(sample)


def targets(sample: Sample, heads: int) -> list[Tensor]:
    """One per head: classes ``(N,)``, or probabilities ``(N, C)``."""
    batched = sample.target if sample.hidden.dim() == 2 else sample.target.unsqueeze(0)
    soft = batched.is_floating_point()
    shape = (batched.shape[0], batched.shape[1], heads) if soft else (batched.shape[0], heads)
    return list(batched.reshape(shape).unbind(-1))


def body(heads: int, biased: bool, weighed: bool, options: dict[str, Any]) -> str:
    """The sum over heads of their losses; where none is asked for, each head's own."""
    each = range(heads)
    names = [f"{kind}{i}" for kind in ("x", "t") + ("b",) * biased for i in each]
    lines = [f"def body({', '.join(names + ['classes'] * weighed)}):"]
    reduction = 0 if options.get("reduction") == "none" else 2
    ignored = options.get("ignore_index", -100)
    for i in each:
        if biased:
            lines.append(f"    y{i} = aten.add.Tensor(x{i}, b{i})")
        args = f"{'y' if biased else 'x'}{i}, t{i}, {'classes' if weighed else None}"
        lines.append(f"    l{i} = aten.cross_entropy_loss.default({args}, {reduction}, {ignored})")
    if reduction == 0:
        return "\n".join([*lines, f"    return [{', '.join(f'l{i}' for i in each)}], []"])
    lines.append("    s0 = aten.clone.default(l0)")
    lines += [f"    s{i} = aten.add.Tensor(s{i - 1}, l{i})" for i in each[1:]]
    return "\n".join([*lines, f"    return [], [s{heads - 1}]"])


def mass(sample: Sample) -> Tensor | int:
    """What the mean divides by: the weights of the classes that count."""
    target, classes = sample.target, sample.options.get("weight")
    if target.is_floating_point():
        return target.numel() // sample.weight.shape[0]
    counts = target != sample.options.get("ignore_index", -100)
    return (counts if classes is None else classes[target * counts] * counts).sum()


@pytest.mark.skipif(not OPS, reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.formatted_name)
def test_samples_of_torch(op: Any, dtype: torch.dtype) -> None:
    samples = [Sample.of(s) for s in op.sample_inputs("cpu", dtype, requires_grad=True)]
    assert len(samples) > 20
    for sample in samples:
        found, eager = chunked(sample), torchs_own(sample)
        exact = sample.double()
        wanted = dense(exact)
        assert found.dtype == eager.dtype == dtype
        seed = torch.rand_like(found) + 0.5
        assert_as_exact(
            [found, *torch.autograd.grad(found, sample.tensors, seed)],
            [eager, *torch.autograd.grad(eager, sample.tensors, seed)],
            [wanted, *torch.autograd.grad(wanted, exact.tensors, seed.double())],
            LIMITS[dtype],
            times=3,  # single roundings show in samples this small
        )


def torchs_own(sample: Sample) -> Tensor:
    return F.linear_cross_entropy(sample.hidden, sample.weight, sample.target, **sample.options)
