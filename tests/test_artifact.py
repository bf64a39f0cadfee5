"""A saved module is called, refuses, and names its axes like the one in memory."""

from __future__ import annotations

import enum
import json
import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

import graphopt
from graphopt.artifact import SIDE_FILE
from graphopt.capture import capture
from graphopt.emit.exported import to_exported
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError, LoadError
from graphopt.loading.plain_values import Opaque, decoded, encoded

RECORD = f"extra/{SIDE_FILE}"
AXES = {0: "batch", 1: "seq"}


class Mode(enum.Enum):
    MEAN = 1
    LAST = 2


class Pool(nn.Module):
    """Defaults of every kind, an optional tensor, a keyword-only flag."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        scale: float = 2.0,
        sizes: tuple[int, ...] = (1, 2),
        *,
        dtype: torch.dtype = torch.float32,
        mode: Mode = Mode.MEAN,
        low: float = -math.inf,
    ) -> dict[str, Tensor]:
        hidden = self.layer(x) * scale
        hidden = hidden if mask is None else hidden * mask[..., None]
        return {"pooled": hidden.mean(1).clamp_min(low).to(dtype), "hidden": hidden}


class Pair(NamedTuple):
    """A named tuple that torch does not know."""

    first: Tensor
    second: Tensor


X, MASK = torch.randn(3, 5, 8), torch.ones(3, 5)


def compiled(*args: Any, **kwargs: Any) -> OptimizedModule:
    named = {**dict(zip(("x", "mask"), args, strict=False)), **kwargs}
    shapes = {name: AXES for name in ("x", "mask") if name in named}
    torch.manual_seed(3)
    return graphopt.compile(
        Pool().eval(),
        example_inputs=args,
        example_kwargs=kwargs,
        dynamic_shapes=shapes,
        measure=False,
    )


def through_a_file(module: OptimizedModule, folder: Path) -> OptimizedModule:
    return graphopt.load(graphopt.save(module, folder / "module.pt2"))


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
Y, LESS = torch.randn(2, 7, 8), torch.rand(2, 7)
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


def edited(source: Path, target: Path, edit: Callable[[str], str]) -> Path:
    """The archive with another ``graphopt.json``."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if member.filename.endswith(RECORD):
                data = edit(data.decode()).encode()
            new.writestr(member, data)
    return target


