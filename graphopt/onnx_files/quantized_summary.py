"""What quantization did to an ONNX file, as the report has it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from graphopt.onnx_files.document import stored_bytes
from graphopt.onnx_files.examine import Examiner
from graphopt.onnx_files.numbers import held_tensor
from graphopt.onnx_files.pipeline import Result
from graphopt.onnx_files.values import as_tensor
from graphopt.report.quantized import FloatWeight, OutputFidelity, Quantization


def summary(result: Result, examiner: Examiner) -> Quantization:
    """Each weight in few bits, what stayed in floats, and how near outputs are."""
    return Quantization(
        layers=tuple(result.layers),
        floats=tuple(_floats(result)),
        outputs=tuple(_outputs(result, examiner)),
        inputs="calibration" if examiner.feeds.calibration else "captured",
        bytes_before=stored_bytes(examiner.model),
        bytes_after=stored_bytes(result.model),
    )


def _floats(result: Result) -> Iterator[FloatWeight]:
    """Weights that a reason is known for, and are still there."""
    values = dict(result.model.graph.initializers)
    for row in result.missed:
        for name in row.weights:
            value = values.pop(name, None)
            tensor = None if value is None else held_tensor(value)
            if tensor is not None:
                shape, kind = tuple(map(int, tensor.shape)), tensor.dtype.name.lower()
                size = int(tensor.nbytes)
                yield FloatWeight((name,), shape, kind, size, row.reason, row.option, row.stage)


def _outputs(result: Result, examiner: Examiner) -> Iterator[OutputFidelity]:
    """Floating outputs on the first inputs, against the original's: in float64 where it runs so."""
    found, wanted = examiner.first_outputs(result.model)
    for name, value, exact in zip(examiner.names, found, wanted, strict=True):
        made, original = as_tensor(value), as_tensor(exact)
        if made is None or original is None or made.is_complex():
            continue
        yield _fidelity(name, made.double(), original.double())


def _fidelity(name: str, made: torch.Tensor, wanted: torch.Tensor) -> OutputFidelity:
    size = float(wanted.norm())
    error = float((made - wanted).norm()) / (size or 1.0)
    sqnr = -20 * math.log10(error) if error else None
    norm = size * float(made.norm())
    cosine = float((made * wanted).sum()) / norm if norm else None
    return OutputFidelity(name, tuple(made.shape), error, sqnr, cosine)
