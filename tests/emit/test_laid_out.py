"""Weights of four bits as this CPU's kernel reads them: same numbers, and plain outside."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.emit import laid_out
from graphopt.kernels.quantized import int4pack
from graphopt.kernels.quantized.rounding import quantize
from graphopt.kernels.quantized.scheme import Scheme
from graphopt.passes import QuantizeMatmul


class Tied(nn.Module):
    """A table that a head shares, and a layer with a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.table = nn.Embedding(192, 128, dtype=dtype)
        self.up, self.down = nn.Linear(128, 64, dtype=dtype), nn.Linear(64, 128, dtype=dtype)
        self.head = nn.Linear(128, 192, bias=False, dtype=dtype)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        y: Tensor = self.head(x + self.down(torch.relu(self.up(x))))
        return y


IDS = torch.tensor([[3, 191, 64]])
Made = tuple[Any, Any]


def compiled(model: nn.Module, layout: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """As if measurement had chosen a layout."""
    monkeypatch.setattr(laid_out, "_layout", lambda *_: layout)
    symmetric = options.pop("symmetric", True)
    small = QuantizeMatmul(
        bits=4,
        group_size=64,
        activations=None,
        symmetric=symmetric,
        head=True,
        embeddings=True,
    )
    return graphopt.compile(model, example_inputs=(IDS,), passes=small, **options)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_it_computes_what_the_plain_layout_does(
    dtype: torch.dtype, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tied(dtype).eval()
    made = compiled(model, "int4pack", monkeypatch, symmetric=symmetric)
    plain = compiled(model, "plain", monkeypatch, symmetric=symmetric)
    assert len(made._laid) == 3 and not plain._laid
    found, wanted = made(IDS), plain(IDS)
    assert found.dtype == dtype
    assert (found - wanted).norm() < 0.01 * wanted.norm()
    assert any("as this machine's kernel reads them" in note for note in made.report.notes)


def _saved(made: Any, folder: Path) -> Any:
    graphopt.save(made, folder / "made.pt2")
    return graphopt.load(folder / "made.pt2")


COPIES: dict[str, Callable[[Any, Path], Any]] = {
    "saved": _saved,
    "copied": lambda made, _: copy.deepcopy(made),
    "pickled": lambda made, _: pickle.loads(pickle.dumps(made)),
}


@pytest.mark.parametrize("name", COPIES)
@torch.no_grad()
def test_copies_are_laid_out_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiled(Tied().eval(), "int4pack", monkeypatch)
    again = COPIES[name](made, tmp_path)
    assert again._laid == made._laid
    assert torch.equal(again(IDS), made(IDS))


def test_the_plain_codes_are_not_held_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled(Tied().eval(), "int4pack", monkeypatch)
    codes = [t for n, t in made.program.state.items() if n.endswith("_codes")]
    assert codes and all(t.is_meta for t in codes)
    held = {t.data_ptr(): t.nbytes for t in (*made.parameters(), *made.buffers())}
    tables = sum(t.nbytes for t in int4pack.places(128))
    assert (
        sum(held.values()) - tables < (192 * 128 + 2 * 64 * 128) * (4 + 16 / 64 + 32 / 64) / 8 + 1e3
    )


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


@pytest.mark.parametrize("target", ["torch", "inductor"])
def test_gradients_of_inputs_are_those_of_the_plain_layout(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, grads = Doubled().eval(), []
    small = QuantizeMatmul(bits=4, group_size=64, activations=None)
    for layout in ("int4pack", "plain"):
        monkeypatch.setattr(laid_out, "_layout", lambda *_, layout=layout: layout)
        x = torch.randn(2, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        made = graphopt.compile(model, example_inputs=(x.detach(),), passes=small, target=target)
        assert not any("torch target was kept" in note for note in made.report.notes)
        assert bool(made._laid) == (layout == "int4pack")
        made(x).sum().backward()
        grads.append(x.grad)
    assert (grads[0] - grads[1]).norm() < 0.02 * grads[1].norm()


@torch.no_grad()
def test_inductor_calls_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tied().eval()
    made = compiled(model, "int4pack", monkeypatch, target="inductor")
    assert not any("torch target was kept" in note for note in made.report.notes)
    wanted = compiled(model, "plain", monkeypatch)(IDS)
    assert (made(IDS) - wanted).norm() < 0.01 * wanted.norm()


NEAR: dict[str, tuple[int, int, dict[str, Any]]] = {
    "rows that fill no block": (96, 64, {}),
    "groups that the kernel has not": (64, 96, {"group_size": 48}),
    "other bits": (64, 64, {"bits": 3}),
    "activations in few bits": (64, 64, {"bits": 8, "group_size": None, "activations": "dynamic"}),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_the_kernel_cannot_read_stays_plain(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, inputs, fields = NEAR[name]
    monkeypatch.setattr(laid_out, "_layout", lambda *_: "int4pack")
    given = {"bits": 4, "group_size": 32, "activations": None, "head": True, **fields}
    small = QuantizeMatmul(**given)
    x = torch.randn(2, inputs)
    made = graphopt.compile(nn.Linear(inputs, outputs).eval(), example_inputs=(x,), passes=small)
    assert made.report.applied and not made._laid


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [64, 96, 576])
def test_codes_and_rows_are_found_again(width: int, symmetric: bool) -> None:
    scheme = Scheme(4, "int", 32, symmetric)
    weight = quantize(torch.randn(192, width), scheme)
    tensors = int4pack.prepare(weight)
    assert not torch.equal(tensors["codes"], weight.codes)
    assert torch.equal(int4pack.unpack(tensors["codes"]), weight.codes)
    indices = torch.tensor([[0, 191], [65, 31]])
    found = int4pack.rows(
        indices, tensors["codes"], weight.scales, weight.zeros, *int4pack.places(width)
    )
    assert torch.equal(found, weight.dequantize()[indices])
