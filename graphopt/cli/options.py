"""Options that several verbs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from graphopt.presets import available_presets

DEFAULT_RECIPE = "exact"

F = TypeVar("F", bound=Callable[..., Any])


def model_options(function: F) -> F:
    """MODEL and how to load and feed it."""
    return _all(
        function,
        click.argument("model", type=click.Path(exists=True)),
        click.option(
            "--inputs",
            metavar="SPEC|FILE",
            help="Example inputs: 'x:float32[batch,3,224,224]', or a .pt, .safetensors or .npz "
            "file. A Hugging Face folder needs none.",
        ),
        click.option(
            "--arch", metavar="MODULE:FACTORY", help="What builds the module of a state dict."
        ),
        click.option(
            "--trust-pickle", is_flag=True, help="Let a pickled module run the code it holds."
        ),
        click.option("--train", is_flag=True, help="Capture in training mode, with gradients."),
        click.option(
            "--dequantize",
            is_flag=True,
            help="Make floats of the quantized weights of a folder or GGUF file; so does --train.",
        ),
    )


def recipe_options(function: F) -> F:
    """Which passes run, and how strictly."""
    return _all(
        function,
        click.option(
            "--recipe",
            metavar="NAME|FILE",
            help=f"Preset ({', '.join(available_presets())}) or YAML file.  "
            f"[default: {DEFAULT_RECIPE}]",
        ),
        click.option(
            "--pass",
            "passes",
            multiple=True,
            metavar="NAME:KEY=VALUE,...",
            help="Run these passes instead of a recipe; may be repeated.",
        ),
        click.option("--strict", is_flag=True, help="Fail on the first rewrite that is wrong."),
        click.option(
            "--measure/--no-measure",
            default=True,
            help="Keep only rewrites that are not slower on this machine.",
        ),
        click.option(
            "--calibration",
            metavar="FILE",
            type=click.Path(exists=True),
            help="What passes calibrate on and the result is verified on: named tensors, batches "
            "of the example's size, or a .txt file for a Hugging Face folder.",
        ),
    )


def json_option(function: F) -> F:
    """``--json``: one JSON document on standard output, nothing else."""
    return _all(function, click.option("--json", "as_json", is_flag=True, help="Print JSON only."))


def _all(function: F, *decorators: Callable[[Any], Any]) -> F:
    for decorate in reversed(decorators):
        function = decorate(function)
    return function
