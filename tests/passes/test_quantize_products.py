"""Products that are no plain linear layers, quantized end to end, and what stays explained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import huggingface
from torch import Tensor, nn

import graphopt
from graphopt.passes import QuantizeMatmul
from graphopt.passes.quantize.forms import products
from graphopt.passes.quantize.views import constants
from graphopt.program import Program

QUIET = "ignore::UserWarning"


def quantized(model: nn.Module, *args: Any, preset: str = "exact", **options: Any) -> Any:
    kwargs = args[0] if args and isinstance(args[0], dict) else None
    return graphopt.compile(
        model.eval(),
        example_inputs=None if kwargs else args,
        example_kwargs=kwargs,
        passes=[preset, QuantizeMatmul(**options)],
        measure=False,
    )


def counts(fast: Any) -> dict[str, int]:
    rules = [a.rule for a in fast.report.applied if a.pass_name == "QuantizeMatmul"]
    return {rule: rules.count(rule) for rule in sorted(set(rules))}


def error(made: Tensor, wanted: Tensor) -> float:
    return float((made - wanted).norm() / wanted.norm())


class Attention(nn.Module):
    """torch's own attention: three projections in one weight, read as slices of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(32, 4, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, y, y, need_weights=False)[0].tanh()


def test_slices_of_one_weight() -> None:
    torch.manual_seed(0)
    model, inputs = Attention(), (torch.randn(2, 5, 32), torch.randn(2, 7, 32))
    fast = quantized(model, *inputs)
    assert counts(fast) == {"QuantizeLinear": 3, "SpellProduct": 1} and fast.report.verified
    held = fast.program.state
    assert not [
        n for n, t in held.items() if t.dim() == 2 and t.dtype == torch.float32 and t.shape[1] > 1
    ]
    with torch.no_grad():
        assert error(fast(*inputs), model(*inputs)) < 0.05


def test_a_name_finds_every_slice() -> None:
    inputs = (torch.randn(2, 5, 32), torch.randn(2, 7, 32))
    fast = quantized(Attention(), *inputs, skip="inner.in_proj_weight")
    assert counts(fast) == {"QuantizeLinear": 1}
    assert "is skipped by 'inner.in_proj_weight'" in fast.report.missed[-1].reason


def test_methods_see_products_as_the_layers_they_are() -> None:
    torch.manual_seed(0)
    model, inputs = Attention(), (torch.randn(2, 5, 32), torch.randn(2, 7, 32))
    options = {"bits": 4, "activations": None, "group_size": 16}
    fast = graphopt.compile(
        model.eval(),
        example_inputs=inputs,
        calibration=[tuple(torch.randn_like(x) for x in inputs) for _ in range(8)],
        passes=["exact", QuantizeMatmul(method="gptq", **options)],
        measure=False,
    )
    assert counts(fast)["QuantizeLinear"] == 3
    assert not any("rounded" in note for note in fast.report.quantization.notes)


class Mixed(nn.Module):
    """A convolution, a tied table, experts, and a recurrence that nothing quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(16, 32, 3, padding="same")
        self.experts = nn.Parameter(torch.randn(4, 32, 32) / 6)
        self.steps = nn.GRU(32, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = torch.einsum("bds,bde->bse", y, self.experts[: len(x)]).relu()
        return self.steps(y)[0].tanh()


@pytest.mark.parametrize("bits", [8, 4])
def test_every_kind_of_product(bits: int) -> None:
    torch.manual_seed(0)
    options = {"bits": bits} | ({} if bits == 8 else {"activations": None, "group_size": 16})
    model, x = Mixed(), torch.randn(4, 16, 9)
    fast = quantized(model, x, **options)
    assert counts(fast) == {"QuantizeConvolution": 1, "QuantizeExperts": 1}
    assert any("`aten.gru.input` has no quantized form" in m.reason for m in fast.report.missed)
    with torch.no_grad():
        assert error(fast(x), model(x)) < (0.05 if bits == 8 else 0.2)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, groups=16)
        self.point = nn.Conv2d(16, 32, 1, stride=2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.point(self.depth(x)).relu().mean((2, 3))).softmax(-1)


def test_a_network_of_convolutions(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 12, 12)
    fast = quantized(model, x)
    assert counts(fast) == {"QuantizeConvolution": 3, "QuantizeLinear": 1}
    assert fast.report.verified
    again = graphopt.load(graphopt.save(fast, tmp_path / "net.pt2"))
    assert torch.equal(again(x), fast(x))
    skipped = quantized(model, x, skip=("stem", "norm"))
    assert counts(skipped) == {"QuantizeConvolution": 2, "QuantizeLinear": 1}


def test_what_is_slower_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions are timed where activations are quantized; not so where only weights are."""
    monkeypatch.setattr("graphopt.pipeline.pays", lambda pace: pace is None)
    x = torch.randn(4, 3, 12, 12)
    for activations, count in (("dynamic", 0), (None, 3)):
        passes = ["Canonicalize", QuantizeMatmul(activations=activations)]
        fast = graphopt.compile(Net().eval(), example_inputs=(x,), passes=passes)
        assert counts(fast).get("QuantizeConvolution", 0) == count


def unexplained(program: Program, report: Any) -> set[str]:
    """Products with a constant operand that are still there and that no row of the report names."""
    known, found = constants(program), products(program)
    named = {m.node for m in report.missed}
    rows = {*found.unread, *(n for sides in found.by_weight.values() for n in sides)}
    rows |= {
        n
        for n in program.graph.nodes
        if any(word in str(n.target) for word in ("aten.linear", "aten.conv", "grouped_mm"))
        and not known.isdisjoint(n.all_input_nodes)
    }
    return {n.name for n in rows if not named & {n.name, *(a.name for a in n.all_input_nodes)}}


ZOO = {
    "mixtral": {"QuantizeExperts": 4},
    "xlnet": {"SpellProduct": 8},
    "recurrent-gemma": {"QuantizeExperts": 2},
    "squeezebert": {"QuantizeConvolution": 12},
    "mobilebert": {},
}


@pytest.mark.filterwarnings(QUIET)
@pytest.mark.parametrize("name", ZOO)
def test_models_are_quantized_or_explained(name: str) -> None:
    entry = huggingface.ENTRIES[name]
    fast = quantized(entry.build(), entry.inputs(), head=True, embeddings=True)
    assert fast.report.verified
    assert unexplained(fast.program, fast.report) == set()
    assert ZOO[name].items() <= counts(fast).items()
