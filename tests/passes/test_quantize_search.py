"""Bits chosen for each weight: budgets that are kept, choices that pay, recipes that repeat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import GraphoptError, RecipeError
from graphopt.passes import QuantizeMatmul
from graphopt.passes.quantize.budget import bytes_of
from graphopt.rewrite.passes import parse_pass

WIDTH, SCALES = 32, (4.0, 1.0, 0.1, 0.01)
BITS = (2, 3, 4, 8)


class Uneven(nn.Module):
    """A sum of branches, of which the first counts four hundred times what the last does."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in SCALES)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return sum(s * torch.tanh(b(x)) for s, b in zip(SCALES, self.branches, strict=True))


def uneven() -> Uneven:
    torch.manual_seed(0)
    return Uneven().eval()


def batches(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, WIDTH, generator=generator) for _ in range(count)]


def made(model: nn.Module | None = None, compiled: Any = None, **options: Any) -> Any:
    return graphopt.compile(
        model or uneven(),
        example_inputs=(batches(1, 0)[0],),
        calibration=batches(4, 1),
        passes=["Canonicalize", QuantizeMatmul(activations=None, **options)],
        measure=False,
        **(compiled or {}),
    )


def error(fast: Any) -> float:
    """On inputs that nothing was chosen by."""
    with torch.no_grad():
        return float(sum((fast(x) - uneven()(x)).square().sum() for x in batches(8, 9)))


