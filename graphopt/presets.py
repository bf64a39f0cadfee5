"""Recipes by name, from files, or spelled out: all end as a list of passes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import RecipeError
from graphopt.rewrite.passes import Pass, make_pass, parse_pass, registered_passes

EXACT: tuple[str, ...] = (
    "Canonicalize",
    "EliminateCommonSubexpressions",
    "FoldConstants",
    "FoldBatchNorm",
    "RecognizeComposites",
    "FoldNormAffine",
    "PreRMSNorm",
    "MergeProjections",
    "Canonicalize",
    "EliminateCommonSubexpressions",
)

PRESETS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "exact": EXACT,
    "balanced": (*EXACT, "QuantizeMatmul:bits=8"),
    "small": (*EXACT, "ShareWeights", "QuantizeMatmul:bits=4,group_size=32"),
}

Recipe = str | Path | Sequence[Pass | str | Mapping[str, Any]]


def resolve(recipe: Recipe) -> list[Pass]:
    """Passes of a preset name, a YAML file, or a sequence of passes, strings or mappings.

    Raises:
        RecipeError: an unknown preset, pass or option, or a preset whose passes are not installed.
    """
    if isinstance(recipe, str) and recipe in PRESETS:
        return [_preset_pass(spelled, recipe) for spelled in PRESETS[recipe]]
    if isinstance(recipe, str | Path):
        return _from_file(recipe)
    return [_step(item, "passes") for item in recipe]


def _preset_pass(spelled: str, preset: str) -> Pass:
    name = spelled.partition(":")[0]
    if name not in registered_passes():
        raise RecipeError(
            f"preset {preset!r} needs the pass {name}, which is not part of this installation",
            fix="use preset 'exact', or install the package that provides the pass",
        )
    return parse_pass(spelled)


def _from_file(recipe: str | Path) -> list[Pass]:
    from graphopt.loading import check_keys, safe_yaml

    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise RecipeError(
            f"unknown recipe {str(recipe)!r}",
            fix=f"use one of {', '.join(PRESETS)}, or a YAML file",
        )
    data = safe_yaml(path)
    if not isinstance(data, Mapping):
        raise RecipeError("a recipe is a mapping with the key 'passes'", where=str(path))
    check_keys(data, ("passes", "name", "notes"), where=str(path))
    return [_step(item, str(path)) for item in data.get("passes") or ()]


def _step(item: Any, where: str) -> Pass:
    """``Canonicalize``, ``{Canonicalize: {option: value}}``, ``NAME:key=value`` or a `Pass`."""
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return parse_pass(item)
    if isinstance(item, Mapping) and len(item) == 1:
        name, options = next(iter(item.items()))
        return make_pass(str(name), options or {}, where)
    raise RecipeError(
        f"cannot read {item!r} as a pass", where=where, fix="write NAME: {key: value}"
    )


def to_recipe(passes: Sequence[Pass]) -> list[dict[str, Any]]:
    """The passes as a recipe file spells them."""
    return [{p.name: p.options()} for p in passes]
