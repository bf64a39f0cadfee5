"""Fresh inputs for verification: other values, and sizes that were not seen at capture."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from graphopt.conditions import condition
from graphopt.program import Program, val
from graphopt.signature import is_cache

SEED = 7041

SAMPLE = 4096
"""Elements that are looked at before all of a tensor are."""

FEW = 3
"""Size of the other axes where one is tried at 1."""

MANY = 4
"""Up to this many dynamic sizes, every combination of ones is tried at capture."""


def symbols_of(program: Program) -> dict[sympy.Symbol, int]:
    """Symbols in the shapes of user inputs, and the sizes they had at capture."""
    found: dict[sympy.Symbol, int] = {}
    for node, example in zip(program.user_inputs(), program.example_inputs, strict=True):
        tensor = isinstance(example, Tensor)
        extents = val(node).shape if tensor else (val(node),)
        for extent, size in zip(extents, example.shape if tensor else (example,), strict=True):
            expression = _expression(extent)
            if isinstance(expression, sympy.Symbol):
                found.setdefault(expression, int(size))
    return found


def fresh_inputs(program: Program, sizes: Mapping[sympy.Symbol, int] | None = None) -> list[Any]:
    """Random flat user inputs like the captured ones.

    Floating values follow the example's mean and deviation, or a deviation of the mean's size (at
    least 1) where the example is constant: zeros and ones would not tell operators apart. Integers
    and booleans are drawn from the values of the example: indices stay valid and masks masks. Keys
    and values of a cache are those of positions drawn from the example's: what attends to noise
    answers noise, on which no approximation can be judged.

    Args:
        sizes: symbol -> size; symbols left out keep the captured size.
    """
    generator = torch.Generator().manual_seed(SEED + sum((sizes or {}).values()))
    known = {**symbols_of(program), **(sizes or {})}
    kept = cached_inputs(program)
    pairs = zip(program.user_inputs(), program.example_inputs, strict=True)
    return [
        (_positions if index in kept else _fresh)(val(node), example, known, generator)
        for index, (node, example) in enumerate(pairs)
    ]


def cached_inputs(program: Program) -> set[int]:
    """Flat user inputs that are tensors ``(B, H, S, D)`` of a cache."""
    if program.call is None:
        return set()
    found, pending, index = set(), [(program.call.in_spec, False)], 0
    while pending:
        spec, inside = pending.pop()
        if spec.is_leaf():
            found |= {index} if inside else set()
            index += 1
        inside = inside or is_cache(spec.type)
        pending += [(child, inside) for child in reversed(spec.children())]
    values = program.example_inputs
    return {i for i in found if isinstance(values[i], Tensor) and values[i].dim() == 4}


def _positions(
    fake: Any, example: Tensor, sizes: Mapping[Any, int], generator: torch.Generator
) -> Tensor:
    """Positions of the example: its first, which models like to attend to, then any others."""
    shape = [_extent(extent, sizes) for extent in fake.shape]
    for axis in (0, 2):
        index = torch.randint(example.shape[axis], (shape[axis],), generator=generator)
        index[:1] = 0
        example = example.index_select(axis, index.to(example.device))
    return example


def first_positions(
    program: Program, inputs: Sequence[Any], sizes: Mapping[sympy.Symbol, int]
) -> list[Any]:
    """Flat user inputs cut down to smaller sizes of the symbols in their shapes."""
    known = {**symbols_of(program), **sizes}
    pairs = zip(program.user_inputs(), inputs, strict=True)
    return [_first(val(node), value, known) for node, value in pairs]


def _first(fake: Any, value: Any, sizes: Mapping[Any, int]) -> Any:
    if not isinstance(value, Tensor):
        return value if _expression(fake) is None else _extent(fake, sizes)
    given = value
    for dim, extent in enumerate(fake.shape):
        if _expression(extent) is not None:
            value = value.narrow(dim, 0, min(value.shape[dim], _extent(extent, sizes)))
    return given if value is given else _laid_out(value, given)


def _fresh(fake: Any, example: Any, sizes: Mapping[Any, int], generator: torch.Generator) -> Any:
    if not isinstance(example, Tensor):
        return example if _expression(fake) is None else _extent(fake, sizes)
    shape = [_extent(extent, sizes) for extent in fake.shape]
    if example.is_floating_point() and not _is_mask(example):
        mean, spread = _moments(example)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * spread + mean
        return _laid_out(drawn.to(example.device, example.dtype), example)
    if example.numel() == 0:
        return example.new_zeros(shape)
    index = torch.randint(example.numel(), shape, generator=generator)
    return _laid_out(example.detach().flatten()[index.to(example.device)], example)


def is_empty(values: Sequence[Any]) -> bool:
    """Whether there are tensors among the values, and one has no elements."""
    return any(isinstance(v, Tensor) and not v.numel() for v in values)


def _is_mask(example: Tensor) -> bool:
    """Whether a floating tensor holds just two values, one of them 0: what is kept and what not."""
    plain = example.detach()
    if plain.flatten()[:SAMPLE].unique().numel() > 2:  # most are not, and sorting all takes long
        return False
    values = plain.unique()
    return values.numel() == 2 and bool((values == 0).any())


def _moments(example: Tensor) -> tuple[float, float]:
    """Mean and deviation to draw with, of the finite elements."""
    plain = example.detach().double()
    if not math.isfinite(plain.sum()):
        plain = plain[plain.isfinite()]
    if not plain.numel():
        return 0.0, 1.0
    spread, mean = map(float, torch.std_mean(plain, correction=0))
    return mean, spread or max(1.0, abs(mean))


def _laid_out(value: Tensor, example: Tensor) -> Tensor:
    """The value with its axes in the example's order in memory: views of the model stand on it."""
    axes = range(value.dim())
    order = sorted(axes, key=example.stride, reverse=True)
    back = sorted(axes, key=order.__getitem__)
    return value.permute(order).contiguous().permute(back)