def stored(fast: nn.Module) -> int:
    tensors = {id(t): t for t in (*fast.parameters(), *fast.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def bits_of(fast: Any) -> dict[str, int]:
    layers = fast.report.recipe[-1]["QuantizeMatmul"]["layers"]
    return {name.split(".")[1]: fields["bits"] for name, fields in layers.items()}


@pytest.mark.parametrize("sensitivity", ["output", "hessian"])
def test_mixed_bits_are_nearer_than_equal_ones_of_the_same_size(sensitivity: str) -> None:
    equal = made(bits=4)
    mixed = made(bits=BITS, size=stored(equal), sensitivity=sensitivity)
    assert stored(mixed) <= stored(equal)
    assert error(mixed) < 0.2 * error(equal)
    found = bits_of(mixed)
    assert found["0"] == 8
    assert found["3"] == 2
    assert found["1"] >= found["2"]


@pytest.mark.parametrize("size", [4000, "25%"])
def test_a_size_is_kept_as_it_is_stored(size: int | str) -> None:
    fast = made(bits=BITS, size=size)
    most = bytes_of(size, stored(uneven()))
    assert stored(fast) <= most
    assert stored(fast) > 0.85 * most
    chosen = [t for t in fast.report.trades if t.chosen]
    assert [t.bytes for t in chosen] == [stored(fast)]


def test_a_size_of_exactly_what_is_there_and_one_byte_less() -> None:
    smallest = stored(made(bits=2))
    assert set(bits_of(made(bits=BITS, size=smallest)).values()) == {2}
    with pytest.raises(RecipeError, match=f"smallest .* are {smallest} bytes; size allows"):
        made(bits=BITS, size=smallest - 1)


def test_rewrites_that_are_taken_back_do_not_break_a_size() -> None:
    """Two bits are too coarse for this tolerance: other bits are chosen, and the size is kept."""
    size = stored(made(bits=4))
    fast = made(bits=BITS, size=size, tolerance=0.2)
    assert stored(fast) <= size
    assert 2 not in bits_of(fast).values()
    assert not [m for m in fast.report.missed if m.pass_name == "QuantizeMatmul"]


def test_a_size_that_tolerance_does_not_let_be_reached() -> None:
    with pytest.raises(RecipeError, match="smallest that these bits allow"):
        made(bits=(2, 3), size=stored(made(bits=3)), tolerance=0.01)


@pytest.mark.parametrize("method", ["rtn", "awq+gptq", "rtn+learned", "outliers", "hqq"])
def test_the_recipe_repeats_it_bit_by_bit(method: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": method}
    if "learned" in method:
        options["steps"] = 2
    if method == "hqq":
        options["symmetric"] = False
    if method == "outliers":
        options["outliers"] = 1
    fast = made(bits=BITS, size="30%", **options)
    assert stored(fast) <= 0.3 * stored(uneven())
    path = tmp_path / "found.yaml"
    path.write_text(yaml.safe_dump({"passes": fast.report.recipe}, sort_keys=False))
    again = graphopt.compile(
        uneven(),
        example_inputs=(batches(1, 0)[0],),
        calibration=batches(4, 1),
        passes=path,
        measure=False,
    )
    assert again.report.trades == []
    assert again.report.recipe == fast.report.recipe
    states = fast.state_dict(), again.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def test_quality_decides_where_no_size_is_given() -> None:
    asked: list[float] = []

    def quality(module: nn.Module) -> float:
        asked.append(-error(module))
        return asked[-1]

    budget = 2 * error(made(bits=4))
    fast = made(bits=BITS, compiled={"quality": quality, "budget": budget})
    assert error(fast) <= budget
    assert stored(fast) < stored(made(bits=4))
    (chosen,) = (t for t in fast.report.trades if t.chosen)
    assert chosen.quality == -error(fast)
    smaller = [t for t in fast.report.trades if t.quality is not None and t.bytes < chosen.bytes]
    assert smaller
    assert all(t.quality < -budget for t in smaller)
    assert len(asked) <= 8 + 2
    assert fast.report.verified


def test_quality_out_of_reach() -> None:
    with pytest.raises(RecipeError, match="with the most bits for every weight; the budget"):
        made(bits=(2, 3), compiled={"quality": lambda m: -error(m), "budget": 1e-6})


def test_latency_of_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times as if bits cost time: eight bits for the weight that counts most."""
    monkeypatch.setattr(
        "graphopt.passes.quantize.search.nanoseconds",
        lambda products, settings: 1000 * settings.scheme.bits * len(products),
    )
    assert bits_of(made(bits=(2, 8), latency=0.014)) == {"0": 8, "1": 2, "2": 2, "3": 2}
    assert set(bits_of(made(bits=(2, 8), latency=0.032)).values()) == {8}
    with pytest.raises(RecipeError, match=r"takes 0\.008 ms; latency allows 0\.007"):
        made(bits=(2, 8), latency=0.007)


def test_latency_is_measured() -> None:
    assert set(bits_of(made(bits=(4, 8), latency=1e4)).values()) == {8}
    with pytest.raises(RecipeError, match="fastest that these bits allow"):
        made(bits=(4, 8), latency=1e-6)


def test_trades_are_a_frontier_from_the_smallest_to_the_nearest() -> None:
    fast = made(bits=BITS, size="30%")
    rows = [t for t in fast.report.trades if not t.chosen]
    assert [t.bytes for t in rows] == sorted(t.bytes for t in rows)
    assert [t.loss for t in rows] == sorted((t.loss for t in rows), reverse=True)
    assert rows[0].bytes == stored(made(bits=2))
    assert rows[-1].bytes == stored(made(bits=8))


def test_weights_with_formats_of_their_own_are_not_searched() -> None:
    layers = {"branches.0": {"bits": 3}, "branches.1": None, "branches.2": {"group_size": 16}}
    fast = made(bits=(2, 4), size="60%", layers=layers)
    found = fast.report.recipe[-1]["QuantizeMatmul"]["layers"]
    assert found["branches.0.weight"] == {"bits": 3}
    assert found["branches.1"] is None
    assert found["branches.2.weight"] == {"bits": 4, "group_size": 16}


class Tied(nn.Module):
    """Weights that are merged, a table with a tied head, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.gate, self.up = nn.Linear(WIDTH, 64, False), nn.Linear(WIDTH, 64, False)
        self.down = nn.Linear(64, WIDTH, False)
        self.head = nn.Linear(WIDTH, 40, False)
        self.head.weight = self.words.weight

    def forward(self, indices: Tensor) -> dict[str, Tensor]:
        x = self.words(indices)
        x = x + self.conv(x.mT).mT
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return {"logits": self.head(x)}


def test_merged_and_tied_weights_and_convolutions_have_one_choice_each() -> None:
    torch.manual_seed(0)
    model, indices = Tied().eval(), torch.arange(24).view(2, 12)
    fast = graphopt.compile(
        model,
        example_inputs=(indices,),
        calibration=[indices, indices.flip(0)],
        passes=[
            "exact",
            QuantizeMatmul(
                bits=BITS, size="22%", activations=None, embeddings=True, head=True, tolerance=0.9
            ),
        ],
        measure=False,
    )
    assert stored(fast) <= 0.22 * stored(model)
    (step,) = (step for step in fast.report.recipe if "QuantizeMatmul" in step)
    layers = step["QuantizeMatmul"]["layers"]
    assert set(layers) == {
        *("words.weight", "head.weight", "conv.weight", "gate.weight", "up.weight", "down.weight")
    }
    assert layers["gate.weight"] == layers["up.weight"]
    assert layers["words.weight"] == layers["head.weight"]
    assert len({fields["bits"] for fields in layers.values()}) > 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": (4, 5)}, "int has 2, 3, 4, 6, 8 bits, not 5"),
        ({"bits": (4, 4)}, "has a number twice"),
        ({"bits": ()}, "several to choose from"),
        ({"bits": (4, 8), "dtype": "nf4"}, "nf4 has 4 bits"),
        ({"bits": (4, 8), "size": "40"}, "size is bytes, or such as"),
        ({"bits": (4, 8), "size": 0}, "size is bytes, or such as"),
        ({"bits": (4, 8), "size": "0%"}, "size is bytes, or such as"),
        ({"bits": (4, 8), "size": True}, "size is bytes, or such as"),
        ({"bits": (4, 8), "latency": 0.0}, "latency is a positive number"),
        ({"bits": (4, 8), "latency": 1.0, "size": 9}, "one budget: size or latency"),
        ({"bits": (4, 8), "sensitivity": "fisher"}, "is not one of output, hessian"),
        ({"bits": 4, "size": "40%"}, "size is for a search"),
        ({"bits": 4, "latency": 1.0}, "latency is for a search"),
        ({"bits": 4, "sensitivity": "hessian"}, "sensitivity is for a search"),
        ({"bits": (2, 8), "method": "hqq"}, "give symmetric=False"),
        ({"bits": (2, 8), "layers": {"a": {"dtype": "nf4"}}}, "'a': nf4 has 4 bits, not 2"),
        ({"bits": 4.0}, "bits is a number, or several"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match="") as caught:
        QuantizeMatmul(activations=None, **options)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("size", "found"),
    [(7, 7), ("85MB", 85_000_000), ("1.5 KiB", 1536), ("40%", 400), ("33.3 %", 333), ("2gb", 2e9)],
)
def test_sizes(size: int | str, found: int) -> None:
    assert bytes_of(size, 1000) == found


def test_a_search_without_budget_or_inputs() -> None:
    with pytest.raises(RecipeError, match="a search for bits needs a budget"):
        made(bits=BITS)
    with pytest.raises(RecipeError, match="looks at calibration inputs; there are none"):
        graphopt.compile(
            uneven(),
            example_inputs=(batches(1, 0)[0],),
            passes=[QuantizeMatmul(bits=BITS, size="40%")],
        )
    with pytest.raises(RecipeError, match="the model trains"):
        made(uneven().train(), bits=BITS, size="40%")
    with pytest.raises(GraphoptError, match="NaN"):
        graphopt.compile(
            uneven(),
            example_inputs=(batches(1, 0)[0],),
            calibration=[torch.full((16, WIDTH), torch.nan)],
            passes=[QuantizeMatmul(bits=BITS, size="40%")],
        )


def test_on_one_line() -> None:
    spelled = parse_pass("QuantizeMatmul:bits=[2,4,8],size=40%,activations=null")
    assert spelled == QuantizeMatmul(bits=(2, 4, 8), size="40%", activations=None)
    assert parse_pass("QuantizeMatmul:bits=[8,4],size=1000").size == 1000


def test_searching_leaves_random_numbers_alone() -> None:
    torch.manual_seed(3)
    wanted = torch.rand(3)
    model = uneven()
    torch.manual_seed(3)
    made(model, bits=BITS, size="40%")
    assert torch.equal(torch.rand(3), wanted)


def test_the_report_has_each_weight_once_however_many_sets_were_tried() -> None:
    reference, x = uneven(), batches(1, 5)[0]
    wanted = reference(x).detach()

    def quality(module: nn.Module) -> float:
        with torch.no_grad():
            return -float((module(x) - wanted).norm() / wanted.norm())

    fast = made(bits=BITS, compiled={"quality": quality, "budget": 0.05})
    assert sum(trade.quality is not None for trade in fast.report.trades) > 2
    names = [layer.names for layer in fast.report.quantization.layers]
    assert sorted(names) == [(f"branches.{i}.weight",) for i in range(len(SCALES))]
    chosen = {layer.names[0].split(".")[1]: layer.bits for layer in fast.report.quantization.layers}
    assert chosen == bits_of(fast)
