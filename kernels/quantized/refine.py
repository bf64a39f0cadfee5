"""Codes and scales of a weight refined in turn, each to the minimum given the other.

For a weight W and its quantized form Q the error that is made small is ``(W - Q) H (W - Q).T`` on
the diagonal, H the second moment of the inputs. Codes: each one in turn is the nearest to the best
number given all others, ``q + ((W - Q) H)[k] / H[k, k]`` (coordinate descent; Behdin et al. 2023,
"QuantEase", section 3). Scales, and zero points where there are any, of an output channel: the
numbers are linear in them, and the best ones solve a small system of equations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.kernels.quantized import codes as coding
from graphopt.kernels.quantized import scales as scaling
from graphopt.kernels.quantized import tables
from graphopt.kernels.quantized.scheme import Scheme

_BLOCK = 128
_SHARE = 1e-6
"""Of the mean diagonal, added to systems of equations that codes may leave singular."""


class Rounded(NamedTuple):
    """Codes ``(K, N)`` of G groups in turn along K, scales and zeros ``(G, N)``, float32."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def numbers(self, scheme: Scheme) -> Tensor:
        """What they stand for, ``(K, N)``."""
        grouped = self.codes.unflatten(0, (len(self.scales), -1))
        zeros = None if self.zeros is None else self.zeros[:, None]
        return coding.decode(grouped, self.scales[:, None], zeros, scheme).flatten(0, 1)


def refined(weight: Tensor, moment: Tensor, found: Rounded, scheme: Scheme, times: int) -> Rounded:
    """Refine the quantized form of a weight ``(K, N)`` for a moment ``(K, K)``, as often as asked.

    What a step does not improve for an output channel is as it was before.
    """
    for _ in range(times):
        found = _kept(weight, moment, found, _rescaled(weight, moment, found, scheme), scheme)
        found = _descended(weight, moment, found, scheme)
    return found


def errors(weight: Tensor, moment: Tensor, found: Rounded, scheme: Scheme) -> Tensor:
    """The squared error of the products of each output channel, ``(N,)``."""
    off = weight - found.numbers(scheme)
    return (moment @ off).mul_(off).sum(0)


def _kept(weight: Tensor, moment: Tensor, old: Rounded, new: Rounded, scheme: Scheme) -> Rounded:
    """New scales where they are better."""
    if new is old:
        return old
    better = errors(weight, moment, new, scheme) < errors(weight, moment, old, scheme)
    scales = torch.where(better, new.scales, old.scales)
    zeros = old.zeros
    if new.zeros is not None and old.zeros is not None:
        zeros = torch.where(better, new.zeros, old.zeros)
    return Rounded(old.codes, scales, zeros)


def _descended(weight: Tensor, moment: Tensor, found: Rounded, scheme: Scheme) -> Rounded:
    """One round over all codes."""
    codes, numbers = found.codes.clone(), found.numbers(scheme)
    slopes, size = moment @ (weight - numbers), len(weight) // len(found.scales)
    for start in range(0, len(weight), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(weight)))
        inner, local = moment[block, block], slopes[block]
        change = torch.zeros_like(local)
        for k in range(len(local)):
            row = start + k
            zero = None if found.zeros is None else found.zeros[row // size]
            scale, old = found.scales[row // size], numbers[row]
            best = old + local[k] / inner[k, k]
            codes[row] = coding.encode(best, scale, zero, scheme)
            change[k] = coding.decode(codes[row], scale, zero, scheme) - old
            local.addr_(inner[k], change[k], alpha=-1)
        rest = torch.cat([moment[: block.start, block], moment[block.stop :, block]])
        moved = rest @ change
        slopes[: block.start] -= moved[: block.start]
        slopes[block.stop :] -= moved[block.start :]
    return Rounded(codes, found.scales, found.zeros)


def _rescaled(weight: Tensor, moment: Tensor, found: Rounded, scheme: Scheme) -> Rounded:
    """The best scales and zeros for the codes."""
    if scheme.dtype in ("mxfp4", "nvfp4"):  # scales are of a coarse format
        return found
    groups, size = len(found.scales), len(weight) // len(found.scales)
    basis = levels(found.codes, scheme)
    parts = [basis] if found.zeros is None else [basis, torch.ones_like(basis)]
    products = moment @ weight
    outputs, unknowns = weight.shape[1], groups * len(parts)
    right = weight.new_empty(outputs, unknowns)
    left = weight.new_empty(outputs, unknowns, unknowns)
    for column, (part, rows) in enumerate(_columns(parts, groups, size)):
        right[:, column] = (part[rows] * products[rows]).sum(0)
        image = moment[:, rows] @ part[rows]
        for other, (against, at) in enumerate(_columns(parts, groups, size)):
            left[:, other, column] = (against[at] * image[at]).sum(0)
    solved = _solved(left, right).t().unflatten(0, (len(parts), groups))
    return _from_solution(solved, found, scheme)


def _columns(parts: list[Tensor], groups: int, size: int) -> list[tuple[Tensor, slice]]:
    return [(p, slice(g * size, (g + 1) * size)) for p in parts for g in range(groups)]


def _solved(left: Tensor, right: Tensor) -> Tensor:
    diagonal = left.diagonal(dim1=1, dim2=2)
    extra = _SHARE * diagonal.mean(1, keepdim=True) + torch.finfo(left.dtype).tiny
    made, _ = torch.linalg.solve_ex(left + torch.diag_embed(extra.expand_as(diagonal)), right)
    return made


def _from_solution(solved: Tensor, found: Rounded, scheme: Scheme) -> Rounded:
    """``scale * code + shift`` is ``(code - zero) * scale``; what is no number is as it was."""
    sound = solved.isfinite().all(0) & (solved[0].abs() > torch.finfo(torch.float32).tiny)
    scales = scaling.kept(torch.where(sound, solved[0], found.scales), scheme)
    if found.zeros is None:
        return Rounded(found.codes, scales, None)
    zeros = torch.where(sound, -solved[1] / scales, found.zeros)
    return Rounded(found.codes, scales, scaling.kept(zeros, scheme))


def levels(codes: Tensor, scheme: Scheme) -> Tensor:
    """What codes stand for at scale 1, without a zero point."""
    if scheme.dtype == "int":
        return codes.to(torch.float32)
    return tables.look_up(codes, scheme.dtype).to(torch.float32)
