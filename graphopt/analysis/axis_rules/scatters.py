"""Writing by index: ``self`` stays where it is, what is written goes where the data say."""

from __future__ import annotations

from graphopt.analysis.axis_rules.call import Call, Outcome, is_tensor, rule
from graphopt.analysis.axis_rules.cuts import from_front
from graphopt.analysis.axis_rules.gathers import prefix
from graphopt.analysis.axis_rules.joins import shift
from graphopt.analysis.axis_rules.labels import Label, Term, combine, term
from graphopt.analysis.axis_rules.pointwise import trailing
from graphopt.analysis.axis_rules.sizes import Size, Untrackable
from graphopt.analysis.axis_rules.views import dims_of


@rule("scatter.value", "scatter.src", "scatter.reduce", "scatter.value_reduce", "scatter_add",
      "scatter_reduce.two")  # fmt: skip
def scatter(call: Call) -> Outcome:
    """``out[i, index[i, j, k], k] = src[i, j, k]``; index and source may be shorter."""
    (dim,) = dims_of(call, call["dim"])
    names: list[Label] = [*range(call.rank(call.main))]
    written = [("in", k) if k == dim else k for k in names]
    whole = call.shape(call.main)
    nodes = [node for node in (call["index"], call.get("src")) if is_tensor(node)]
    shorter = [k for node in nodes for k, size in enumerate(call.shape(node)) if size != whole[k]]
    terms = [prefix(call, node, written, whole) for node in nodes]
    fixed = [dim, *shorter]
    return combine(call, [Term(call.main, names), *terms], [names], lost="reindex", fixed=fixed)


@rule("index_add", "index_copy", "index_reduce", "index_fill.int_Scalar", "index_fill.int_Tensor")
def index_write(call: Call) -> Outcome:
    """``out[:, index[j]] = source[:, j]``; ``index_fill`` writes one value."""
    (dim,) = dims_of(call, call["dim"])
    names: list[Label] = [*range(call.rank(call.main))]
    written = [("in", k) if k == dim else k for k in names]
    source = call.get("source", "value")
    terms = [Term(call.main, names), term(call["index"], ("in", dim))]
    if is_tensor(source):
        terms.append(Term(source, written if call.rank(source) else []))
    return combine(call, terms, [names], lost="reindex", fixed=[dim])


@rule("select_scatter")
def select_scatter(call: Call) -> Outcome:
    """``self`` with position ``index`` of ``dim`` replaced by ``src``."""
    (dim,) = dims_of(call, call["dim"])
    shape = call.shape(call.main)
    begin = from_front(call, call["index"], shape[dim])
    return _embedded(call, dim, Term(call["src"], (), (*shape[:dim], 1, *shape[dim + 1 :])), begin)


@rule("slice_scatter")
def slice_scatter(call: Call) -> Outcome:
    """``self`` with a slice of ``dim`` replaced by ``src``."""
    (dim,) = dims_of(call, call["dim"])
    shape = call.shape(call.main)
    if call["step"] != 1 and any(place.on(dim) for place in call.places(call["src"])):
        raise Untrackable("a slice with gaps is written along the axis")
    begin = from_front(call, call["start"], shape[dim])
    return _embedded(call, dim, Term(call["src"], (), call.shape(call["src"])), begin)


def _embedded(call: Call, dim: int, source: Term, begin: Size) -> Outcome:
    names = [*range(call.rank(call.main))]
    total = call.shape(call.main)[dim]
    wholes = [place for place in call.places(call.main) if place.on(dim)]
    change = shift(begin, dim, total, wholes)
    terms = [Term(call.main, names), Term(source.node, names, source.shape, change, own=[dim])]
    return combine(call, terms, [names], fixed=[dim])


@rule("masked_scatter")
def masked_scatter(call: Call) -> Outcome:
    """``out[p]`` is ``self[p]``, or the next unread element of ``source`` where the mask is set."""
    names = trailing(len(call.results[0]))
    mask = [("mask", k) for k in trailing(call.rank(call["mask"]))]
    source = [("source", k) for k in range(call.rank(call["source"]))]
    terms = [
        Term(call.main, trailing(call.rank(call.main))),
        Term(call["mask"], mask),
        Term(call["source"], source),
    ]
    return combine(call, terms, [names], lost="reindex", fixed=names)
