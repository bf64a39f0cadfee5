"""Reading by index: gather, index_select, embedding, advanced indexing.

Along the indexed dim the data decide which position is read, so an axis that lives there is lost
(``reindex``); the axis of the index tensor runs on.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from graphopt.analysis.axis_rules.call import Call, MixKind, Outcome, is_tensor, rule
from graphopt.analysis.axis_rules.cut import narrow
from graphopt.analysis.axis_rules.labels import Label, Term, combine, term
from graphopt.analysis.axis_rules.placement import Placement
from graphopt.analysis.axis_rules.sizes import Shape
from graphopt.analysis.axis_rules.views import dims_of


@rule("gather", "take_along_dim")
def gather(call: Call) -> Outcome:
    """``out[i, j, k] = self[i, index[i, j, k], k]``; ``gather`` may read a prefix of other dims."""
    index = call.get("index", "indices")
    if call["dim"] is None:
        return _taken(call, index)
    (dim,) = dims_of(call, call["dim"])
    names = [*range(call.rank(call.main))]
    source = [("in", k) if k == dim else k for k in names]
    terms = [prefix(call, call.main, source, call.results[0]), Term(index, names)]
    return combine(call, terms, [names], lost="reindex", fixed=_shorter(call, index))


def prefix(call: Call, node: Node, names: Sequence[Label], whole: Shape) -> Term:
    """A tensor of which each dim is read as far as ``whole`` goes."""
    shape = call.shape(node)
    cut = [k for k, name in enumerate(names) if name == k and shape[k] not in (1, whole[k])]

    def change(place: Placement) -> Placement:
        for dim in cut:
            place = narrow(place, dim, 0, whole[dim])
        return place

    return Term(node, names, change=change)


def _shorter(call: Call, index: Node) -> list[Label]:
    pairs = enumerate(zip(call.shape(call.main), call.shape(index), strict=True))
    return [k for k, (size, read) in pairs if size != read]


@rule("take")
def take(call: Call) -> Outcome:
    return _taken(call, call["index"])


def _taken(call: Call, index: Node) -> Outcome:
    """The flattened tensor read at ``index``."""
    names = [*range(call.rank(index))]
    source = Term(call.main, [("in", k) for k in range(call.rank(call.main))])
    return combine(call, [source, Term(index, names)], [names], lost="reindex")


@rule("index_select")
def index_select(call: Call) -> Outcome:
    (dim,) = dims_of(call, call["dim"])
    names: list[Label] = [*range(call.rank(call.main))]
    source = [("in", k) if k == dim else k for k in names]
    return combine(
        call, [Term(call.main, source), term(call["index"], dim)], [names], lost="reindex"
    )


@rule("embedding")
def embedding(call: Call) -> Outcome:
    """``weight[v, d]`` read at ``indices[*b]``: ``out[*b, d]``."""
    rows = [*range(call.rank(call["indices"]))]
    terms = [term(call["weight"], "v", "d"), Term(call["indices"], rows)]
    return combine(call, terms, [[*rows, "d"]], lost="reindex")


@rule("one_hot")
def one_hot(call: Call) -> Outcome:
    """``index[*b] -> out[*b, classes]``; without a number of classes the data decide it."""
    rows = [*range(call.rank(call.main))]
    mixed: dict[Label, MixKind] = dict.fromkeys(rows, "reduce") if call["num_classes"] < 0 else {}
    return combine(call, [Term(call.main, rows)], [[*rows, "classes"]], mixed)


@rule("bucketize.Tensor", "bucketize.Scalar", "isin.Tensor_Tensor", "isin.Tensor_Scalar",
      "isin.Scalar_Tensor")  # fmt: skip
def bucketize(call: Call) -> Outcome:
    """Each element looked up in a table that every element sees whole."""
    elements = call.get("self", "elements", "element")
    table = call.get("boundaries", "test_elements", "test_element")
    names = [*range(len(call.results[0]))]
    terms = [Term(elements if is_tensor(elements) else None, names)]
    if is_tensor(table):
        terms.append(Term(table, [("table", k) for k in range(call.rank(table))]))
    return combine(call, terms, [names])


@rule("searchsorted.Tensor", "searchsorted.Scalar")
def searchsorted(call: Call) -> Outcome:
    """Rows of values looked up in rows of sorted tables, or all of them in one table."""
    table, values = call["sorted_sequence"], call["self"]
    shared = call.rank(table) == 1
    names = [*range(len(call.results[0]))]
    rows: list[Label] = ["table"] if shared else [*range(call.rank(table) - 1), "table"]
    terms = [Term(table, rows), Term(call["sorter"], rows)]
    terms.append(Term(values if is_tensor(values) else None, names))
    return combine(call, terms, [names])


@rule("repeat_interleave.self_Tensor", "repeat_interleave.Tensor")
def repeat_by_data(call: Call) -> Outcome:
    """The data decide how often a position of ``dim`` is repeated, and so where all others go."""
    rank = call.rank(call.main)
    dim = call.get("dim", default=0)
    if dim is None:
        flat = [Term(node, [("in", k) for k in range(call.rank(node))]) for node in call.tensors]
        return combine(call, flat, [["out"]], lost="reindex")
    names = [("in", k) if k == dim % rank else k for k in range(rank)]
    out = [("out", k) if k == dim % rank else k for k in range(rank)]
    terms = [Term(call.main, names), term(call["repeats"], ("in", dim % rank))]
    return combine(call, terms, [out], lost="reindex")
