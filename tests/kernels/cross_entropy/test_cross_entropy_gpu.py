"""The Triton kernels on a real device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cross_entropy_calls import (
    ALONE_AND_IN_PAIRS,
    LIMITS,
    assert_as_dense,
    assert_close,
    assert_rows_as_dense,
    make,
)

from graphopt.kernels.filtering import kept

pytestmark = pytest.mark.gpu
SIZES = [(5, 123, 7), (123, 257, 33), (1023, 5000, 96)]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_summaries_and_gradients(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_rows_as_dense(make(*sizes, ("bias", "softcap", "ignore")).to(dtype), "cuda")


@pytest.mark.parametrize("options", ALONE_AND_IN_PAIRS, ids="-".join)
def test_options_alone_and_in_pairs(options: tuple[str, ...]) -> None:
    assert_as_dense(make(37, 123, 33, options), "cuda")


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("threshold", [0.0, 2**-12])
def test_several_panels(dtype: torch.dtype, threshold: float) -> None:
    """Both panels of 20,000 classes, peaked so that a filter changes little."""
    call = replace(make(1023, 20_000, 64, scale=20.0), filter_threshold=threshold).to(dtype)
    with kept() as shares:
        assert_as_dense(call, "cuda", 5e-3)
    assert len(shares) == (threshold > 0)


def test_the_same_bits_every_time() -> None:
    call = make(1023, 5000, 96, ("bias",)).to(torch.bfloat16, "cuda")
    loss = call.losses().sum()
    once = torch.autograd.grad(loss, call.leaves, retain_graph=True)
    twice = torch.autograd.grad(loss, call.leaves, retain_graph=True)
    assert all(a.equal(b) for a, b in zip(once, twice, strict=True))


def test_more_logits_than_32_bits_count() -> None:
    """2^31 of them; the rows repeat, so that the last must be as the first."""
    few, times = make(64, 65_536, 16).to(torch.bfloat16, "cuda"), 512
    many = replace(
        few,
        hidden=few.hidden.detach().repeat(times, 1).requires_grad_(),
        target=few.target.repeat(times),
    )
    found, wanted = many.losses(), few.losses()
    assert_close([found[-64:]], [wanted.cpu()], 1e-6)
    (grad,) = torch.autograd.grad(found.sum(), many.hidden)
    (expected,) = torch.autograd.grad(wanted.sum(), few.hidden)
    assert_close([grad[-64:]], [expected.cpu()], 1e-6)


def test_memory_is_that_of_the_gradients_and_a_panel() -> None:
    call = make(2048, 64_000, 512).to(torch.bfloat16, "cuda")
    call.losses().sum().backward()  # chooses tiles, which takes memory of its own
    call.hidden.grad = call.weight.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call.losses().sum().backward()
    gradients = call.hidden.nbytes + call.weight.nbytes
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < gradients + 4 * call.hidden.numel() + 36 * 2**20
