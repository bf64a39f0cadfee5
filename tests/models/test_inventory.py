"""torch's own module samples: enough of them, reproducible, and every one runs."""

from __future__ import annotations

import pytest
import torch

from models.entry import seeded

pytest.importorskip("expecttest", reason="torch's module samples need it")

from models.inventory import samples


@pytest.mark.slow
def test_every_sample_runs_and_repeats() -> None:
    names = []
    for one, two in zip(samples(1), samples(1), strict=True):
        names.append(one.name)
        with torch.no_grad(), seeded(one.name):
            left = one.module(*one.args, **one.kwargs)
        with torch.no_grad(), seeded(two.name):
            right = two.module(*two.args, **two.kwargs)
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True, msg=one.name)
    assert len(names) == len(set(names)) > 200
    assert {"nn.Linear[eval,0]", "nn.LazyConv2d[train,0]"} <= set(names)
