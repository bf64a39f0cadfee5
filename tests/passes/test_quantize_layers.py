"""Formats that differ between weights, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import RecipeError
from graphopt.passes import QuantizeMatmul
from graphopt.presets import resolve
from graphopt.report.model import Report
from graphopt.rewrite.passes import parse_pass

WIDTH = 32


class Gated(nn.Module):
    """Two products on one input, which are merged, and one behind them; a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(48, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 64, False), nn.Linear(WIDTH, 64, False)
        self.down = nn.Linear(64, WIDTH)
        self.head = nn.Linear(WIDTH, 48, False)
        self.head.weight = self.words.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.words(indices)
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


INPUTS = torch.arange(24).view(2, 12)


def gated(seed: int = 0) -> Gated:
    torch.manual_seed(seed)
    return Gated().eval()


def made(layers: Any, first: tuple[str, ...] = ("Canonicalize",), **options: Any) -> Any:
    calibration = [torch.randint(48, (2, 12), generator=torch.Generator().manual_seed(1))]
    return graphopt.compile(
        gated(),
        example_inputs=(INPUTS,),
        calibration=calibration if "method" in options else None,
        passes=[*first, QuantizeMatmul(activations=None, layers=layers, **options)],
        measure=False,
    )


def bits_of(fast: Any) -> dict[str, int | None]:
    """Bits of each weight by the modules that hold it, as its numbers are stored."""
    found: dict[str, int | None] = {}
    for name, tensor in fast.program.state.items():
        if name.endswith("_codes"):
            base = name.removesuffix("_codes")
            width = 64 if "down" in base else WIDTH
            found[base.removesuffix(".weight")] = 8 * tensor.shape[1] // width
        elif tensor.dim() == 2 and tensor.is_floating_point() and not name.endswith("_scales"):
            found[name.removesuffix(".weight")] = None
    return found


def test_formats_by_name_and_floats() -> None:
    layers = {"gate": {"bits": 8}, "down": "float", "*": {"bits": 2}, "up": {"bits": 6}}
    found = bits_of(made(layers, bits=4))
    assert (found["gate"], found["up"], found["down"]) == (8, 2, None)  # the first pattern decides


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq"},
        {"method": "hqq", "symmetric": False},
        {"method": "awq"},
        {"method": "rotate+gptq"},
        {"method": "learned", "steps": 2},
        {"method": "rtn+learned", "steps": 2},
        {"method": "outliers", "outliers": 1},
        {"method": "lowrank", "rank": 1},
    ],
    ids=lambda options: options["method"],
)
def test_every_method_has_them(options: dict[str, Any]) -> None:
    layers = {"gate": {"bits": 8}, "down": None}
    found = bits_of(made(layers, bits=4, tolerance=0.9, **options))
    floats = {n.split("_")[0].split(".")[0] for n, bits in found.items() if bits is None}
    codes = {n.split("_")[0].split(".")[0]: bits for n, bits in found.items() if bits}
    assert (codes["gate"], codes["up"]) == (8, 4)
    assert "down" in floats


def test_activations_and_groups_of_their_own() -> None:
    fast = graphopt.compile(
        gated(),
        example_inputs=(INPUTS,),
        passes=[
            "Canonicalize",
            QuantizeMatmul(
                bits=4,
                group_size=16,
                activations=None,
                layers={"gate": {"bits": 8, "group_size": None, "activations": "dynamic"}},
            ),
        ],
        measure=False,
    )
    target = torch.ops.graphopt.quantized_linear.default
    calls = {
        fast.program.target_of(n.args[1]): n.args[6:11]
        for n in fast.program.graph.find_nodes(op="call_function", target=target)
    }
    assert calls["gate.weight_codes"] == (8, "int", None, True, "dynamic")
    assert calls["down.weight_codes"] == (4, "int", 16, True, "none")


def test_rounding_errors_are_held_to_those_of_the_own_format() -> None:
    fast = made({"down": {"bits": 2}}, bits=8)
    bounds = sorted(a.certificate.bound for a in fast.report.applied if a.rule == "QuantizeLinear")
    assert bounds[-1] > 10 * bounds[0]


MERGED = ("exact",)


