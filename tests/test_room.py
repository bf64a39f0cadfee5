"""Memory: what is freed goes back to the system."""

from __future__ import annotations

import ctypes

import psutil
import pytest
import torch

from graphopt.room import give_back


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another allocator")
def test_what_was_freed_between_tensors_that_stay_goes_back_to_the_system():
    process, count, numbers = psutil.Process(), 20_000, 2048  # 8 KiB each, below malloc's mmap
    made = [torch.ones(numbers) for _ in range(count)]
    kept = made[::100] + made[-1:]
    del made
    before = process.memory_info().rss
    give_back()
    freed = before - process.memory_info().rss
    assert freed > 0.8 * count * numbers * 4
    assert all(bool((tensor == 1).all()) for tensor in kept)
