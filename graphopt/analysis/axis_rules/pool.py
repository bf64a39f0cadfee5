"""Pooling, resampling and sliding windows without weights."""

from __future__ import annotations

from graphopt.analysis.axis_rules.call import Call, MixKind, Outcome, rule
from graphopt.analysis.axis_rules.labels import Label, Term, combine, term
from graphopt.analysis.axis_rules.sizes import quotient
from graphopt.analysis.axis_rules.views import dims_of
from graphopt.analysis.axis_rules.windows import Window, per_dim, slide, window


@rule("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
      "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices")  # fmt: skip
def pool(call: Call) -> Outcome:
    """Space in windows; the indices of maxima count over all of it."""
    rank = _space(call)
    kernel = per_dim(call["kernel_size"], rank)
    stride, padding = per_dim(call["stride"], rank), per_dim(call["padding"], rank)
    settings = [kernel, stride, padding, per_dim(call.get("dilation", default=1), rank)]
    sizes = (call.shape(call.main)[-rank:], call.results[0][-rank:])
    windows = [window(k, *dims) for k, dims in enumerate(zip(*sizes, *settings, strict=True))]
    return _pooled(call, windows, counted=len(call.results) > 1)


@rule("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
      "adaptive_max_pool2d", "adaptive_max_pool3d", "_adaptive_avg_pool2d",
      "_adaptive_avg_pool3d")  # fmt: skip
def adaptive_pool(call: Call) -> Outcome:
    """Windows tile where the size divides; the call states the size that comes out."""
    rank = _space(call)
    sizes = zip(call.shape(call.main)[-rank:], call.results[0][-rank:], strict=True)
    windows = [
        window(k, source, target, kernel, kernel, 0, 1)
        if (kernel := quotient(source, target)) is not None
        else slide(k, source, target)
        for k, (source, target) in enumerate(sizes)
    ]
    return _pooled(call, windows, counted=True)


@rule("upsample_nearest1d", "upsample_nearest1d.vec", "upsample_nearest2d",
      "upsample_nearest2d.vec", "upsample_nearest3d", "upsample_nearest3d.vec",
      "_upsample_nearest_exact1d", "_upsample_nearest_exact1d.vec", "_upsample_nearest_exact2d",
      "_upsample_nearest_exact2d.vec", "_upsample_nearest_exact3d",
      "_upsample_nearest_exact3d.vec", "upsample_linear1d", "upsample_linear1d.vec",
      "upsample_bilinear2d", "upsample_bilinear2d.vec", "upsample_bicubic2d",
      "upsample_bicubic2d.vec", "upsample_trilinear3d", "upsample_trilinear3d.vec",
      "_upsample_bilinear2d_aa", "_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa",
      "_upsample_bicubic2d_aa.vec")  # fmt: skip
def upsample(call: Call) -> Outcome:
    rank = _space(call)
    sizes = zip(call.shape(call.main)[-rank:], call.results[0][-rank:], strict=True)
    windows = [slide(k, source, target) for k, (source, target) in enumerate(sizes)]
    return _pooled(call, windows, kind="resample")


def _space(call: Call) -> int:
    """How many spatial dims the operator has, by its name (``max_pool2d``)."""
    return int(next(letter for letter in call.op if letter.isdigit()))


def _pooled(
    call: Call, windows: list[Window], *, kind: MixKind = "convolve", counted: bool = False
) -> Outcome:
    """Leading dims are parallel; ``counted``: the call or its result counts over all of space."""
    shape, rank = call.shape(call.main), len(windows)
    lead = [*enumerate(shape[:-rank])]
    before = [*lead, *(pair for w in windows for pair in w.before)]
    after = [label for label, _ in lead] + [label for w in windows for label, _ in w.after]
    source = Term(call.main, [label for label, _ in before], tuple(size for _, size in before))
    mixed: dict[Label, MixKind] = {("in", k): kind for k in range(rank)}
    fixed = [("s", k) for k in range(rank)] if counted else []
    return combine(call, [source], [after] * len(call.results), mixed, lost="reduce", fixed=fixed)


@rule("unfold")
def unfold(call: Call) -> Outcome:
    """Windows of ``dim`` as a new last dim, one where the dim was."""
    (dim,) = dims_of(call, call["dimension"])
    shape = call.shape(call.main)
    size, step = call["size"], call["step"]
    taken = window(dim, shape[dim], call.results[0][dim], size, step, 0, 1)
    before = [(k, s) for k, s in enumerate(shape)]
    dims = [*before[:dim], *taken.before, *before[dim + 1 :]]
    tiled = len(taken.before) == 2
    names: list[Label] = [*range(len(shape)), ("r", dim) if tiled else "tap"]
    names[dim] = taken.after[0][0]
    source = Term(call.main, [label for label, _ in dims], tuple(s for _, s in dims))
    return combine(call, [source], [names], lost="convolve", fixed=[("r", dim)])


@rule("im2col")
def im2col(call: Call) -> Outcome:
    """``(N, C, H, W) -> (N, C * taps, L)``."""
    *lead, channels, _, _ = shape = call.shape(call.main)
    *_, columns, places = call.results[0]
    taps = quotient(columns, channels) or 0
    names = [*range(len(lead)), "c"]
    target = Term(None, [*names, "tap", "l"], (*shape[:-2], taps, places))
    return combine(call, [Term(call.main, [*names, "h", "w"])], [target], lost="convolve")


@rule("col2im")
def col2im(call: Call) -> Outcome:
    """``(N, C * taps, L) -> (N, C, H, W)``, overlaps added."""
    *lead, columns, places = call.shape(call.main)
    channels = call.results[0][-3]
    names = [*range(len(lead)), "c"]
    source = Term(
        call.main, [*names, "tap", "l"], (*lead, channels, quotient(columns, channels) or 0, places)
    )
    return combine(call, [source], [[*names, "h", "w"]], lost="convolve")


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def grid_sampler(call: Call) -> Outcome:
    """``x[n, c, *s]`` read at ``grid[n, *o, xy]``: ``out[n, c, *o]``."""
    space = range(call.rank(call["input"]) - 2)
    outs = [("out", k) for k in space]
    mixed: dict[Label, MixKind] = {("in", k): "resample" for k in space}
    terms = [
        Term(call["input"], ["n", "c", *mixed]),
        Term(call["grid"], ["n", *outs, "xy"]),
    ]
    return combine(call, terms, [["n", "c", *outs]], mixed)


@rule("affine_grid_generator")
def affine_grid(call: Call) -> Outcome:
    """``theta[n, i, j] -> grid[n, *space, i]``."""
    space = [("out", k) for k in range(len(call.results[0]) - 2)]
    return combine(
        call, [term(call["theta"], "n", "i", "j")], [["n", *space, "i"]], fixed=["n", "i"]
    )
