"""An ONNX model from a program: torch's translation, the model's own names, runtime fusions."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from graphopt.emit import onnx_norms, onnx_rotary, onnx_sums
from graphopt.emit.exported import to_exported
from graphopt.emit.onnx_quantized import translations
from graphopt.errors import ExportError
from graphopt.program import Program
from graphopt.signature import InputKind, OutputKind
from graphopt.source import source_line

aten = torch.ops.aten
_HIDDEN = "graphopt.hidden"


def input_names(program: Program) -> tuple[str, ...]:
    """Names of tensor inputs; constants that were captured are part of the file."""
    return tuple(
        n.name
        for n, v in zip(program.user_inputs(), program.example_inputs, strict=True)
        if isinstance(v, Tensor)
    )


def output_names(program: Program) -> tuple[str, ...]:
    """Names from the structure of the return value: fields and keys, else ``output``."""
    values = program.user_outputs()
    if program.call is None:
        return tuple(f"output_{i}" for i in range(len(values)))
    leaves = [torch.empty(0) for _ in values]  # caches take anything else for their own
    tree = pytree.tree_unflatten(leaves, program.call.out_spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    named = [_spell(path) or "output" for path in paths]
    taken = set(input_names(program))
    return tuple(f"{n}_out" if n in taken else n for n in named)


def _spell(path: Sequence[Any]) -> str:
    parts = [getattr(p, "key", getattr(p, "name", getattr(p, "idx", ""))) for p in path]
    text = "_".join(str(p) for p in parts)
    return f"output_{text}" if text[:1].isdigit() else text


def translate(
    program: Program,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    opset: int | None,
    standard: bool = False,
) -> Any:
    """The program as a `torch.onnx.ONNXProgram`.

    Args:
        standard: of operators of the ONNX standard alone.
    """
    if not standard or (opset or 0) >= onnx_norms.STANDARD_FROM:
        program = onnx_norms.with_norms(program)
    if not standard:
        program = onnx_rotary.with_rotary(program)
    mutated = sum(o.kind is not OutputKind.USER for o in program.outputs)
    named = [f"updated_{i}" for i in range(mutated)] + list(outputs)
    exported: Any = to_exported(_without_layouts(program))
    # conditions by the names of the captured inputs; a program of one region has others
    exported._guards_code = []
    try:
        with quiet():
            made: Any = torch.onnx.export(
                exported,
                dynamo=True,
                input_names=list(inputs) if _all_tensors(program) else None,
                output_names=named if _all_tensors(program) else None,
                opset_version=opset,
                custom_translation_table={
                    **translations(),
                    **onnx_norms.translations(standard=standard),
                    **onnx_rotary.translations(),
                },
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise _untranslated(error, program) from error
    return made


def _without_layouts(program: Program) -> Program:
    """The program with ``contiguous`` as a copy; the exporter drops it, and loses the name.

    Transposed values are copied before a reshape. The exporter makes views of reshapes by the
    layout that attention has in torch, and then puts matrix products in its place, which have
    another.
    """
    twin = program.copy()
    for node in twin.graph.find_nodes(op="call_function", target=aten.contiguous.default):
        node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}
    for target in (aten.reshape.default, aten.view.default):
        for node in twin.graph.find_nodes(op="call_function", target=target):
            if node.args[0].target in (aten.transpose.int, aten.permute.default):
                _copy_before(node)
    return twin.recompile()


def _copy_before(node: fx.Node) -> None:
    source: Any = node.args[0]
    form = {"memory_format": torch.contiguous_format}
    with node.graph.inserting_before(node):
        copied = node.graph.call_function(aten.clone.default, (source,), form)
    copied.meta = {**source.meta, "val": source.meta["val"].clone(**form)}
    node.replace_input_with(source, copied)


def _all_tensors(program: Program) -> bool:
    kinds = (e.kind for e in program.inputs.values())
    return all(isinstance(v, Tensor) for v in program.example_inputs) and InputKind.USER in kinds


def _untranslated(error: Exception, program: Program) -> ExportError:
    text = str(error.__cause__ or error)
    found = re.search(r"'(?:<OpOverload\(op=')?([\w.:]+)", text)
    operator = found[1] if found else ""
    if called := re.search(r"target=torch\.ops\.([\w.]+)\]", text):
        operator = called[1]
        text = f"the exporter knows no torch.ops.{operator}"
    where = next((source_line(n) for n in program.graph.nodes if operator in str(n.target)), None)
    first = text.strip().splitlines()[0][:300]
    return ExportError(f"no ONNX translation: {first}", where=where if operator else None)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's own progress lines and deprecation warnings."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


_HIDDEN = "graphopt.hidden"


def fuse_for_runtime(model: Any) -> dict[str, int]:
    """Apply onnxscript's fusions for ONNX Runtime in place; returns how many of each kind."""
    from onnxscript.rewriter.ort_fusions import optimize_for_ort

    own = {
        "rms_normalization": onnx_norms.count(model.model),
        "rotary_embedding": onnx_rotary.count(model.model),
    }
    _hide(model.model)
    with quiet():
        fused, counts = optimize_for_ort(model.model)
    _show(fused)
    model.model = fused
    if onnx_sums.doubles_apart(fused):
        counts = {name: count for name, count in counts.items() if name not in onnx_sums.FUSIONS}
    totals = {name: counts.get(name, 0) + own.get(name, 0) for name in {**counts, **own}}
    return {name: count for name, count in totals.items() if count}


def _hide(model: Any) -> None:
    """Put operators that onnxscript would fuse wrongly under a name that no pattern has.

    Reshapes of attention's heads to other than ``(B, S, E)``: it puts attention in place of the
    transpose of heads and of any reshape behind it, but its result has three axes (Swin makes
    windows of heads at once). Heads of which a part is turned by positions: it makes an operator
    without the number of heads, which ONNX Runtime does not load (GPT-NeoX).
    """
    for node in [node for node in model.graph if _makes_windows(node) or _turns_a_part(node)]:
        node.domain = _HIDDEN
        model.opset_imports[_HIDDEN] = 1


def _show(model: Any) -> None:
    model.opset_imports.pop(_HIDDEN, None)
    for node in model.graph:
        if node.domain == _HIDDEN:
            node.domain = ""


def _turns_a_part(node: Any) -> bool:
    """Whether a node joins something with the rest of a head; not the halves of a rotation."""
    if node.op_type != "Concat" or len(node.inputs) != 2:
        return False
    first, rest = (value.producer() for value in node.inputs)
    whole = first is None or first.op_type in ("Neg", "Slice")
    return not whole and rest is not None and rest.op_type == "Slice"


def _makes_windows(node: Any) -> bool:
    before = node.inputs[0].producer() if node.op_type == "Reshape" else None
    if before is None or before.op_type != "Transpose" or "perm" not in before.attributes:
        return False
    shape = node.outputs[0].shape
    swaps_heads = list(before.attributes["perm"].as_ints()) == [0, 2, 1, 3]
    return swaps_heads and shape is not None and len(shape) != 3