def _expression(extent: Any) -> Any:
    """The symbolic expression behind a size, or ``None`` for a plain number."""
    return getattr(getattr(extent, "node", None), "expr", None)


def _extent(extent: Any, sizes: Mapping[Any, int]) -> int:
    expression = _expression(extent)
    return int(extent) if expression is None else int(expression.subs(sizes))


def accepts(program: Program, sizes: Mapping[sympy.Symbol, int]) -> bool:
    """Whether sizes lie in the program's ranges and meet its assumptions."""
    for symbol, size in sizes.items():
        allowed = program.range_constraints.get(symbol)
        if allowed is not None and not allowed.lower <= size <= allowed.upper:
            return False
    values = {str(symbol): size for symbol, size in sizes.items()}
    return all(condition(a.text, sorted(values))(**values) for a in program.assumptions)


def unseen_sizes(program: Program, *, doubled: bool = False) -> dict[sympy.Symbol, int]:
    """One size of at least 2 per symbol that differs from the captured one, where one is allowed.

    A symbol is left out where the program's ranges and assumptions allow none of those tried.

    Args:
        doubled: twice the captured sizes first: what is cut into equal parts is so at those too.
    """
    known = symbols_of(program)
    chosen: dict[sympy.Symbol, int] = {}
    for symbol, size in known.items():
        near = (size + 1, size + 3, size - 1, size + 2, 2 * size)
        for candidate in (2 * size, *near) if doubled else near:
            if candidate >= 2 and accepts(program, {**known, **chosen, symbol: candidate}):
                chosen[symbol] = candidate
                break
    return chosen


def sizes_of_one(program: Program) -> list[dict[sympy.Symbol, int]]:
    """Sizes with 1 in them that a call may have: each symbol alone, then all at once.

    A trace is made with sizes of at least 2, so these are the ones at which its graph may not be
    the model. The others are small, so that trying costs little. Programs of Dynamo have none: it
    guards against sizes of 1.
    """
    known = symbols_of(program)
    if program.call is None or not known:
        return []
    sets = [_with_ones(program, {symbol}, FEW) for symbol in known]
    sets += [dict.fromkeys(known, 1)] if len(known) > 1 else []
    return [sizes for sizes in sets if accepts(program, sizes)]


def combinations_with_one(program: Program) -> Iterator[dict[sympy.Symbol, int]]:
    """All choices of symbols at 1, up to `MANY` symbols, the others at 2 and then at `FEW`.

    What a trace takes for granted of products and sums of sizes (``batch * seq >= 4``) fails only
    where the sizes that are not 1 are the smallest.
    """
    known = list(symbols_of(program))
    if program.call is None or not known:
        return
    most = len(known) if len(known) <= MANY else 1
    for count in range(1, most + 1):
        for chosen in itertools.combinations(known, count):
            tried = [_with_ones(program, set(chosen), others) for others in (2, FEW)]
            yield from (s for i, s in enumerate(tried) if s not in tried[:i])
    if most < len(known):
        yield dict.fromkeys(known, 1)


def _with_ones(
    program: Program, ones: Collection[sympy.Symbol], others: int
) -> dict[sympy.Symbol, int]:
    """Some symbols at 1 and the others small, or as captured where small is not allowed."""
    known, unseen = symbols_of(program), unseen_sizes(program)
    small = {s: 1 if s in ones else others for s in known}
    if accepts(program, small):
        return small
    larger = {s: size if size > 1 else unseen.get(s, size) for s, size in known.items()}
    return {s: 1 if s in ones else size for s, size in larger.items()}
