"""What a recipe may be, and what calibration, quality and budget refuse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import GraphoptError, RecipeError, VerificationError
from graphopt.optimize import _worst
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.canonicalize.identity import Call
from graphopt.presets import resolve
from graphopt.report.model import Certificate

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def compiled(**options: Any) -> Any:
    torch.manual_seed(1)
    options = {"passes": "none", **options}
    return graphopt.compile(nn.Linear(4, 4).eval(), example_inputs=(X,), measure=False, **options)


@pytest.mark.parametrize(
    "recipe",
    [Canonicalize(), [Canonicalize()], ["Canonicalize"], [{"Canonicalize": None}]],
)
def test_one_pass_in_every_spelling(recipe: Any) -> None:
    assert resolve(recipe) == [Canonicalize()]
    assert compiled(passes=recipe).report.verified


def _order(recipe: Any, *names: str) -> list[str]:
    return [step.name for step in resolve(recipe) if step.name in names]


def test_scales_of_norms_stay_where_they_are_until_weights_are_quantized() -> None:
    pair = ("FoldNormAffine", "QuantizeMatmul")
    behind = [*reversed(pair)]
    assert _order("balanced", *pair) == behind
    assert _order(["exact", "QuantizeMatmul"], *pair) == behind
    assert _order(["balanced", "QuantizeMatmul:skip=[a]"], *pair) == behind
    assert _order(["exact", "QuantizeMatmul:bits=4,activations=null"], *pair) == behind
    assert _order([*pair], *pair) == [*pair], "what is spelled out stays in its place"
    others = [step.name for step in resolve("exact") if step.name != "FoldNormAffine"]
    assert _order("balanced", *others) == others


@pytest.mark.parametrize(
    ("recipe", "hint"),
    [
        (None, "None was given"),
        (3, "3 was given"),
        ({"Canonicalize": {}}, "the passes are a list"),
        ([3], "cannot read 3 as a pass"),
        ([None], "cannot read None as a pass"),
        ([{"Canonicalize": 3}], "options are a mapping, but 3"),
        ([{"Canonicalize": 0}], "options are a mapping, but 0"),
        ([{"Canonicalize": ["x"]}], "options are a mapping"),
        ([{"Canonicalize": {1: 2}}], "no option 1"),
        (["Canonicalize:x=["], "cannot read the value '\\['"),
        (["Canonicalize:x=2020-99-99"], "cannot read the value"),
        (["Canonicalize:x"], "expected key=value"),
    ],
)
def test_what_is_no_recipe_is_refused(recipe: Any, hint: str) -> None:
    with pytest.raises(RecipeError, match=hint):
        compiled(passes=recipe)
    with pytest.raises(RecipeError, match=hint):
        graphopt.compile(nn.Linear(4, 4), passes=recipe)  # before the first call, too


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("passes: 3\n", "the passes are a list, but 3"),
        ("passes: 0\n", "the passes are a list, but 0"),
        ("passes: Canonicalize\n", "the passes are a list, but 'Canonicalize'"),
        ("passes:\n  Canonicalize: {}\n", "the passes are a list"),
        ("passes:\n  - Canonicalize: 3\n", "options are a mapping, but 3"),
        ("- Canonicalize\n", "with the key 'passes'"),
    ],
)
def test_a_recipe_file_names_itself(text: str, hint: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=hint) as refusal:
        resolve(path)
    assert refusal.value.where == str(path)


def test_an_empty_recipe_file_has_no_passes(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("passes:\n")
    assert resolve(path) == []


def test_calibration_that_fits_is_verified_on() -> None:
    spelled = [X + 1, (X + 2,), {"input": X + 3}]
    runs = [len(compiled(calibration=c).report.whole) for c in (None, spelled)]
    assert runs[1] - runs[0] == 3


@pytest.mark.parametrize(
    ("batches", "where", "hint"),
    [
        ([torch.randn(2, 4)], "calibration[0]", "axis 0 must be 3"),
        ([X, torch.randn(3, 5)], "calibration[1]", "axis 1 must be 4"),
        ([X[0]], "calibration[0]", "expected 2 axes"),
        ([X.double()], "calibration[0]", "float64"),
        ([(X, X)], "calibration[0]", "positional"),
        ([{"y": X}], "calibration[0]", "y"),
        ([None], "calibration[0]", "must be a tensor"),
        (X, "calibration", "a sequence of inputs, not Tensor"),
        ({"input": X}, "calibration", "a sequence of inputs, not dict"),
        (3, "calibration", "a sequence of inputs, not int"),
    ],
)
def test_calibration_that_does_not_fit_is_refused(batches: Any, where: str, hint: str) -> None:
    with pytest.raises(GraphoptError, match=hint) as refusal:
        compiled(calibration=batches)
    assert refusal.value.where == where


def test_calibration_that_the_model_fails_on_is_refused() -> None:
    ids = torch.tensor([[0, 1]])
    with pytest.raises(GraphoptError, match="IndexError") as refusal:
        graphopt.compile(
            nn.Embedding(4, 3).eval(), example_inputs=(ids,), calibration=[ids + 9], measure=False
        )
    assert refusal.value.where == "calibration[0]"


@pytest.mark.parametrize(
    "given", [None, "0.9", [0.9], torch.ones(2), math.nan, math.inf, 1j, torch.tensor(math.nan)]
)
def test_quality_must_be_a_finite_number(given: Any) -> None:
    with pytest.raises(GraphoptError, match="not a finite number") as refusal:
        compiled(quality=lambda _module: given)
    assert refusal.value.where == "quality"


@pytest.mark.parametrize("given", [1, 0.5, np.float32(0.5), torch.tensor(0.5), torch.ones(1)])
def test_quality_may_be_any_number(given: Any) -> None:
    notes = compiled(quality=lambda _module: given).report.notes
    assert any(n.startswith("quality") for n in notes)


def test_quality_that_falls_below_the_budget_is_refused() -> None:
    scores = iter([0.9, 0.7])
    with pytest.raises(VerificationError, match=r"fell from 0\.9 to 0\.7"):
        compiled(quality=lambda _module: next(scores), budget=0.1)


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"quality": 3}, "a function"), ({"budget": None}, "number"), ({"budget": math.nan}, "nan")],
)
def test_options_of_another_kind_are_refused(options: dict[str, Any], hint: str) -> None:
    with pytest.raises(GraphoptError, match=hint) as refusal:
        compiled(**options)
    assert refusal.value.where == next(iter(options))


@pytest.mark.parametrize("options", [{"calibration": [X]}, {"quality": lambda _module: 1.0}])
def test_what_needs_one_graph_is_refused_without_one(options: dict[str, Any]) -> None:
    with pytest.raises(GraphoptError, match="without example_inputs"):
        graphopt.compile(nn.Linear(4, 4), **options)


def _certificate(error: float, gradient: float | None, note: str) -> Certificate:
    bounds = {"bound": 1e-6, "gradient_bound": None if gradient is None else 1e-6}
    facts: dict[str, Any] = {"error": error, "max_error": error, "gradient_error": gradient}
    notes = (note,) if note else ()
    return Certificate(
        "whole", 1, "exact", (), None, "", original_error=0.0, notes=notes, **bounds, **facts
    )


@pytest.mark.parametrize(
    ("error", "gradient", "shown", "hidden"),
    [
        (0.0, 0.25, "gradients: error 0.25, allowed 1e-06", "outputs"),
        (0.25, 0.0, "outputs: error 0.25, allowed 1e-06", "gradients"),
        (math.inf, None, "outputs: error inf", "gradients"),
        (0.0, math.nan, "gradients: error nan", "outputs"),
        (1e-7, 1e-8, "outputs: error 1e-07, allowed 1e-06; gradients: error 1e-08", "see"),
    ],
)
def test_the_measure_that_failed_is_told(
    error: float, gradient: float | None, shown: str, hidden: str
) -> None:
    told = _worst([_certificate(0.0, 0.0, ""), _certificate(error, gradient, "above the bound")])
    assert shown in told and hidden not in told


@pytest.mark.parametrize(
    ("model", "example", "hint"),
    [
        (lambda x: x.to_sparse(), X, "returns a tensor of layout torch.sparse_coo"),
        (lambda x: x.to_dense(), X.to_sparse(), "sparse_coo"),
    ],
)
def test_sparse_tensors_at_the_border_are_refused(model: Any, example: Any, hint: str) -> None:
    with pytest.raises(GraphoptError, match=hint):
        graphopt.compile(Call(model).eval(), example_inputs=(example,), measure=False)


def test_sparse_tensors_inside_are_not_refused() -> None:
    model = Call(lambda x: torch.sparse.mm(torch.eye(3).to_sparse(), x)).eval()
    fast = graphopt.compile(model, example_inputs=(X,), measure=False)
    torch.testing.assert_close(fast(X), model(X))
