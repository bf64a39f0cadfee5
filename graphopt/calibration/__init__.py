"""Calibration: what a program computes on samples, seen node by node in the memory of one step."""

from __future__ import annotations

from graphopt.calibration.segment import Segment, segments
from graphopt.calibration.statistics import Statistics
from graphopt.calibration.stream import Stream

__all__ = ["Segment", "Statistics", "Stream", "segments"]
