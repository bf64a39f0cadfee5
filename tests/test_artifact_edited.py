"""A saved module whose ``graphopt.json`` was changed, or is of an older format."""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from saved_modules import LESS, MASK, RECORD, X, Y, change, compiled, edited

import graphopt
from graphopt.artifact import SIDE_FILE
from graphopt.errors import LoadError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphopt.save(compiled(X, MASK), tmp_path_factory.mktemp("clean") / "clean.pt2")


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


def test_the_file_tells_the_versions_that_wrote_it(saved: Path) -> None:
    with zipfile.ZipFile(saved) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(RECORD)]
        facts = json.loads(archive.read(name))
    assert facts["versions"] == {"graphopt": graphopt.__version__, "torch": str(torch.__version__)}
    assert facts["report"]["environment"]["graphopt"] == graphopt.__version__
