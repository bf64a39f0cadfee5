"""What a run did and what it left alone: as data, in the terminal, as JSON and as one HTML page."""

from graphopt.report.model import (
    SCHEMA,
    Applied,
    Certificate,
    MissedRewrite,
    NodeView,
    PassSummary,
    Report,
    json_schema,
)

__all__ = [
    "SCHEMA",
    "Applied",
    "Certificate",
    "MissedRewrite",
    "NodeView",
    "PassSummary",
    "Report",
    "json_schema",
]
