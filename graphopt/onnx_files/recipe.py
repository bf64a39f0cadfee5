"""Recipes on ONNX files: the same presets, files and spellings, with the passes that fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import RecipeError
from graphopt.onnx_files.attention import FuseAttention
from graphopt.onnx_files.fold import FoldConstants
from graphopt.onnx_files.fuse import FuseOperators, SplitNormsOfSums
from graphopt.onnx_files.merge import MergeInitializers
from graphopt.onnx_files.quantize import OnnxQuantizeMatmul, onnx_quantize
from graphopt.onnx_files.repeated import EliminateCommonSubexpressions
from graphopt.onnx_files.steps import OnnxPass
from graphopt.onnx_files.unused import RemoveIdentities, RemoveUnused
from graphopt.passes.quantize import QuantizeMatmul
from graphopt.presets import PRESETS, available_presets, recipe_items, resolve
from graphopt.rewrite.passes import parse_pass

OWN: Mapping[str, type[OnnxPass]] = {
    kind.__name__: kind
    for kind in (
        *(RemoveUnused, RemoveIdentities, FoldConstants, EliminateCommonSubexpressions),
        *(MergeInitializers, FuseAttention, FuseOperators, SplitNormsOfSums),
    )
}
"""Passes that rewrite ONNX files; each is without options."""

EXACT = (
    *("RemoveUnused", "RemoveIdentities", "FoldConstants", "EliminateCommonSubexpressions"),
    *("MergeInitializers", "FuseAttention", "FuseOperators", "SplitNormsOfSums"),
    *("MergeInitializers", "RemoveUnused"),
)
"""Preset ``exact``."""

Recipe = str | Path | Sequence[str | Mapping[str, Any]]


def resolve_onnx(recipe: Recipe) -> list[OnnxPass]:
    """Passes of a preset name, a YAML file, or a sequence of passes as strings or mappings.

    Raises:
        RecipeError: an unknown preset, pass or option, or a pass that is not for ONNX files.
    """
    if isinstance(recipe, str) and recipe in PRESETS:
        return _preset(recipe)
    if isinstance(recipe, str | Path):
        return _from_file(Path(recipe))
    if isinstance(recipe, Mapping) or not isinstance(recipe, Iterable):
        raise RecipeError(
            f"the passes are a list, but {recipe!r:.80} was given",
            where="passes",
            fix="write a list of passes, or the name of a preset",
        )
    return _steps(recipe, "passes")


def _preset(name: str) -> list[OnnxPass]:
    if name not in available_presets():
        resolve(name)  # says which pass it needs
    given = [text for text in PRESETS[name] if text.partition(":")[0] not in PRESETS["exact"]]
    exact = [OWN[step]() for step in EXACT] if PRESETS[name] else []
    return _ordered([*exact, *(_step(text, f"recipe {name!r}") for text in given)])


def _from_file(path: Path) -> list[OnnxPass]:
    return _steps(recipe_items(path), str(path))


def _steps(items: Iterable[Any], where: str) -> list[OnnxPass]:
    """Presets in a list stand for their passes, and a pass behind one replaces that of its kind."""
    steps: list[OnnxPass] = []
    preset: set[str] = set()
    for item in items:
        if isinstance(item, str) and item in PRESETS:
            steps += _preset(item)
            preset.update(step.name for step in steps)
            continue
        step = _step(item, where)
        if step.name in preset:
            steps = [step if old.name == step.name else old for old in steps]
        else:
            steps.append(step)
    return _ordered(steps)


def _ordered(steps: list[OnnxPass]) -> list[OnnxPass]:
    """Weights are quantized before operators are fused: fused ones hold weights of their own."""
    first = next((i for i, s in enumerate(steps) if isinstance(s, FuseOperators)), len(steps))
    late = [s for s in steps[first:] if isinstance(s, OnnxQuantizeMatmul)]
    rest = [s for s in steps[first:] if not isinstance(s, OnnxQuantizeMatmul)]
    return [*steps[:first], *late, *rest]


def _step(item: Any, where: str) -> OnnxPass:
    name, options = _spelled(item, where)
    if name in OWN:
        if options:
            raise RecipeError(
                f"{name} has no options on an ONNX file, and {options!r:.60} was given",
                where=where,
                fix=f"write {name}",
            )
        return OWN[name]()
    made = parse_pass(item) if isinstance(item, str) else resolve([item])[0]
    if isinstance(made, QuantizeMatmul):
        return onnx_quantize(made, where)
    raise RecipeError(
        f"{made.name} rewrites models that are captured from PyTorch, not ONNX files",
        where=where,
        fix=f"take {', '.join(OWN)} or QuantizeMatmul; or optimize the model that the file was "
        "exported from",
    )


def _spelled(item: Any, where: str) -> tuple[str, Any]:
    """The name of a pass, and its options: a text, or a mapping."""
    if isinstance(item, str):
        name, _, rest = item.partition(":")
        return name.strip(), rest.strip()
    if isinstance(item, Mapping) and len(item) == 1:
        name, options = next(iter(item.items()))
        return str(name), options
    raise RecipeError(
        f"cannot read {item!r:.80} as a pass of an ONNX file", where=where, fix="write NAME"
    )


def to_recipe(passes: Sequence[OnnxPass]) -> list[dict[str, Any]]:
    """The passes as a recipe file spells them."""
    return [{step.name: dict(step.options())} for step in passes]
