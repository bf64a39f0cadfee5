"""Normalisations: the dims that statistics are taken over mix, the others are parallel."""

from __future__ import annotations

from graphopt.analysis.axis_rules.call import Call, MixKind, Outcome, rule
from graphopt.analysis.axis_rules.labels import Label, Labels, Term, combine, term
from graphopt.analysis.axis_rules.sizes import Size, Untrackable, quotient
from graphopt.analysis.axis_rules.views import dims_of


def _normalised(labels: Labels) -> dict[Label, MixKind]:
    return dict.fromkeys(labels, "normalise")


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Outcome:
    """Statistics over the last dims, those of ``normalized_shape``."""
    names = [*range(call.rank(call.main))]
    lead = len(names) - len(call["normalized_shape"])
    affine = [Term(call.get(name), names[lead:]) for name in ("weight", "bias")]
    statistics = [*names[:lead], *[None] * (len(names) - lead)]
    results = [names, *[statistics] * (len(call.results) - 1)]
    return combine(call, [Term(call.main, names), *affine], results, _normalised(names[lead:]))


@rule("group_norm", "native_group_norm")
def group_norm(call: Call) -> Outcome:
    """``(N, (groups, c), *)``: statistics over ``c`` and ``*`` (Wu and He 2018)."""
    shape, groups = call.shape(call.main), call.get("num_groups", "group")
    split = (groups, _whole(quotient(shape[1], groups)))
    space = [*range(len(shape) - 2)]
    names: Labels = ["n", "g", "c", *space]
    virtual = (shape[0], *split, *shape[2:])
    affine = [Term(call[name], ["g", "c"], split) for name in ("weight", "bias")]
    results: list[Term | Labels] = [Term(None, names, virtual)]
    results += [["n", "g"]] * (len(call.results) - 1)
    terms = [Term(call.main, names, virtual), *affine]
    return combine(
        call,
        terms,
        results,
        _normalised(["c", *space]),
        fixed=["g", *(["n"] if call.op == "native_group_norm" else [])],
    )


def _whole(value: Size | None) -> Size:
    if value is None:
        raise Untrackable("the channels do not divide into groups")
    return value


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit.no_stats",
      "_native_batch_norm_legit_functional", "_native_batch_norm_legit_no_training",
      "_batch_norm_with_update_functional", "_batch_norm_no_update")  # fmt: skip
def batch_norm(call: Call) -> Outcome:
    """Per channel; over batch and space in training, by fixed statistics in evaluation."""
    names: list[Label] = ["n", "c", *range(call.rank(call.main) - 2)]
    training = call.get("training", default="with_update" in call.op)
    mixed = _normalised([name for name in names if name != "c"]) if training else {}
    channels = [call.get(name) for name in ("weight", "bias", "running_mean", "running_var")]
    terms = [Term(call.main, names), *(term(node, "c") for node in channels)]
    saved = [None if shape == (0,) else ["c"] for shape in call.results[1:]]
    return combine(call, terms, [names, *saved], mixed)


@rule("instance_norm")
def instance_norm(call: Call) -> Outcome:
    """Per sample and channel, over space."""
    names: list[Label] = ["n", "c", *range(call.rank(call.main) - 2)]
    mixed = _normalised(names[2:]) if call["use_input_stats"] else {}
    channels = [call[name] for name in ("weight", "bias", "running_mean", "running_var")]
    terms = [Term(call.main, names), *(term(node, "c") for node in channels)]
    return combine(call, terms, [names], mixed)


@rule("_weight_norm", "_weight_norm_interface")
def weight_norm(call: Call) -> Outcome:
    """``g * v / |v|``, the norm over all dims of ``v`` but ``dim`` (Salimans and Kingma 2016)."""
    names = [*range(call.rank(call.main))]
    (dim,) = dims_of(call, call["dim"])
    others = [name for name in names if name != dim]
    norms = [name if name == dim else None for name in names]
    results = [names, *[norms] * (len(call.results) - 1)]
    terms = [Term(call["v"], names), Term(call["g"], norms)]
    return combine(call, terms, results, _normalised(others))
