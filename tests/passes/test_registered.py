"""One list of passes, however they are reached."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import graphopt.passes
from graphopt.presets import EXACT
from graphopt.rewrite import Numeric
from graphopt.rewrite.passes import registered_passes

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
POINTS = PROJECT["project"]["entry-points"]["graphopt.passes"]


def test_the_package_exports_what_the_entry_points_name() -> None:
    assert sorted(POINTS) == sorted(graphopt.passes.__all__)
    for name, where in POINTS.items():
        found = EntryPoint(name, where, "graphopt.passes").load()
        assert getattr(graphopt.passes, name) is found
        assert registered_passes()[name] is found
    assert set(POINTS) <= set(dir(graphopt.passes))


def test_the_exact_preset_runs_every_pass_that_loses_nothing() -> None:
    rules = {name: kind().rules() for name, kind in registered_passes().items()}
    lossy = {name for name, of in rules.items() if any(r.numeric is Numeric.LOSSY for r in of)}
    assert lossy == {"QuantizeMatmul", "RoundAttention"}
    assert set(EXACT) == set(POINTS) - lossy


def test_an_unknown_pass_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="NoSuchPass"):
        _ = graphopt.passes.NoSuchPass
