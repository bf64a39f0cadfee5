"""Operations along chosen dims: reductions, softmax, scans, sorts."""

from __future__ import annotations

from graphopt.analysis.axis_rules.call import Call, MixKind, Outcome, rule
from graphopt.analysis.axis_rules.labels import Label, Term, combine
from graphopt.analysis.axis_rules.pointwise import trailing
from graphopt.analysis.axis_rules.views import dims_of


def along(call: Call) -> tuple[int, ...]:
    """The dims that the call names; all of them where it names none."""
    dims = call.get("dim", "dims")
    if dims is None or dims == []:
        return tuple(range(call.rank(call.main)))
    return dims_of(call, dims)


@rule("sum", "sum.dim_IntList", "nansum", "mean", "mean.dim", "nanmean", "prod", "prod.dim_int",
      "amax", "amin", "aminmax", "max", "max.dim", "min", "min.dim", "argmax", "argmin",
      "logsumexp", "norm.Scalar", "norm.ScalarOpt_dim", "norm.ScalarOpt_dim_dtype",
      "norm.ScalarOpt_dtype", "linalg_vector_norm", "frobenius_norm.dim", "var", "var.dim",
      "var.correction", "std", "std.dim", "std.correction", "var_mean", "var_mean.dim",
      "var_mean.correction", "std_mean", "std_mean.dim", "std_mean.correction", "any", "any.dim",
      "any.dims", "all", "all.dim", "all.dims", "count_nonzero", "count_nonzero.dim_IntList",
      "median", "median.dim", "nanmedian", "nanmedian.dim", "mode", "kthvalue", "quantile.scalar",
      "nanquantile.scalar")  # fmt: skip
def reduce(call: Call) -> Outcome:
    names = [*range(call.rank(call.main))]
    gone = along(call)
    keep = len(call.results[0]) == len(names)
    kept = [None if dim in gone else dim for dim in names if keep or dim not in gone]
    return combine(call, [Term(call.main, names)], [kept] * len(call.results), lost="reduce")


@rule("softmax.int", "log_softmax.int", "_softmax", "_log_softmax", "_safe_softmax",
      "special_softmax", "special_log_softmax")  # fmt: skip
def softmax(call: Call) -> Outcome:
    return in_place(call, "softmax")


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def scan(call: Call) -> Outcome:
    return in_place(call, "scan")


@rule("cosine_similarity", "pairwise_distance")
def similarity(call: Call) -> Outcome:
    """Two tensors broadcast, one dim of them contracted; ``pairwise_distance`` takes the last."""
    nodes = [call["x1"], call["x2"]]
    rank = max(call.rank(node) for node in nodes)
    dim = call.get("dim", default=-1) % rank
    terms = [Term(node, range(rank - call.rank(node), rank)) for node in nodes]
    keep = len(call.results[0]) == rank
    kept = [None if k == dim else k for k in range(rank) if keep or k != dim]
    return combine(call, terms, [kept])


@rule("renorm")
def renorm(call: Call) -> Outcome:
    """Each sub-tensor along ``dim`` scaled to a norm taken over all other dims."""
    names = [*range(call.rank(call.main))]
    others: dict[Label, MixKind] = {k: "normalise" for k in names if k not in along(call)}
    return combine(call, [Term(call.main, names)], [names], others)


def in_place(call: Call, kind: MixKind) -> Outcome:
    """Mixes along the named dims and leaves the shape as it is."""
    names = [*range(call.rank(call.main))]
    mixed: dict[Label, MixKind] = dict.fromkeys(along(call), kind)
    return combine(call, [Term(call.main, names)], [names] * len(call.results), mixed)


@rule("sort", "sort.stable", "argsort", "argsort.stable", "msort", "topk", "multinomial")
def sort(call: Call) -> Outcome:
    """One dim (the last, or of ``msort`` the first) comes out in an order that values decide."""
    (dim,) = dims_of(call, call.get("dim", default=0 if "msort" in call.op else -1))
    random = "multinomial" in call.op
    return _replaced(call, (dim,), "sort", random=random)


@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2",
      "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn",
      "fft_irfftn")  # fmt: skip
def fourier(call: Call) -> Outcome:
    return _replaced(call, along(call), "contract")


def _replaced(call: Call, dims: tuple[int, ...], kind: MixKind, *, random: bool = False) -> Outcome:
    names = [*range(call.rank(call.main))]
    out = [("out", k) if k in dims else k for k in names]
    source = Term(call.main, names)
    return combine(call, [source], [out] * len(call.results), lost=kind, random=random)


@rule("diff")
def diff(call: Call) -> Outcome:
    """Differences of neighbours along ``dim``, the tensor extended at both ends first."""
    names = [*range(call.rank(call.main))]
    (dim,) = dims_of(call, call["dim"])
    terms = [
        Term(call[name], [(name, k) if k == dim else k for k in names])
        for name in ("self", "prepend", "append")
    ]
    return combine(call, terms, [["out" if k == dim else k for k in names]], lost="convolve")


@rule("glu")
def glu(call: Call) -> Outcome:
    """``a * sigmoid(b)`` for the two halves of ``dim``."""
    (dim,) = dims_of(call, call["dim"])
    shape = call.shape(call.main)
    names = [*range(len(shape))]
    halves = (*shape[:dim], 2, call.results[0][dim], *shape[dim + 1 :])
    source = Term(call.main, [*names[:dim], "half", dim, *names[dim + 1 :]], halves)
    return combine(call, [source], [names], fixed=[dim])


@rule("nonzero", "nonzero_numpy", "nonzero_static", "masked_select", "_unique", "_unique2",
      "unique_dim", "unique_consecutive")  # fmt: skip
def selected(call: Call) -> Outcome:
    """Values decide which positions remain."""
    return _everything(call, "reindex")


@rule("histc", "bincount", "trace", "dist", "pdist", "equal", "allclose", "item",
      "_local_scalar_dense", "is_nonzero")  # fmt: skip
def combined(call: Call) -> Outcome:
    """All positions together."""
    return _everything(call, "reduce")


def _everything(call: Call, kind: MixKind) -> Outcome:
    terms = [Term(node, [("in", k) for k in trailing(call.rank(node))]) for node in call.tensors]
    return combine(call, terms, [[None] * len(shape) for shape in call.results], lost=kind)
