"""What quantization did to each weight, as rows of the report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from torch import Tensor, fx

from graphopt.kernels.quantized.weight import OPERANDS
from graphopt.program import Program, operator_name, tensor_bytes
from graphopt.report.model import MissedRewrite
from graphopt.report.quantized import FloatWeight, QuantizedLayer
from graphopt.rewrite import arguments
from graphopt.rewrite.driver import Rewrite
from graphopt.rewrite.subgraph import Subgraph
from graphopt.signature import InputKind
from graphopt.verify.fidelity import Energy
from graphopt.verify.replay import Verdict

PREFIX = "quantized_"


def layer_of(rewrite: Rewrite, verdict: Verdict) -> QuantizedLayer | None:
    """The row for a rewrite that stores a weight in few bits; ``None`` for every other."""
    calls = _calls(rewrite.after.graph)
    if not calls or not rewrite.weights:
        return None
    names = {inner: name for name, inner in rewrite.after.names.items()}
    before, after = _read(rewrite.before), _read(rewrite.after)
    gone = [t for n, t in before.items() if n not in after]
    made = {n: t for n, t in after.items() if n not in before}
    codes = stored_by(calls)
    given, worst = arguments(calls[0]), _worst(verdict.energies)
    return QuantizedLayer(
        names=rewrite.weights,
        node=names[calls[0]],
        operators=tuple(dict.fromkeys(_kind(call) for call in calls)),
        shape=tuple(max(gone, key=Tensor.numel).shape) if gone else (),
        dtype=given["dtype"],
        bits=given["bits"],
        group_size=given["group_size"],
        symmetric=given["symmetric"],
        activations=_activations(calls),
        bytes_before=tensor_bytes(gone),
        bytes_after=tensor_bytes(made.values()),
        bytes_beside=tensor_bytes(t for n, t in made.items() if n not in codes),
        error=worst.error if worst else None,
        sqnr=worst.sqnr if worst else None,
        cosine=worst.cosine if worst else None,
        seconds_before=verdict.pace.old if verdict.pace else None,
        seconds_after=verdict.pace.new if verdict.pace else None,
        source=rewrite.source,
        note=rewrite.remark,
    )


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [n for n in graph.nodes if getattr(n.target, "_opname", "").startswith(PREFIX)]


def _kind(call: fx.Node) -> str:
    return operator_name(call.target).rpartition(PREFIX)[2]


def _activations(calls: Iterable[fx.Node]) -> str:
    """Look-ups have none, and say nothing of the products beside them."""
    found = [arguments(call).get("activations") for call in calls]
    return next((str(kind) for kind in found if kind is not None), "none")


def _read(piece: Subgraph) -> dict[str, Tensor]:
    """State that a piece reads, by its name in the program."""
    nodes = piece.graph.find_nodes(op="placeholder")
    pairs = zip(piece.inputs, nodes, strict=True)
    return {name: piece.state[name] for name, n in pairs if n.users and name in piece.state}


def new_state(rewrite: Rewrite) -> set[str]:
    """Names of the placeholders of what a rewrite stores."""
    return _read(rewrite.after).keys() - _read(rewrite.before).keys()


def stored_by(calls: Iterable[fx.Node]) -> set[str]:
    """Names of the placeholders that hold the weights of quantized operators."""
    given = (arguments(call).get(name) for call in calls for name in OPERANDS)
    return {str(node.target) for node in given if isinstance(node, fx.Node)}


def _worst(energies: Sequence[Energy]) -> Energy | None:
    return max((e for e in energies if e.count), key=lambda e: e.error, default=None)


def in_order(layers: Iterable[QuantizedLayer], program: Program) -> tuple[QuantizedLayer, ...]:
    """As their operators stand in the graph."""
    order = {node.name: place for place, node in enumerate(program.graph.nodes)}
    return tuple(sorted(layers, key=lambda layer: order.get(layer.node, len(order))))


def float_weights(
    original: Program, program: Program, missed: Sequence[MissedRewrite], held: Collection[str]
) -> Iterator[FloatWeight]:
    """Weights of two axes or more that stayed in floats, and why.

    Those are parameters of the original, or made of them, and what a rule refused as a weight; not
    tables such as masks and positions.

    Args:
        held: names of placeholders that quantized weights are stored as.
    """
    codes = {*held, *stored_by(_calls(program.graph))}
    why = {name: row for row in reversed(missed) for name in row.weights}
    entries = original.inputs.values()
    own = {e.target for e in entries if e.kind is InputKind.PARAMETER} | why.keys()
    seen: set[int] = set()
    for node, target in program.state_nodes().items():
        tensor = program.state[target]
        known = node.name in codes or id(tensor) in seen
        if known or tensor.dim() < 2 or not tensor.is_floating_point() or not tensor.numel():
            continue
        if own.isdisjoint(program.weight_names(node)):
            continue
        seen.add(id(tensor))
        yield _float_weight(program, node, tensor, why)


def _float_weight(
    program: Program, node: fx.Node, tensor: Tensor, why: dict[str, MissedRewrite]
) -> FloatWeight:
    names = tuple(program.weight_names(node))
    row = next((why[name] for name in names if name in why), None)
    reason = row.reason if row is not None else _untouched(node)
    return FloatWeight(
        names=names,
        shape=tuple(tensor.shape),
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=tensor.nbytes,
        reason=reason,
        option=row.option if row is not None else None,
        stage=row.stage if row is not None else "match",
    )


def _untouched(node: fx.Node) -> str:
    """Of a weight that no rule looked at."""
    kinds = dict.fromkeys(operator_name(u.target) for u in node.users if u.op == "call_function")
    if not kinds:
        return "only the caller reads it"
    return f"no rule looks at what {' and '.join(f'`{kind}`' for kind in kinds)} reads"
