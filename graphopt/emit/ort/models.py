"""A region as an ONNX model whose weights stay where they are: in torch's tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.onnx.errors import OnnxExporterError

from graphopt.emit.onnx_drafts import Draft, best_draft
from graphopt.emit.onnx_spelled import spelled_for_runtime
from graphopt.emit.ort.providers import OWN_OPERATORS
from graphopt.emit.ort.transposed import read_as_stored
from graphopt.errors import ExportError
from graphopt.program import Program

INLINE = 1024
"""Bytes up to which a constant is written into the model: ONNX Runtime's optimizers read numbers
of that size, such as shapes and scales."""
ELSEWHERE = "in torch's memory"
"""What stands for a file's name where a weight is not in the model. No file is ever looked for."""


@dataclass(frozen=True, eq=False)
class RegionModel:
    """A translated region.

    Attributes:
        proto: the ONNX model, which names its large weights and does not hold them.
        weights: those, by name: the program's own tensors where they were taken as they are.
        tables: names of weights of which only rows are read, which are never packed.
        inputs: names of the tensors that it takes, in the order of the program's user inputs.
        outputs: names of what it gives.
        tolerance: relative RMS that rounding of activations may change of its outputs.
        fusions: operators of ONNX Runtime that were made of several, and how many.
        notes: in which forms quantized operators are, and what else was tried.
    """

    proto: bytes
    weights: Mapping[str, Tensor]
    tables: frozenset[str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tolerance: float = 0.0
    fusions: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def over(self, old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> RegionModel:
        """The same over other tensors, where its weights are tensors of ``old``."""
        names = {_memory(tensor): name for name, tensor in old.items()}
        weights = {
            name: new[names[_memory(t)]].detach() if _memory(t) in names else t
            for name, t in self.weights.items()
        }
        return replace(self, weights=weights)

    def own_bytes(self, state: Iterable[Tensor], *, packed: bool) -> int:
        """Bytes of weights that are no tensor of ``state``: codes in the form of the model, say.

        Those that may be ``packed`` count, all of them.
        """
        known = set(map(_memory, state))
        own = (n for n, t in self.weights.items() if _memory(t) not in known)
        copied = (n for n in self.weights if packed and n not in self.tables)
        return sum(self.weights[name].nbytes for name in {*own, *copied})


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def translate_region(
    program: Program, providers: Sequence[str], *, verify: bool = True, measure: bool = True
) -> RegionModel:
    """A program of one region as a model, in the form that ONNX Runtime runs fastest.

    Args:
        program: as `programs.region_program` makes it.
        verify: try the forms of quantized operators on the example inputs.
        measure: choose among forms by time.

    Raises:
        ExportError: an operator has no translation.
    """
    names = _names(program)
    fuse = OWN_OPERATORS.issuperset(providers)
    spelled = spelled_for_runtime(program)
    try:
        draft = best_draft(spelled, names, fuse=fuse, verify=verify, measure=measure)
    except Exception as error:  # of torch's exporter, which raises what it comes across
        raise ExportError(_told(error), where=getattr(error, "where", None)) from error
    if fuse:
        read_as_stored(draft.model.model, program.state, INLINE)
    weights = _taken_out(draft.model.model)
    lowering = draft.lowering
    return RegionModel(
        _serialized(draft),
        weights,
        _tables(draft.model.model, weights),
        *names,
        lowering.tolerance,
        draft.fusions,
        (*lowering.notes(), *draft.notes),
    )


def _told(error: BaseException) -> str:
    """The innermost cause of a failed translation, on one line."""
    if isinstance(error, ExportError) and not isinstance(error.__cause__, OnnxExporterError):
        return error.what
    while error.__cause__ is not None:
        error = error.__cause__
    first = str(error).strip().partition("\n")[0]
    if "No ONNX function found" in first:
        return "torch's ONNX exporter has no translation for it"
    return f"no ONNX translation: {first:.200}"


def _names(program: Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    inputs = tuple(n.name for n in program.user_inputs())
    made = (f"output_{i}" for i in range(len(program.outputs)))
    return inputs, tuple(f"{n}_out" if n in inputs else n for n in made)


def _serialized(draft: Draft) -> bytes:
    import onnx_ir

    return bytes(onnx_ir.to_proto(draft.model.model).SerializeToString())


def _taken_out(model: Any) -> dict[str, Tensor]:
    """Take large initializers out of an ``onnx_ir`` model, and leave their names."""
    import onnx_ir

    found = {}
    for name, value in model.graph.initializers.items():
        held = value.const_value
        if held is None or held.nbytes <= INLINE or (tensor := _tensor(held)) is None:
            continue
        found[name] = tensor
        value.const_value = onnx_ir.ExternalTensor(
            ELSEWHERE, 0, tensor.nbytes, held.dtype, shape=held.shape, name=name, base_dir=""
        )
    return found


def _tables(model: Any, weights: Iterable[str]) -> frozenset[str]:
    values = {name: model.graph.initializers[name] for name in weights}
    rows = (n for n, v in values.items() if all(u.node.op_type == "Gather" for u in v.uses()))
    return frozenset(rows)


def _tensor(held: Any) -> Tensor | None:
    """An ``onnx_ir`` tensor as torch has it, in the same memory where that can be; None for
    numbers of less than a byte."""
    from onnx_ir import tensor_adapters

    raw = getattr(held, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach().contiguous()
    if held.dtype.name == "STRING" or held.dtype.bitwidth < 8:
        return None
    dtype = tensor_adapters.to_torch_dtype(held.dtype)
    numbers = torch.frombuffer(bytearray(held.tobytes()), dtype=dtype)
    return numbers.reshape(tuple(held.shape.numpy()))
