"""A saved module is called, refuses, and names its axes like the one in memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_modules import LESS, MASK, Mode, X, Y, compiled, through_a_file
from torch import Tensor, nn
from torch.export import Dim

import graphopt
from graphopt.capture import capture
from graphopt.emit.exported import to_exported
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError
from graphopt.loading.plain_values import Opaque, decoded, encoded


def answer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives: its outputs, or the words of its refusal."""
    try:
        return {k: v.detach() for k, v in module(*args, **kwargs).items()}
    except GraphoptError as error:
        return str(error)


EXAMPLES: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by position": ((X, MASK), {}),
    "by keyword": ((), {"x": X, "mask": MASK}),
    "without the optional": ((X,), {}),
    "with constants": ((X, MASK, 2.0, (1, 2)), {"low": -math.inf}),
}
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by position": ((Y, LESS), {}),
    "by keyword": ((), {"mask": LESS, "x": Y}),
    "mixed": ((Y,), {"mask": LESS}),
    "optional left out": ((Y,), {}),
    "optional given as nothing": ((Y, None), {}),
    "every default spelled": (
        (Y, LESS, 2.0, (1, 2)),
        {"dtype": torch.float32, "low": -math.inf},
    ),
    "another scale": ((Y, LESS, 3.0), {}),
    "another tuple": ((Y, LESS), {"sizes": [1, 2]}),
    "another dtype": ((Y, LESS), {"dtype": torch.float64}),
    "another enum": ((Y, LESS), {"mode": Mode.LAST}),
    "unknown": ((Y, LESS), {"extra": 1}),
    "twice": ((Y, LESS), {"x": Y}),
    "too many": ((Y, LESS, 2.0, (1, 2), 7), {}),
    "none": ((), {}),
    "static axis": ((Y[..., :7], LESS), {}),
    "unequal axes": ((Y, LESS[:1]), {}),
    "dtype of a tensor": ((Y.double(), LESS), {}),
    "one": ((Y[:1, :1], LESS[:1, :1]), {}),
}


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[OptimizedModule, OptimizedModule]]:
    found = {}
    for name, (args, kwargs) in EXAMPLES.items():
        module = compiled(*args, **kwargs)
        found[name] = module, through_a_file(module, tmp_path_factory.mktemp("saved"))
    return found


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("example", EXAMPLES)
def test_a_call_gives_or_refuses_the_same(pairs: Any, example: str, call: str) -> None:
    before, after = pairs[example]
    wanted, found = answer(before, *CALLS[call]), answer(after, *CALLS[call])
    if isinstance(wanted, str):
        assert found == wanted
    else:
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_both_answers_and_refusals_were_compared(pairs: Any) -> None:
    kinds = {type(answer(pairs["by position"][0], *call)) for call in CALLS.values()}
    assert kinds == {dict, str}


def test_everything_about_the_call_comes_back(pairs: Any) -> None:
    before, after = (module.program for module in pairs["by position"])
    assert after.call.positional == before.call.positional == ("x", "mask", "scale", "sizes")
    shown = str(after.call.defaults.pop("mode")), str(before.call.defaults["mode"])
    assert shown == ("<Mode.MEAN: 1>", "Mode.MEAN"), "no file holds a class: it is shown only"
    assert after.call.defaults == {k: v for k, v in before.call.defaults.items() if k != "mode"}
    assert after.axis_names == before.axis_names and len(after.axis_names) == 2
    assert after.range_constraints == before.range_constraints
    assert after.notes == before.notes and after.name == "Pool"


