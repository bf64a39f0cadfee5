"""Options of the Dynamo backend: each is honoured, or refused with what to do instead."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from graphopt.errors import RecipeError
from graphopt.presets import resolve
from graphopt.recipe import Options

_AHEAD_OF_TIME = {
    "dynamic_shapes": "; Dynamo keeps sizes dynamic that change between calls",
    "calibration": "; every graph is verified on the values of the call that compiled it",
    "quality": " and measure the compiled model yourself",
    "budget": " and measure the compiled model yourself",
}


def parsed(options: dict[str, Any]) -> Options:
    """``options`` of `torch.compile` as `Options`.

    Raises:
        RecipeError: there is no such option.
    """
    known = {f.name for f in fields(Options)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise RecipeError(
            f"unknown backend option {unknown[0]!r}",
            where="options of torch.compile",
            fix=f"valid options: {', '.join(sorted(known - _AHEAD_OF_TIME.keys()))}",
        )
    return Options(**options)


def check_options(options: Options, dynamic_shapes: Any = None) -> None:
    """Refuse what has no meaning where Dynamo captures graphs as the model is called.

    ONNX Runtime is given weights once and computes no gradients; to Dynamo weights are inputs like
    others, which may require grad in any call.

    Raises:
        RecipeError: names the option, and what to do instead.
    """
    resolve(options.passes)
    if options.target == "onnxruntime":
        raise RecipeError(
            "target 'onnxruntime' needs example_inputs: sessions are made of weights that stay as "
            "they are, and Dynamo's graphs take weights as inputs that may change and train",
            where="option target",
            fix="pass example_inputs to graphopt.compile, with the model in eval mode",
        )
    given = {f.name: getattr(options, f.name) != f.default for f in fields(Options)}
    given["dynamic_shapes"] = dynamic_shapes is not None
    for name, fix in _AHEAD_OF_TIME.items():
        if given[name]:
            raise RecipeError(
                f"{name} has no meaning without example_inputs: graphs are captured as the model "
                "is called",
                where=f"option {name}",
                fix=f"pass example_inputs to graphopt.compile, or leave {name} out{fix}",
            )
