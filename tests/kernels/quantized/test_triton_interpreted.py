"""The Triton kernels of quantized products under Triton's interpreter."""

from __future__ import annotations
