"""Recipes by name, from files, or spelled out: all end as a list of passes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
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
    "FuseLossHead",
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

Step = Pass | str | Mapping[str, Any]
Recipe = str | Path | Pass | Sequence[Step]


def available_presets() -> list[str]:
    """The presets whose passes are all installed."""
    known = registered_passes()
    return [
        preset
        for preset, steps in PRESETS.items()
        if all(spelled.partition(":")[0] in known for spelled in steps)
    ]


def resolve(recipe: Recipe) -> list[Pass]:
    """Passes of a preset name, a YAML file, one pass, or a sequence of passes, strings or mappings.

    ``["exact", "FuseLossHead:lazy_logits=true"]`` is the preset with other options for one pass;
    ``["balanced", "QuantizeMatmul:skip=[lm_head,'*.gate']"]`` leaves some weights in float.

    Raises:
        RecipeError: an unknown preset, pass or option, a preset whose passes are not installed, or
            something that is no recipe at all.
    """
    if isinstance(recipe, str) and recipe in PRESETS:
        steps = [_preset_pass(spelled, recipe) for spelled in PRESETS[recipe]]
        return _deferred(steps, {step.name for step in steps})
    if isinstance(recipe, str | Path):
        return _from_file(recipe)
    if isinstance(recipe, Pass):
        return [recipe]
    return _steps(recipe, "passes")


def _preset_pass(spelled: str, preset: str) -> Pass:
    name = spelled.partition(":")[0]
    if name not in registered_passes():
        raise RecipeError(
            f"preset {preset!r} is not available in this version: it needs the pass {name}",
            where=f"recipe {preset!r}",
            fix=f"use one of {', '.join(available_presets())}, or a YAML file",
        )
    return parse_pass(spelled)


def _from_file(recipe: str | Path) -> list[Pass]:
    return _steps(recipe_items(recipe), str(recipe))


def recipe_items(recipe: str | Path) -> Any:
    """What a recipe file lists as its passes; nothing where it has none.

    Raises:
        RecipeError: there is no such file or preset, or it is not a mapping with that key.
    """
    from graphopt.loading import check_keys, safe_yaml

    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise RecipeError(
            f"unknown recipe {str(recipe)!r}",
            fix=f"use one of {', '.join(available_presets())}, or a YAML file",
        )
    data = safe_yaml(path)
    if not isinstance(data, Mapping):
        raise RecipeError("a recipe is a mapping with the key 'passes'", where=str(path))
    check_keys(data, ("passes", "name", "notes"), where=str(path))
    given = data.get("passes")
    return [] if given is None else given


def _steps(items: Any, where: str) -> list[Pass]:
    """Presets in a list stand for their passes, and a pass behind one replaces that of its kind."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        presets = ", ".join(available_presets())
        raise RecipeError(
            f"the passes are a list, but {items!r:.80} was given",
            where=where,
            fix=f"write a list of passes, or one of {presets} in place of a list",
        )
    steps: list[Pass] = []
    preset: set[str] = set()
    for item in items:
        if isinstance(item, str) and item in PRESETS:
            steps += resolve(item)
            preset.update(step.name for step in resolve(item))
            continue
        step = _step(item, where)
        if step.name in preset:
            steps = [step if old.name == step.name else old for old in steps]
        else:
            steps.append(step)
    return _deferred(steps, preset)


def _deferred(steps: Sequence[Pass], preset: Collection[str]) -> list[Pass]:
    """Passes of a preset stand behind the last one that defers them; those spelled out stay."""

    def place(index: int) -> tuple[int, int]:
        name = steps[index].name
        later = [i for i in range(index, len(steps)) if name in steps[i].defers()]
        return (later[-1], 1) if later and name in preset else (index, 0)

    return [steps[index] for index in sorted(range(len(steps)), key=place)]


def _step(item: Any, where: str) -> Pass:
    """``Canonicalize``, ``{Canonicalize: {option: value}}``, ``NAME:key=value`` or a `Pass`."""
    if isinstance(item, Pass):
        return item
    if isinstance(item, str):
        return parse_pass(item)
    if isinstance(item, Mapping) and len(item) == 1:
        name, options = next(iter(item.items()))
        return make_pass(str(name), options, where)
    raise RecipeError(
        f"cannot read {item!r:.80} as a pass", where=where, fix="write NAME: {key: value}"
    )


def to_recipe(passes: Sequence[Pass]) -> list[dict[str, Any]]:
    """The passes as a recipe file spells them."""
    return [{p.name: p.options()} for p in passes]
