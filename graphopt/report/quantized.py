"""What quantization did, as data: each weight in few bits, what stayed in floats, the outputs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class QuantizedLayer:
    """A weight that is stored in few bits, and what is computed with it.

    Attributes:
        names: tensors of the model that the weight is, or was computed from.
        node: the operator that reads it, in the rewritten graph.
        operators: all that read it: ``linear``, ``embedding``, ``conv``, ``experts``.
        shape: of the weight.
        dtype, bits, group_size, symmetric: what it is stored as; ``group_size`` is ``None`` where
            an output channel is one group.
        activations: ``none`` (left as they are), ``dynamic`` (in 8 bits as the model runs) or
            ``static`` (in 8 bits by a scale that calibration found).
        bytes_before, bytes_after: of the weight, scales and zero points included.
        bytes_beside: of ``bytes_after``, what stands in floats beside codes.
        error: RMS error of what is computed with the weight, relative to the RMS of the same in
            float64 (absolute where that is all zeros); ``None`` where it was not measured. Of
            several operators that read the weight, that of the worst.
        sqnr: ``-20 log10(error)`` in dB; ``None`` where the error is 0 or not known.
        cosine: of the two as vectors; ``None`` where one is all zeros.
        seconds_before, seconds_after: of the piece of the graph, where it was timed.
        note: what the method came to, or where it gave way.
    """

    names: tuple[str, ...]
    node: str
    operators: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bits: int
    group_size: int | None
    symmetric: bool
    activations: str
    bytes_before: int
    bytes_after: int
    bytes_beside: int = 0
    error: float | None = None
    sqnr: float | None = None
    cosine: float | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None
    source: str | None = None
    note: str = ""


@dataclass(frozen=True)
class FloatWeight:
    """A weight of two axes or more that stayed in floats.

    Attributes:
        names: tensors of the model that it is, or was computed from.
        reason: why; ``option`` would change that, ``stage`` is that of `MissedRewrite`.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    reason: str
    option: str | None = None
    stage: str = "check"


@dataclass(frozen=True)
class OutputFidelity:
    """How near a floating output of the model is to that of the original in float64.

    Attributes:
        name: under which the model returns it, or its position.
        shape: on the first of the inputs.
        error, sqnr, cosine: as in `QuantizedLayer`.
        divergence: where the output is logits, the mean over its rows of ``KL(softmax(original) ||
            softmax(quantized))`` in nats. Those are outputs with two classes or more on the last
            axis that are called ``logits`` or ``..._logits``, and outputs without a name that show
            a product or its ``log_softmax`` as it is.
    """

    name: str
    shape: tuple[int, ...]
    error: float
    sqnr: float | None
    cosine: float | None
    divergence: float | None = None


@dataclass(frozen=True)
class Quantization:
    """All that was quantized in one model, in its order.

    Attributes:
        inputs: what ``error`` and its kin were measured on: ``calibration`` or ``captured``.
        bytes_before, bytes_after: of distinct tensors that the model holds.
        seconds_before, seconds_after: of one run on the captured inputs, operator by operator, of
            the graph as captured and as rewritten; ``None`` where they were not timed.
    """

    layers: tuple[QuantizedLayer, ...] = ()
    floats: tuple[FloatWeight, ...] = ()
    outputs: tuple[OutputFidelity, ...] = ()
    inputs: str = "captured"
    bytes_before: int = 0
    bytes_after: int = 0
    seconds_before: float | None = None
    seconds_after: float | None = None

    @property
    def notes(self) -> list[str]:
        """What methods came to, or where they gave way, layer by layer."""
        return [layer.note for layer in self.layers if layer.note]