def test_merged_weights_go_by_the_names_they_had() -> None:
    fast = made({"up": {"bits": 8}}, MERGED, bits=4)
    assert {b for n, b in bits_of(fast).items() if "gate" in n or "up" in n} == {8}


@pytest.mark.parametrize(
    "layers", [{"up": {"bits": 8}, "gate": {"bits": 2}}, {"up": {"bits": 8}, "gate": None}]
)
def test_merged_weights_that_disagree_are_kept(layers: Any) -> None:
    fast = made(layers, MERGED, bits=4)
    reasons = [m.reason for m in fast.report.missed if m.option == "QuantizeMatmul:layers"]
    assert len(reasons) == 1
    assert "are one tensor here, and 'gate' and 'up' ask" in reasons[0]
    assert {b for n, b in bits_of(fast).items() if "gate" in n or "up" in n} == {None}


def test_merged_weights_that_agree_by_two_patterns() -> None:
    fast = made({"up": {"bits": 8}, "gate": {"bits": 8}}, MERGED, bits=4)
    assert not [m for m in fast.report.missed if m.option == "QuantizeMatmul:layers"]


def test_a_tied_head_is_asked_for_by_either_name() -> None:
    both = {"embeddings": True, "head": True}
    for name in ("head", "words.weight"):
        codes = [b for n, b in bits_of(made({name: {"bits": 8}}, bits=4, **both)).items() if b]
        assert sorted(codes) == [4, 4, 4, 8]
    fast = made({"head": {"bits": 8}, "words": {"bits": 2}}, bits=4, **both)
    assert "are one tensor here" in " ".join(m.reason for m in fast.report.missed)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        ({"up": {"bit": 8}}, "'up' has no field 'bit': did you mean 'bits'"),
        ({"up": {"bits": 5}}, "'up': int has 2, 3, 4, 6, 8 bits, not 5"),
        ({"up": {"bits": True}}, "'up': bits=True should be int"),
        ({"up": {"dtype": "nf4", "bits": 8}}, "'up': nf4 has 4 bits"),
        ({"up": {"bits": 8}, "down": {"dtype": "nf4", "bits": 8}}, "'down': nf4"),
        ({"up": {"activations": "some"}}, "'up': activations='some'"),
        ({"up": 8}, "'up' is given 8"),
        ({"up": {}}, "'up' is given {}"),
        ({3: {"bits": 8}}, "a pattern is the name of weights, not 3"),
        ([("up", 8)], "layers is a mapping"),
    ],
)
def test_what_does_not_go_together_names_the_pattern(layers: Any, told: str) -> None:
    with pytest.raises(ValueError, match=r"^layers") as caught:
        QuantizeMatmul(bits=4, activations=None, layers=layers)
    assert told in str(caught.value)


def test_formats_that_a_method_lacks() -> None:
    with pytest.raises(ValueError, match="'up': method hqq optimises zero points"):
        QuantizeMatmul(method="hqq", symmetric=False, layers={"up": {"symmetric": True}})


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(RecipeError, match=r"layers: no weight or module .* 'upp'") as caught:
        made({"upp": {"bits": 8}})
    assert "'up'" in str(caught.value)


def test_on_one_line_and_in_a_file(tmp_path: Path) -> None:
    text = "QuantizeMatmul:bits=4,layers={up: {bits: 8, group_size: 16}, 'a,b': float},head=true"
    spelled = parse_pass(text)
    assert spelled.layers == {"up": {"bits": 8, "group_size": 16}, "a,b": None}
    assert (spelled.bits, spelled.head) == (4, True)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump({"passes": [{spelled.name: spelled.options()}]}, sort_keys=False)
    )
    assert resolve(path) == [QuantizeMatmul(**spelled.options())]
    with pytest.raises(RecipeError, match="'up' has no field"):
        parse_pass("QuantizeMatmul:layers={up: {bot: 8}}")


def test_reports_keep_the_order_of_patterns() -> None:
    layers = {"up": {"bits": 8}, "*": {"bits": 2}, "down": {"bits": 6}}
    report = made(layers, bits=4).report
    again = Report.from_json(report.to_json())
    assert list(again.recipe[-1]["QuantizeMatmul"]["layers"]) == list(layers)
