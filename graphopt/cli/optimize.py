"""``graphopt optimize MODEL -o OUT``."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from graphopt.cli.calibration import calibration_of
from graphopt.cli.console import print_json, progress
from graphopt.cli.onnx_file import is_onnx, optimize_file, refuse_options
from graphopt.cli.options import json_option, model_options, recipe_options
from graphopt.cli.outputs import check_outputs, check_place, stem_of
from graphopt.cli.subject import load_subject, options_from
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError
from graphopt.files import atomic_path
from graphopt.recipe import TARGETS

WRITABLE = (".pt2", ".onnx", ".html", ".json", ".yaml")


@click.command("optimize")
@model_options
@recipe_options
@json_option
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Where to write; the ending decides what: .pt2 (module), .onnx, .html or .json (report), "
    ".yaml (recipe). May be repeated. Default: NAME.optimized.pt2, or .onnx for an ONNX file.",
)
@click.option("--target", type=click.Choice(TARGETS), default="torch", show_default=True)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    metavar="NAME",
    help="Execution provider for --target onnxruntime, such as cpu or cuda; may be repeated, in "
    "the order of preference.",
)
def command(
    model: str,
    inputs: str | None,
    arch: str | None,
    trust_pickle: bool,
    train: bool,
    dequantize: bool,
    recipe: str | None,
    passes: tuple[str, ...],
    strict: bool,
    measure: bool,
    calibration: str | None,
    as_json: bool,
    outputs: tuple[str, ...],
    target: str,
    providers: tuple[str, ...],
) -> None:
    """Rewrite MODEL, verify the result, write it and report.

    MODEL is a state dict (with --arch), TorchScript, a .pt2, or a Hugging Face folder. An ONNX file
    is rewritten as it is, and gives an ONNX file.
    """
    if is_onnx(model):
        meaningless = {"arch": arch, "trust_pickle": trust_pickle, "train": train}
        refuse_options(model, "optimize", **meaningless, dequantize=dequantize)
        refuse_options(model, "optimize", **{"target inductor": target == "inductor"})
        optimize_file(
            model,
            outputs,
            inputs=inputs,
            recipe=recipe,
            passes=passes,
            calibration=calibration,
            strict=strict,
            measure=measure,
            as_json=as_json,
        )
        return
    from graphopt.optimize import optimize_program

    with progress("optimize", quiet=as_json) as step:
        step("load")
        targets = _targets(outputs, model, train)
        check_outputs(targets, [model, inputs, recipe, calibration])
        options = options_from(recipe, passes, strict, measure)
        options = replace(options, target=target, providers=providers or None)
        _check_mode(target, train)
        subject = load_subject(model, inputs, arch, trust_pickle, train, dequantize)
        options = replace(options, calibration=calibration_of(calibration, subject))
        options = replace(options, progress=step)
        step("capture")
        program, eager = subject.capture()
        if any(path.suffix == ".onnx" for path in targets):
            from graphopt.emit.onnx import check_program

            check_program(program)
        module = optimize_program(program, options, eager=eager, original=subject.module)
        module.report.notes += [*subject.notes, *_before_target(targets, target)]
        _write_all(module, targets, measure, step)
    if as_json:
        facts = module.report.to_dict()
        print_json({"written": [str(p) for p in targets], "report": facts})
    else:
        module.report.print()
        for path in targets:
            click.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _targets(outputs: tuple[str, ...], model: str, train: bool) -> list[Path]:
    paths = [Path(o) for o in outputs] or [Path(f"{stem_of(model)}.optimized.pt2")]
    for path in paths:
        check_place(path, WRITABLE)
        if path.suffix == ".onnx":
            from graphopt.emit.onnx import check_target

            check_target(path, training=train)
    return paths


def _check_mode(target: str, train: bool) -> None:
    if target == "onnxruntime" and train:
        raise GraphoptError(
            "ONNX Runtime computes no gradients, and takes no model in training mode",
            where="--target",
            fix="leave --train out, or take --target inductor",
        )


def _before_target(targets: list[Path], target: str) -> list[str]:
    """Inductor's code and ONNX Runtime's sessions belong to this process; what files hold."""
    held = [p.name for p in targets if p.suffix in (".pt2", ".onnx")]
    if target == "torch" or not held:
        return []
    names, verb = " and ".join(held), "hold" if len(held) > 1 else "holds"
    if target == "inductor":
        return [
            f"{names} {verb} the rewritten graph as it is before Inductor, whose code is in no "
            "file: call torch.compile on the loaded module"
        ]
    return [
        f"{names} {verb} the whole rewritten graph: regions are made again by "
        "graphopt.load(path, target='onnxruntime')"
    ]


def _write_all(
    module: OptimizedModule, targets: list[Path], measure: bool, step: Callable[[str], None]
) -> None:
    """Write every file, then put them all in place; where one fails, none is."""
    with ExitStack() as stack:
        for path in sorted(targets, key=_is_report):  # reports tell about the rest
            step(f"write {path.name}")
            _write(module, stack.enter_context(atomic_path(path)), measure)


def _is_report(path: Path) -> bool:
    return path.suffix not in (".pt2", ".onnx")


def _write(module: OptimizedModule, path: Path, measure: bool) -> None:
    import yaml

    import graphopt

    if path.suffix == ".pt2":
        graphopt.save(module, path)
    elif path.suffix == ".onnx":
        found = graphopt.export_onnx(module, path, measure=measure)
        module.report.notes += [f"{path.name}: {note}" for note in found.notes]
    elif path.suffix == ".html":
        module.report.to_html(path)
    elif path.suffix == ".json":
        module.report.to_json(path)
    else:
        path.write_text(yaml.safe_dump({"passes": module.report.recipe}, sort_keys=False))