@pytest.fixture(scope="module")
def saved(pairs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphopt.save(pairs["by position"][0], tmp_path_factory.mktemp("clean") / "clean.pt2")


def change(*path: Any, to: Any) -> Callable[[str], str]:
    def edit(text: str) -> str:
        data = json.loads(text)
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        if to is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = to
        return json.dumps(data)

    return edit


def condition(text: str) -> Callable[[str], str]:
    def edit(file: str) -> str:
        symbol = json.loads(file)["axes"][0]["symbol"]
        entry = {"text": text.format(s=symbol), "where": None, "reason": None}
        return change("assumptions", to=[entry])(file)

    return edit


TAMPERED: dict[str, tuple[Callable[[str], str], str]] = {
    "not JSON": (lambda _t: "{", "not JSON"),
    "too deep": (lambda _t: "[" * 200_000, "not JSON"),
    "not a number": (change("axes", 0, "low", to=math.nan), "not JSON: the number NaN"),
    "not an object": (lambda _t: "[]", "expected an object"),
    "no format": (change("format", to=...), "format None"),
    "a newer format": (change("format", to=3), "format 3, this graphopt reads 1 to 2"),
    "no axes": (change("axes", to=...), "the field 'axes' is missing"),
    "no conditions": (change("assumptions", to=...), "the field 'assumptions' is missing"),
    "no call": (change("call", to=None), "the call is missing"),
    "names that are no list": (change("call", "positional", to="x"), "expected a list"),
    "a name that is no text": (change("call", "positional", to=["x", 1]), "expected str"),
    "a name that is code": (change("call", "positional", 1, to="a()"), "'a\\(\\)' is no argument"),
    "a name twice": (change("call", "positional", to=["x", "mask", "x"]), "positional twice"),
    "names swapped": (change("call", "positional", to=["mask", "x"]), "arguments by position are"),
    "a fixed input": (change("call", "fixed", to={"mask": 1}), "mask is fixed and an input"),
    "an unknown value": (change("call", "defaults", "scale", to={"is": "pickle"}), "no value of"),
    "no such dtype": (
        change("call", "defaults", "dtype", to={"is": "dtype", "value": "load"}),
        "no value of a call",
    ),
    "an unhashable key": (
        change("call", "defaults", "scale", to={"is": "dict", "items": [[[], 1]]}),
        "no value of a call",
    ),
    "training as text": (change("training", to="yes"), "expected bool"),
    "an unknown symbol": (change("axes", 0, "symbol", to="s99999"), "the axes are of"),
    "an axis left out": (change("axes", 0, to=...), "the axes are of"),
    "a wider range": (change("axes", 0, "low", to=-3), "but in the program"),
    "an empty range": (change("axes", 0, "high", to=0), "but in the program"),
    "a size that is no number": (change("axes", 0, "high", to=2.5), "expected int"),
    "an axis that is code": (change("axes", 0, "name", to="a b"), "no name of an axis"),
    "notes that are no list": (change("notes", to="a"), "expected a list"),
    "a return that is no tuple": (change("returns", to={"": "topk"}), "no type of this return"),
    "a return of no type": (change("returns", to={"0": "os"}), "has no place '0'"),
    "returns that are no texts": (change("returns", to={"": 3}), "expected str"),
    "versions that are no texts": (change("versions", to={"torch": 2}), "expected str"),
    "code": (condition("__import__('os').system('true')"), "not a condition on sizes"),
    "an attribute": (condition("{s}.__class__"), "not a condition on sizes"),
    "no expression": (condition("{s} >"), "not a condition on sizes"),
    "another symbol": (condition("other > 1"), "not a condition on sizes"),
    "endless": (condition("9**9**9**9 > {s}"), "an exponent that is no number"),
    "huge": (condition("9**999999999 > {s}"), "the exponent 999999999"),
    "long": (condition("{s} > " + "1 + " * 9000 + "1"), "far too long"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_file_that_was_changed_is_refused(saved: Path, tmp_path: Path, name: str) -> None:
    edit, words = TAMPERED[name]
    with pytest.raises(LoadError) as caught:
        graphopt.load(edited(saved, tmp_path / "changed.pt2", edit))
    assert re.search(words, str(caught.value)), str(caught.value)
    assert SIDE_FILE in str(caught.value.where)


def test_the_same_file_unchanged_loads(saved: Path, tmp_path: Path) -> None:
    assert graphopt.load(edited(saved, tmp_path / "same.pt2", lambda text: text)).report.verified


def first_format(text: str) -> str:
    data = json.loads(text)
    old = {key: data[key] for key in ("name", "training", "frozen", "report")}
    return json.dumps({"format": 1, **old})


def test_a_file_of_the_first_format_still_loads(saved: Path, tmp_path: Path) -> None:
    module = graphopt.load(edited(saved, tmp_path / "old.pt2", first_format))
    assert module.report.verified and module.program.name == "Pool"
    assert module.program.axis_names == {} and module.program.call.defaults == {}
    assert module(Y, LESS)["pooled"].shape == (2, 4)
    assert module(Y[:1], LESS[:1])["pooled"].shape == (1, 4)


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


class Returning(nn.Module):
    """Returns what ``function`` makes of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def returning(function: Callable[[Tensor], Any]) -> OptimizedModule:
    return graphopt.compile(
        Returning(function).eval(), example_inputs=(X[0],), measure=False, passes="none"
    )


RETURNS: dict[str, Callable[[Tensor], Any]] = {
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(-1),
    "svd": torch.linalg.svd,
    "old svd": torch.svd,
    "inside others": lambda x: {"plain": (x + 1, x * 2), "named": [x.max(0), x.min(1)]},
    "a tuple": lambda x: (x + 1, x * 2),
    "nothing": lambda x: (x + 1, None, ()),
}


@pytest.mark.parametrize("name", RETURNS)
def test_a_return_value_keeps_its_types(name: str, tmp_path: Path) -> None:
    module = returning(RETURNS[name])
    again = through_a_file(module, tmp_path)
    for loaded in (again, through_a_file(again, tmp_path)):
        expected, found = module(X[1]), loaded(X[1])
        torch.testing.assert_close(found, expected)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert pytree.tree_structure(module(X[1])) == pytree.tree_structure(RETURNS[name](X[1]))


def test_torch_alone_reads_a_named_return_as_a_tuple(tmp_path: Path) -> None:
    path = graphopt.save(returning(RETURNS["topk"]), tmp_path / "module.pt2")
    found = torch.export.load(path).module()(X[1])
    assert type(found) is tuple
    torch.testing.assert_close(found, tuple(X[1].topk(2)))


@pytest.mark.parametrize("returns", [{"": "sort"}, {"0": "sort"}, {"": "Tensor"}, {"1": "max"}])
def test_a_return_of_another_kind_is_refused(returns: dict[str, str], tmp_path: Path) -> None:
    path = graphopt.save(returning(lambda x: (x + 1, x, x * 2)), tmp_path / "module.pt2")
    with pytest.raises(LoadError, match=r"return value") as caught:
        graphopt.load(edited(path, tmp_path / "changed.pt2", change("returns", to=returns)))
    assert "returns" in str(caught.value.where)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda _x: (), "returns nothing"),
        (lambda _x: [], "returns nothing"),
        (lambda x: Pair(x + 1, x * 2), "Pair"),
    ],
)
def test_what_the_format_has_no_words_for_is_refused(
    function: Callable[[Tensor], Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(GraphoptError, match=words):
        graphopt.save(returning(function), tmp_path / "module.pt2")
    assert not list(tmp_path.iterdir())


def test_the_file_tells_the_versions_that_wrote_it(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(RECORD)]
        facts = json.loads(archive.read(name))
    assert facts["versions"] == {"graphopt": graphopt.__version__, "torch": str(torch.__version__)}
    assert facts["report"]["environment"]["graphopt"] == graphopt.__version__


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
