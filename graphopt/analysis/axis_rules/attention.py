"""Scaled dot-product attention and recurrent layers, each as one operation."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from graphopt.analysis.axis_rules.call import Call, Outcome, rule
from graphopt.analysis.axis_rules.labels import Label, Term, combine
from graphopt.analysis.axis_rules.pointwise import trailing
from graphopt.analysis.axis_rules.sizes import Shape, Size, Untrackable, quotient


@rule("scaled_dot_product_attention", "_scaled_dot_product_attention_math",
      "_scaled_dot_product_flash_attention_for_cpu", "graphopt::rounded_attention")  # fmt: skip
def attention(call: Call) -> Outcome:
    """``q[*b, l, e], k[*b, s, e], v[*b, s, f], mask[*b, l, s] -> out[*b, l, f]``.

    Queries are parallel, keys and values mix. With grouped heads (Ainslie et al. 2023) head ``h``
    of the queries reads head ``h // group`` of the keys.
    """
    query, key, value = call["query"], call["key"], call["value"]
    group = _group(call, query, key) if call.get("enable_gqa") else 1
    rank = call.rank(query)
    terms = [
        _heads(call, query, ["l", "e"], rank, group, split=True),
        _heads(call, key, ["s", "e"], rank, group),
        _heads(call, value, ["s", "f"], rank, group),
    ]
    if (mask := call.get("attn_mask")) is not None:
        full = call.rank(mask) > 2 and call.shape(mask)[-3] != 1
        terms.append(_heads(call, mask, ["l", "s"], rank, group, split=full))
    ends = [["l", "f"], ["l", "s"] if "math" in call.op else ["l"]]
    results = [
        _named(shape, end, rank, group, split=True)
        for shape, end in zip(call.results, ends, strict=False)
    ]
    return combine(
        call,
        terms,
        results,
        {"s": "softmax"},
        fixed=["l"] * call["is_causal"] + ["f"] * ("flash" in call.op),
        random=call.get("dropout_p", default=0) != 0,
    )


def _group(call: Call, query: Node, key: Node) -> Size:
    group = quotient(call.shape(query)[-3], call.shape(key)[-3])
    if group is None:
        raise Untrackable("the number of query heads is no multiple of that of the key heads")
    return group


def _heads(
    call: Call, node: Node, end: Sequence[Label], rank: int, group: Size, *, split: bool = False
) -> Term:
    named = _named(call.shape(node), end, rank, group, split=split)
    return Term(node, named.labels, named.shape)


def _named(shape: Shape, end: Sequence[Label], rank: int, group: Size, *, split: bool) -> Term:
    """Names of a tensor that ends in ``end`` after its batch dims, the last of which are heads."""
    lead = len(shape) - len(end)
    names: list[Label] = [*trailing(rank - 2)[rank - 2 - lead :], *end]
    if group == 1 or not split or not lead:
        return Term(None, names)
    heads = quotient(shape[lead - 1], group)
    if heads is None:
        raise Untrackable("the heads of the mask do not divide into groups")
    names.insert(lead, "group")
    return Term(None, names, (*shape[: lead - 1], heads, group, *shape[lead:]))


@rule("lstm.input", "gru.input", "rnn_tanh.input", "rnn_relu.input")
def recurrent(call: Call) -> Outcome:
    """``x[t, b, i], state[layers, b, h] -> out[t, b, h], state[layers, b, h]``: a scan over ``t``.

    ``batch_first`` swaps ``t`` and ``b``; without a batch there is no ``b``.
    """
    batched = call.rank(call["input"]) == 3
    b = ["b"] if batched else []
    sequence: list[Label] = [*b, "t"] if call["batch_first"] else ["t", *b]
    hidden = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    terms = [Term(call["input"], [*sequence, "i"])]
    terms += [Term(node, ["layer", *b, "h"]) for node in hidden]
    terms += [_own(call, node) for node in call["params"]]
    states: list[list[Label]] = [["layers", *b, "out"]] * (len(call.results) - 1)
    random = call["dropout"] != 0 and call["train"]
    return combine(call, terms, [[*sequence, "out"], *states], {"t": "scan"}, random=bool(random))


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def recurrent_cell(call: Call) -> Outcome:
    """One step: ``x[b, i], state[b, h] -> state[b, h]``."""
    hidden = call["hx"] if isinstance(call["hx"], (list, tuple)) else [call["hx"]]
    batch: list[Label] = ["b"] if call.rank(call["input"]) == 2 else []
    weights = [call[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    terms = [Term(call["input"], [*batch, "i"]), *(Term(node, [*batch, "h"]) for node in hidden)]
    terms += [_own(call, weight) for weight in weights if weight is not None]
    return combine(call, terms, [[*batch, "out"]] * len(call.results))


def _own(call: Call, weight: Node) -> Term:
    """A weight all of whose dims are contracted or gates."""
    return Term(weight, [(weight.name, k) for k in range(call.rank(weight))])
