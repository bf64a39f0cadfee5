"""How many classes a panel of slopes has."""

from __future__ import annotations

from graphopt.kernels.cross_entropy.configs import STREAMING_PROCESSORS

PANEL_BYTES = 32 * 2**20
"""Of one panel: most of it stays in the 50 MB of L2 until its two products have read it."""

_FEWEST = 1024
"""Classes at least, whatever that takes: with fewer, the sum of the gradient of hidden is read and
written too often, see `product`. That is less memory than hidden for more than 1024 features."""

_HEIGHT, _WIDTH = 128, 256
"""Of the tiles that the large kernels are expected to choose."""


def panel_width(rows: int, features: int, classes: int, element_size: int) -> int:
    """A multiple of 128 that leaves few processors idle in the last round of each launch."""
    most = max(_FEWEST, PANEL_BYTES // (rows * element_size or 1)) // _HEIGHT * _HEIGHT
    if classes <= most:
        return -(-classes // _HEIGHT) * _HEIGHT
    widths = range(max(_FEWEST, most // 2 // _HEIGHT * _HEIGHT), most + 1, _HEIGHT)
    return min(widths, key=lambda width: _time(rows, features, width) / width)


def _time(rows: int, features: int, width: int) -> int:
    """Of the three launches for a panel, in rounds of tiles times their depth."""
    slopes = _rounds(rows, width) * features
    d_weight = _rounds(width, features) * rows
    d_hidden = _rounds(rows, features) * width
    return slopes + d_weight + d_hidden


def _rounds(height: int, width: int) -> int:
    tiles = -(-height // _HEIGHT) * -(-width // _WIDTH)
    return -(-tiles // STREAMING_PROCESSORS)
