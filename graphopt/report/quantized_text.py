"""Formats and errors of quantized weights in words, the same in every view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.report.quantized import OutputFidelity, Quantization, QuantizedLayer


def format_text(layer: QuantizedLayer) -> str:
    """``int4 in groups of 64 with zero points``; ``int8 per channel, activations int8``."""
    kind = f"int{layer.bits}" if layer.dtype == "int" else layer.dtype
    groups = f"in groups of {layer.group_size}" if layer.group_size else "per channel"
    zeros = "" if layer.symmetric else " with zero points"
    kinds = {"dynamic": f", activations {_rounded(layer)}", "static": ", activations static int8"}
    activations = kinds.get(layer.activations, "")
    beside = ", floats beside" if layer.bytes_beside else ""
    return f"{kind} {groups}{zeros}{activations}{beside}"


def _rounded(layer: QuantizedLayer) -> str:
    return layer.dtype if layer.dtype != "int" else "int8"


def sqnr_text(sqnr: float | None, error: float | None) -> str:
    """``36.5 dB``; ``exact``, or what there is to say instead."""
    if error is None:
        return "not measured"
    if sqnr is None:
        return "exact" if error == 0 else "no signal"
    return f"{sqnr:.1f} dB"


def cosine_text(cosine: float | None) -> str:
    """As many digits as tell it from 1, three at least."""
    if cosine is None:
        return ""
    for digits in range(3, 10):
        shown = f"{cosine:.{digits}f}"
        if float(shown) < 1 or cosine >= 1:
            return shown
    return f"{cosine:.9f}"


def names_text(names: Sequence[str]) -> str:
    """The first, and how many more."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0] if names else 'unnamed'}{more}"


def shape_text(shape: Sequence[int]) -> str:
    return "\N{MULTIPLICATION SIGN}".join(map(str, shape)) or "one number"


@dataclass(frozen=True)
class Format:
    """Layers that are stored in one format."""

    name: str
    layers: tuple[QuantizedLayer, ...]

    @property
    def bytes(self) -> tuple[int, int]:
        """Before and after."""
        pairs = [(layer.bytes_before, layer.bytes_after) for layer in self.layers]
        return sum(a for a, _ in pairs), sum(b for _, b in pairs)

    @property
    def worst(self) -> QuantizedLayer | None:
        """The layer with the lowest SQNR; ``None`` where none was measured, or all are exact."""
        return worst(self.layers)


def worst(layers: Sequence[QuantizedLayer]) -> QuantizedLayer | None:
    known = [layer for layer in layers if layer.error]
    return max(known, key=lambda layer: layer.error or 0.0, default=None)


def formats(found: Quantization) -> list[Format]:
    """In order of first appearance."""
    groups: dict[str, list[QuantizedLayer]] = {}
    for layer in found.layers:
        groups.setdefault(format_text(layer), []).append(layer)
    return [Format(name, tuple(layers)) for name, layers in groups.items()]


def output_text(output: OutputFidelity) -> str:
    """``SQNR 24.9 dB, cosine 0.998, KL divergence 0.012``."""
    parts = [f"SQNR {sqnr_text(output.sqnr, output.error)}"]
    parts += [f"cosine {cosine_text(output.cosine)}"] if output.cosine is not None else []
    if output.divergence is not None:
        parts.append(f"KL divergence {output.divergence:.2g} nats")
    return ", ".join(parts)


def measured_on(found: Quantization) -> str:
    return "calibration inputs" if found.inputs == "calibration" else "the captured inputs"
