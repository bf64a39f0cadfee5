"""Matrix products and other contractions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch.fx import Node

from graphopt.analysis.axis_rules.call import Call, Outcome, rule
from graphopt.analysis.axis_rules.labels import Label, Term, combine, term
from graphopt.analysis.axis_rules.pointwise import trailing
from graphopt.analysis.axis_rules.sizes import Untrackable


@rule("mm", "bmm", "matmul", "linalg_matmul", "mv", "dot", "vdot",
      "_int_mm")  # fmt: skip
def matmul(call: Call) -> Outcome:
    """``a[*b, m, k], w[*b, k, n] -> out[*b, m, n]``; a vector has ``k`` alone."""
    terms, result = _product(call, *call.tensors[:2])
    return combine(call, terms, [result])


@rule("addmm", "baddbmm", "addmv", "_addmm_activation")
def add_matmul(call: Call) -> Outcome:
    """A product plus ``self``, which broadcasts."""
    added, left, right = call.tensors[:3]
    terms, result = _product(call, left, right)
    names = result[len(result) - call.rank(added) :]
    return combine(call, [*terms, Term(added, names)], [result])


def _product(call: Call, left: Node, right: Node) -> tuple[list[Term], list[Label]]:
    batches = trailing(max(call.rank(left), call.rank(right), 2) - 2)
    m = ["m"] if call.rank(left) > 1 else []
    n = ["n"] if call.rank(right) > 1 else []
    ours = batches[len(batches) - max(call.rank(left) - 2, 0) :]
    theirs = batches[len(batches) - max(call.rank(right) - 2, 0) :]
    terms = [Term(left, [*ours, *m, "k"]), Term(right, [*theirs, "k", *n])]
    return terms, [*batches, *m, *n]


@rule("addbmm")
def add_summed_matmul(call: Call) -> Outcome:
    """``self + sum over b of batch1[b, m, k] @ batch2[b, k, n]``."""
    added = Term(call["self"], ["m", "n"][2 - call.rank(call["self"]) :])
    terms = [term(call["batch1"], "b", "m", "k"), term(call["batch2"], "b", "k", "n")]
    return combine(call, [added, *terms], [["m", "n"]])


@rule("linear")
def linear(call: Call) -> Outcome:
    """``input[*b, k], weight[n, k], bias[n] -> out[*b, n]``; a weight ``(k,)`` has no ``n``."""
    weight, rows = call["weight"], [*range(call.rank(call["input"]) - 1)]
    n = ["n"] if call.rank(weight) > 1 else []
    terms = [Term(call["input"], [*rows, "k"]), Term(weight, [*n, "k"]), Term(call["bias"], n)]
    return combine(call, terms, [[*rows, *n]])


@rule("bilinear")
def bilinear(call: Call) -> Outcome:
    """``x[*b, i], y[*b, j], weight[n, i, j], bias[n] -> out[*b, n]``."""
    rows = [*range(call.rank(call["input1"]) - 1)]
    terms = [
        Term(call["input1"], [*rows, "i"]),
        Term(call["input2"], [*rows, "j"]),
        term(call["weight"], "n", "i", "j"),
        term(call["bias"], "n"),
    ]
    return combine(call, terms, [[*rows, "n"]])


@rule("_grouped_mm", "transformers::grouped_mm_fallback")
def grouped_matmul(call: Call) -> Outcome:
    """Rows ``(s, k)`` in groups that end at ``offs``, each group with its weight ``(e, k, n)``."""
    rows, weight, offsets = call.tensors[:3]
    if (call.rank(rows), call.rank(weight)) != (2, 3) or call.get("bias") is not None:
        raise Untrackable("a grouped product other than rows (s, k) by weights (e, k, n)")
    terms = [term(rows, "s", "k"), term(weight, "e", "k", "n"), term(offsets, "offset")]
    return combine(call, terms, [["s", "n"]], fixed=["s"])


@rule("outer", "ger", "addr")
def outer(call: Call) -> Outcome:
    *added, left, right = call.tensors
    terms = [Term(node, ["m", "n"][2 - call.rank(node) :]) for node in added]
    return combine(call, [*terms, term(left, "m"), term(right, "n")], [["m", "n"]])


@rule("inner")
def inner(call: Call) -> Outcome:
    """The last dims contracted, the others side by side."""
    return _tensordot(call, call["self"], call["other"], [-1], [-1])


@rule("tensordot")
def tensordot(call: Call) -> Outcome:
    return _tensordot(call, call["self"], call["other"], call["dims_self"], call["dims_other"])


def _tensordot(
    call: Call, left: Node, right: Node, ours: Sequence[int], theirs: Sequence[int]
) -> Outcome:
    first: list[Label] = [("left", dim) for dim in range(call.rank(left))]
    second: list[Label] = [("right", dim) for dim in range(call.rank(right))]
    for a, b in zip(ours, theirs, strict=True):
        first[a] = second[b] = ("k", a % len(first))
    kept = [name for name in (*first, *second) if name[0] != "k"]  # type: ignore[index]
    return combine(call, [Term(left, first), Term(right, second)], [kept])


@rule("cdist", "_cdist_forward", "_euclidean_dist")
def distances(call: Call) -> Outcome:
    """``x[*b, p, k], y[*b, r, k] -> out[*b, p, r]``."""
    batches = trailing(len(call.results[0]) - 2)
    terms = [
        Term(node, [*batches[len(batches) + 2 - call.rank(node) :], row, "k"])
        for node, row in zip(call.tensors, "pr", strict=True)
    ]
    return combine(call, terms, [[*batches, "p", "r"]])


@rule("linalg_cross", "cross", "linalg_vecdot")
def cross(call: Call) -> Outcome:
    """Vectors along one dim; the cross product keeps the dim, the dot product does not."""
    rank = max(call.rank(node) for node in call.tensors)
    if call["dim"] is None:
        raise Untrackable("a cross product that looks for a dim of size 3 by itself")
    dim, keep = call["dim"] % rank, len(call.results[0]) == rank
    names = [*range(rank)]
    terms = [Term(node, names[rank - call.rank(node) :]) for node in call.tensors]
    out = [("out", k) if k == dim else k for k in names if keep or k != dim]
    return combine(call, terms, [out])


@rule("einsum")
def einsum(call: Call) -> Outcome:
    """The equation itself; without ``->`` the letters that occur once, in order."""
    left, arrow, right = call["equation"].replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow:
        counts = Counter(letter for letter in left if letter.isalpha())
        right = "..." * ("..." in left) + "".join(sorted(c for c in counts if counts[c] == 1))
    nodes, out = call["tensors"], call.results[0]
    terms = [
        Term(node, _letters(text, call.rank(node)))
        for text, node in zip(inputs, nodes, strict=True)
    ]
    repeated = {c for text in inputs for c, n in Counter(text).items() if n > 1 and c.isalpha()}
    return combine(call, terms, [_letters(right, len(out))], fixed=repeated)


def _letters(text: str, rank: int) -> list[Label]:
    before, dots, after = text.partition("...")
    hidden = trailing(rank - len(before) - len(after)) if dots else ()
    return [*before, *hidden, *after]
