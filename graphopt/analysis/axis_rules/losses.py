"""Losses. ``reduction``: 0 keeps a value per element or row, 1 takes the mean, 2 the sum."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.analysis.axis_rules.call import Call, MixKind, Outcome, is_tensor, rule
from graphopt.analysis.axis_rules.labels import Label, Term, combine, term
from graphopt.analysis.axis_rules.pointwise import trailing


def _reduced(
    call: Call, terms: Sequence[Term], kept: Sequence[Label], fixed: Sequence[Label] = ()
) -> Outcome:
    """Names that a reduction takes away mix as ``reduce``."""
    results = [kept if len(shape) == len(kept) else () for shape in call.results]
    mixed: dict[Label, MixKind] = {} if call["reduction"] == 0 else dict.fromkeys(kept, "reduce")
    return combine(call, terms, results, mixed, lost="reduce", fixed=fixed)


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div", "binary_cross_entropy",
      "binary_cross_entropy_with_logits", "soft_margin_loss", "hinge_embedding_loss",
      "margin_ranking_loss", "poisson_nll_loss")  # fmt: skip
def elementwise_loss(call: Call) -> Outcome:
    """Operands broadcast; a value per element, then the reduction."""
    rank = max(call.rank(node) for node in call.tensors)
    terms = [Term(node, trailing(call.rank(node))) for node in call.tensors]
    return _reduced(call, terms, trailing(rank))


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "nll_loss_forward",
      "nll_loss2d_forward")  # fmt: skip
def class_loss(call: Call) -> Outcome:
    """``logits[n, c, *s], target[n, *s]`` (or probabilities ``[n, c, *s]``), ``weight[c]``.

    Rows ``n, *s`` are parallel up to the reduction; classes ``c`` mix. ``(C,)`` is one row.
    """
    rank = call.rank(call["self"])
    rows = ["n", *range(rank - 2)] if rank > 1 else []
    names = [*rows[:1], "c", *rows[1:]]
    soft = call.rank(call["target"]) == rank
    terms = [
        Term(call["self"], names),
        Term(call["target"], names if soft else rows),
        term(call["weight"], "c"),
    ]
    return _reduced(call, terms, rows)


@rule("multi_margin_loss", "multilabel_margin_loss", "cosine_embedding_loss",
      "triplet_margin_loss")  # fmt: skip
def row_loss(call: Call) -> Outcome:
    """Rows ``(*n, c)`` with a target per row or per element: a value per row."""
    rank = max(call.rank(node) for node in call.tensors)
    names: list[Label] = [*range(rank - 1), "c"]
    classes = call.get("weight")
    rows = [node for node in call.tensors if node is not classes]
    terms = [*(Term(node, names[: call.rank(node)]) for node in rows), term(classes, "c")]
    return _reduced(call, terms, names[:-1])


@rule("ctc_loss.IntList", "ctc_loss.Tensor")
def ctc_loss(call: Call) -> Outcome:
    """``log_probs[t, n, c], targets[n, l]``: a value per sequence (Graves et al. 2006).

    Targets may also lie one after another, ``(sum of lengths,)``, which mixes.
    """
    batched = call.rank(call["log_probs"]) == 3
    b = ["n"] if batched else []
    terms = [Term(call["log_probs"], ["t", *b, "c"])]
    terms.append(Term(call["targets"], [*b, "l"][-call.rank(call["targets"]) :]))
    lengths = [call["input_lengths"], call["target_lengths"]]
    tensors = [value for value in lengths if is_tensor(value)]
    terms += [Term(node, b) for node in tensors]
    return _reduced(call, terms, b, fixed=() if tensors else b)
