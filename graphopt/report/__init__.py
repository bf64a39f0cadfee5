"""What a run did and what it left alone: as data, in the terminal, as JSON and as one HTML page."""

from graphopt.report.model import (
    SCHEMA,
    Applied,
    Certificate,
    MissedRewrite,
    NodeView,
    PassSummary,
    Report,
    Trade,
    json_schema,
)
from graphopt.report.partition import Partition, PartitionRegion, TorchPart
from graphopt.report.quantized import (
    FloatWeight,
    OutputFidelity,
    Quantization,
    QuantizedLayer,
)

__all__ = [
    "SCHEMA",
    "Applied",
    "Certificate",
    "FloatWeight",
    "MissedRewrite",
    "NodeView",
    "OutputFidelity",
    "Partition",
    "PartitionRegion",
    "PassSummary",
    "Quantization",
    "QuantizedLayer",
    "Report",
    "TorchPart",
    "Trade",
    "json_schema",
]
