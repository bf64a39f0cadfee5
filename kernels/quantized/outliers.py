"""Which numbers of a weight are kept beside its codes, and what they are then best.

An error e of the weight at input k costs ``H[k, k] * e ** 2`` in the products, H the second moment
of the inputs: its sum over a column is how much that input suffers (Lee et al. 2024, "OWQ", section
4.1), and the single numbers that suffer most are those of Kim et al. 2024, "SqueezeLLM", section
4.2. A super weight is a number that the largest activation of a layer hangs on, found where input
and output spike at the same position (Yu et al. 2024, "The Super Weight in Large Language Models",
section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPIKE = 25.0
"""Times the mean magnitude of all other channels that a spike is."""
MOST = 8
"""Super weights of a layer; at most six were found (Yu et al. 2024, table 2)."""

_SYSTEMS = 1 << 22
"""Numbers of the systems of equations that are solved at once."""

Place = tuple[int, int]
"""Output channel and input."""


def super_weights(weight: Tensor, row: Tensor) -> list[Place]:
    """Numbers of ``(N, K)`` that make outputs spike for a row of inputs ``(K,)`` that spikes."""
    row, found = row.to(torch.float32), list[Place]()
    made = weight.to(torch.float32) @ row
    while len(found) < min(MOST, *weight.shape):
        output = int(made.abs().argmax())
        parts = weight[output].to(torch.float32) * row
        place = int(parts.abs().argmax())
        carries = float(parts[place] / made[output]) >= 0.5 if made[output] else False
        if not (carries and _spikes(made, output) and _spikes(row, place)):
            break
        found.append((output, place))
        made[output] -= parts[place]
    return found


def _spikes(values: Tensor, place: int) -> bool:
    size = values.abs()
    others = (size.sum() - size[place]) / max(1, len(size) - 1)
    return float(size[place]) > SPIKE * float(others)


def columns(cost: Tensor, count: int, always: Sequence[Place] = ()) -> Tensor:
    """The inputs ``(c,)`` that suffer most, in rising order.

    Args:
        cost: ``(N, K)``, of what an error costs.
        always: places whose inputs are among them, and count.
    """
    total = cost.sum(0)
    if always:
        total[[place for _, place in always]] = torch.inf
    count = max(min(count, len(total)), len({place for _, place in always}))
    return total.topk(count).indices.sort().values


def numbers(cost: Tensor, count: int, always: Sequence[Place] = ()) -> Tensor:
    """A mask ``(N, K)`` of the numbers that suffer most; arguments as of `columns`."""
    cost = cost.clone()
    for place in always:
        cost[place] = torch.inf
    mask = torch.zeros_like(cost, dtype=torch.bool)
    count = max(min(count, cost.numel()), len(always))
    mask.view(-1)[cost.flatten().topk(count).indices] = True
    return mask


def without(moment: Tensor, places: Tensor) -> Tensor:
    """The second moment that is left when some inputs make good what they can of any error.

    It is the Schur complement of their part, and zero at these inputs.
    """
    wide = moment.double()
    across = wide[places]
    left = wide - across.t() @ torch.linalg.solve(across[:, places], across)
    left[places], left[:, places] = 0.0, 0.0
    return (left + left.t()).div_(2).to(moment.dtype)


def best_columns(error: Tensor, places: Tensor, moment: Tensor | None) -> Tensor:
    """Values ``(N, c)`` of columns beside which an error ``(N, K)`` costs least."""
    own = error[:, places]
    if moment is None:
        return own
    rest = error.double().index_fill(1, places, 0.0)
    wide = moment.double()
    moved = torch.linalg.solve(wide[places][:, places], (rest @ wide[:, places]).t()).t()
    return own + moved.to(error.dtype)


def best_numbers(error: Tensor, mask: Tensor, moment: Tensor | None) -> Tensor:
    """An error ``(N, K)`` made good at the places of a mask as well as can be, else zero."""
    if moment is None:
        return error * mask
    made, wanted = torch.zeros_like(error), error @ moment
    counts, order = mask.sum(1).sort(descending=True, stable=True)
    start = 0
    while start < len(order) and (most := int(counts[start])) > 0:
        rows = order[start : start + max(1, _SYSTEMS // most**2)]
        start += len(rows)
        places = mask[rows].to(torch.float32).topk(most, dim=1).indices
        here = mask[rows].gather(1, places)
        systems = moment[places[:, :, None], places[:, None]]
        systems = systems * (here[:, :, None] & here[:, None]) + torch.diag_embed((~here).float())
        solved = torch.linalg.solve(systems, wanted[rows].gather(1, places) * here)
        made[rows] = made[rows].scatter(1, places, solved)
    return made