def test_fixed_flags_come_back(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(99, (2, 6))
    before = graphopt.compile(
        model,
        example_kwargs={"input_ids": ids, "output_hidden_states": True},
        dynamic_shapes={"input_ids": {0: "batch", 1: "seq"}},
        measure=False,
    )
    after = through_a_file(before, tmp_path)
    assert after.program.call.fixed == before.program.call.fixed
    assert after.program.call.fixed["output_hidden_states"] is True
    kept = {"output_hidden_states": True}
    for args, kwargs in (((ids,), kept), ((), {"input_ids": ids, **kept}), ((ids[:1],), kept)):
        wanted, found = before(*args, **kwargs), after(*args, **kwargs)
        assert type(found) is type(wanted) and len(found.hidden_states) == 2
        assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
    refusals = []
    for module in (before, after):
        with pytest.raises(GraphoptError, match="needs output_hidden_states=True"):
            module(ids)
        with pytest.raises(GraphoptError, match="captured with output_hidden_states=True") as e:
            module(ids, output_hidden_states=False)
        refusals.append(str(e.value))
    assert refusals[0] == refusals[1]

    path = str(tmp_path / "module.pt2")
    code = "import sys, graphopt; graphopt.load(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, path], check=True)  # nothing else is imported


class Picky(nn.Module):
    """Even batches only, and another answer where the sequence has one element."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2:
            return x
        return x * 3 if x.shape[1] == 1 else x * 2


def test_ranges_and_conditions_come_back(tmp_path: Path) -> None:
    before = graphopt.compile(
        Picky().eval(),
        example_inputs=(torch.randn(4, 5),),
        dynamic_shapes={"x": {0: Dim("batch", max=20), 1: "seq"}},
        measure=False,
    )
    after = through_a_file(before, tmp_path)
    again = through_a_file(after, tmp_path)
    assert before.program.assumptions == after.program.assumptions == again.program.assumptions
    for shape, words in (((3, 5), "% 2"), ((4, 1), "must be at least 2"), ((22, 5), "and 20")):
        for module in (before, after, again):
            with pytest.raises(GraphoptError, match=words):
                module(torch.randn(shape))
    x = torch.randn(2, 9)
    assert torch.equal(after(x), x * 2)


def test_a_declared_minimum_comes_back(tmp_path: Path) -> None:
    before = graphopt.compile(
        nn.Tanh().eval(),
        example_inputs=(torch.randn(4, 5),),
        dynamic_shapes=({0: Dim("batch", min=2)},),
        measure=False,
    )
    for module in (before, through_a_file(before, tmp_path)):
        with pytest.raises(GraphoptError, match="`batch` must be at least 2"):
            module(torch.randn(1, 5))


def test_axes_keep_their_names_in_onnx(pairs: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    graphopt.export_onnx(pairs["by position"][1], tmp_path / "pool.onnx")
    graph = onnx.load(tmp_path / "pool.onnx").graph
    dims = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert dims == {
        "x": ["batch", "seq", 8],
        "mask": ["batch", "seq"],
        "pooled": ["batch", 4],
        "hidden": ["batch", "seq", 4],
    }


VALUES = [
    *(None, True, 0, -7, 2.5, "text", math.inf, -math.inf, [1, [2]], (1, ("a", None)), {}),
    *({"a": (1,), 2: [None]}, {"is": "dtype"}, torch.bfloat16, torch.device("cpu")),
]


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_as_they_are(value: Any) -> None:
    back = decoded(json.loads(json.dumps(encoded(value), allow_nan=False)), "value")
    assert back == value and type(back) is type(value)


def test_values_that_no_file_holds_are_shown() -> None:
    assert math.isnan(decoded(encoded(math.nan), "value"))
    back = decoded(encoded(Mode.LAST), "value")
    assert isinstance(back, Opaque) and repr(back) == "<Mode.LAST: 2>" and back != Mode.LAST
    assert repr(decoded(encoded(torch.ones(3)), "value")) == "a tensor"


def test_a_plain_program_refuses_one_where_its_graph_fails(tmp_path: Path) -> None:
    class Second(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sin().select(0, 1)

    exported = torch.export.export(
        Second().eval(), (torch.randn(4, 3),), dynamic_shapes=({0: Dim.DYNAMIC},)
    )
    torch.export.save(exported, tmp_path / "plain.pt2")
    module = graphopt.load(tmp_path / "plain.pt2")
    assert module(torch.randn(2, 3)).shape == (3,)
    with pytest.raises(GraphoptError, match=r"at least 2; at 1 .* raises IndexError"):
        module(torch.randn(1, 3))


def test_every_folded_tensor_is_a_buffer_of_the_file() -> None:
    """Two folds of one name: the second is called ``weight_folded_1``."""
    program = capture(nn.Linear(8, 8).eval(), (X[0],))
    (layer,) = program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    weight = layer.args[1]
    for _ in range(2):
        program.add_state("weight_folded", torch.randn(8, 8), weight.meta["val"])
    last = next(n for n, t in program.state_nodes().items() if t == "weight_folded_1")
    layer.replace_input_with(weight, last)
    exported = to_exported(program.recompile())
    assert {"weight_folded", "weight_folded_1"} <= exported.state_dict.keys()
    assert not exported.constants
    torch.testing.assert_close(exported.module()(X[0]), program.run([X[0]])[0])
