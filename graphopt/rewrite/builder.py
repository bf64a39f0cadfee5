"""Building replacement nodes that are legal by construction.

Every node gets a fake value (shape, dtype, strides) by running its operator on fake tensors, so an
ill-typed rewrite fails here and not in the user's program. Operators on constants alone are folded
at once, in float64, and rounded a single time.
"""

from __future__ import annotations

import copy
import itertools
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

from graphopt.conditions import implied
from graphopt.errors import IllegalRewriteError
from graphopt.program import REGIONS, Program, is_mutating, operator_name, val
from graphopt.rewrite.views import VIEWS, viewed

aten = torch.ops.aten


class Builder:
    """Inserts nodes before ``anchor`` on behalf of ``rule``; `new_nodes` lists them in order.

    With ``folds`` false operators on constants stay operators.
    """

    def __init__(self, program: Program, anchor: fx.Node, rule: str, *, folds: bool = True) -> None:
        self.program, self.anchor, self.rule, self.folds = program, anchor, rule, folds
        self.new_nodes: list[fx.Node] = []
        self.folded: dict[fx.Node, Tensor] = {}
        self.substituted: list[tuple[fx.Node, fx.Node, list[fx.Node]]] = []
        self.fake_mode = program_fake_mode(program)
        self.module: dict[str, Any] | None = None

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Emit ``target(*args, **kwargs)``; returns a node, or a number where all inputs are."""
        nodes = fx_nodes((args, kwargs))
        if not nodes and not isinstance(target, torch._ops.OpOverload):
            return target(*args, **kwargs)
        meta = self._infer(target, args, kwargs)
        if isinstance(meta, int | float | bool):
            return meta
        if self._can_fold(target, nodes, meta):
            return self._fold(target, args, kwargs, meta)
        return self._emit(target, args, kwargs, meta)

    def size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """Extent of a dimension: a number where static, a node where symbolic."""
        extent = val(node).shape[dim]
        return extent if isinstance(extent, int) else self(aten.sym_size.int, node, dim)

    def of_size(self, sizes: Sequence[Any], target: Callable[..., Any], *args: Any) -> fx.Node:
        """Emit a call that decides its sizes by values, as another did: they are known to be
        ``sizes``."""
        if not any(map(has_free_unbacked_symbols, sizes)):
            meta = self._infer(target, args, {})
        else:
            with self.fake_mode:
                meta = val(args[0]).new_empty(sizes)
        return self._emit(target, args, {}, meta)

    def item(self, node: fx.Node, index: int) -> Any:
        """Element of an operator with several outputs."""
        return self(operator.getitem, node, index)

    def zeros(self, like: fx.Node, dim: int) -> Any:
        """A vector of zeros as long as one dimension of ``like``, in its dtype and device."""
        fake = val(like)
        zeros = torch.zeros(fake.shape[dim], dtype=fake.dtype, device=fake.device)
        return self.state(f"{self._base_name(like)}_zeros", zeros)

    def state(
        self, name: str, value: Tensor, of: Sequence[fx.Node] = (), operator: str = ""
    ) -> fx.Node:
        """Add a constant tensor under a name derived from ``name``.

        Args:
            of: state that it was computed from: names that users know it by; operator: by what.
        """
        meta = self.fake_mode.from_tensor(value.detach(), static_shapes=True)
        node = self.program.add_state(name, value, meta, of, operator)
        node.meta["rewritten_by"] = (self.rule,)
        return node

    def on_behalf_of(self, nodes: Sequence[fx.Node]) -> None:
        """From here on nodes belong to the innermost module that made all of ``nodes``."""
        stacks = [list((n.meta.get("nn_module_stack") or {}).items()) for n in nodes]
        levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*stacks, strict=False))
        self.module = dict(level[0] for level in levels)

    def substitute(self, old: fx.Node, new: fx.Node) -> None:
        """Let all readers of ``old`` read ``new`` now: for rewrites whose parts feed each other."""
        readers = old.replace_all_uses_with(new, propagate_meta=False)
        self.substituted.append((old, new, readers))

    def discard(self) -> None:
        """Remove everything built so far (a rewrite that turned out illegal)."""
        for old, new, readers in reversed(self.substituted):
            for reader in readers:
                reader.replace_input_with(new, old)
        self.substituted.clear()
        for node in reversed(self.new_nodes):
            self.program.graph.erase_node(node)
        self.new_nodes.clear()
        self.program.drop_state_of(self.folded)

    def _emit(self, target: Any, args: Any, kwargs: Any, meta: Any) -> fx.Node:
        if is_mutating(target):
            raise IllegalRewriteError(f"{operator_name(target)} writes its input", where=self.rule)
        with self.program.graph.inserting_before(self.anchor):
            node = self.program.graph.call_function(target, args, kwargs)
        node.meta.update({k: v for k, v in self.anchor.meta.items() if k in _INHERITED})
        if self.module is not None:
            node.meta["nn_module_stack"] = dict(self.module)
        node.meta["val"] = meta
        node.meta["rewritten_by"] = (*self.anchor.meta.get("rewritten_by", ()), self.rule)
        self.new_nodes.append(node)
        return node

    def _infer(self, target: Any, args: Any, kwargs: Any) -> Any:
        fakes = fx.node.map_arg((args, kwargs), val)
        return infer(self.fake_mode, target, fakes[0], fakes[1], self.program)

    def _can_fold(self, target: Any, nodes: list[fx.Node], meta: Any) -> bool:
        pure = target is not operator.getitem and isinstance(meta, Tensor)
        return (
            self.folds and bool(nodes) and pure and all(self.program.is_constant(n) for n in nodes)
        )

    def _fold(self, target: Any, args: Any, kwargs: Any, meta: Tensor) -> fx.Node:
        wide = fx.node.map_arg((args, kwargs), self._wide)
        with torch.no_grad():
            exact = target(*wide[0], **{k: _widen_dtype(v) for k, v in wide[1].items()})
        sources = fx_nodes((args, kwargs))
        name = f"{self._base_name(sources[0])}_folded"
        made = exact.to(meta.dtype).contiguous()
        node = self.state(name, made, sources, operator_name(target))
        self.folded[node] = exact
        return node

    def _wide(self, node: fx.Node) -> Tensor:
        tensor = self.folded.get(node)
        tensor = self.program.tensor(node) if tensor is None else tensor
        return tensor.detach().double() if tensor.is_floating_point() else tensor.detach()

    def _base_name(self, node: fx.Node) -> str:
        return _FOLDED.sub("", self.program.target_of(node) or node.name)


def is_folded(name: str) -> bool:
    """Whether a tensor of this name was computed from others when a rewrite folded them."""
    return _FOLDED.search(name) is not None


def infer(
    mode: FakeTensorMode, target: Any, args: Any, kwargs: Any, program: Program | None = None
) -> Any:
    """Run an operator on fake values; no new demand on symbolic sizes may arise.

    What the sizes that calls of ``program`` may have imply is no new demand. Composites are taken
    apart in Python, as the capture takes them apart: some kernels in C++ ask for sizes as numbers,
    and so fix axes that the operator leaves open.

    Raises:
        IllegalRewriteError: the operator does not fit, or holds only for some sizes.
    """
    shape_env = mode.shape_env
    guards = len(shape_env.guards) if shape_env is not None else 0
    known, pending = _known_of_sizes(shape_env), _pending(shape_env)
    fresh = len(pending)
    try:
        with enable_python_dispatcher(), mode, torch.no_grad():
            meta = target(*args, **kwargs)
    except Exception as error:
        _take_back(shape_env, guards, known)
        name = operator_name(target)
        raise IllegalRewriteError(f"{name} does not fit here: {error}") from error
    del pending[fresh:]  # sizes that values decide: no tracer waits for them here
    added = [a for a in _take_back(shape_env, guards, known) if not _is_implied(a, program)]
    if added and target in VIEWS and (made := viewed(*args)) is not None:
        return made
    # Convolutions only ask which layout is faster.
    if added and "conv" not in operator_name(target):
        raise IllegalRewriteError(f"{operator_name(target)} would demand {added[0]} of the inputs")
    return meta


def _is_implied(demand: Any, program: Program | None) -> bool:
    if program is None:
        return False
    return implied(demand, program.range_constraints, [a.text for a in program.assumptions])


_KNOWN = ("replacements", "replacements_slocs", "var_to_range", "divisible", "axioms")
"""What a guard teaches a shape environment, besides the guard itself."""
_ANSWERS = (("fake_tensor_cache", "clear"), ("_inner_evaluate_expr", "cache_clear"))
"""Its caches, and how they are emptied: an answer given again comes without the guard it needs."""


def _pending(shape_env: Any) -> list[Any]:
    return getattr(shape_env, "pending_fresh_unbacked_symbols", [])


def _known_of_sizes(shape_env: Any) -> dict[str, Any]:
    kept = ((name, getattr(shape_env, name, None)) for name in _KNOWN)
    return {name: copy.copy(value) for name, value in kept if value is not None}


def _take_back(shape_env: Any, guards: int, known: dict[str, Any]) -> list[Any]:
    """Forget all guards but the first ``guards`` and what they taught: axes are dynamic again.

    Returns the demands that the kept guards do not make already.
    """
    if shape_env is None or len(shape_env.guards) <= guards:
        return []
    made = {guard.expr for guard in shape_env.guards[:guards]}
    added = [g.expr for g in shape_env.guards[guards:] if g.expr not in made]
    del shape_env.guards[guards:]
    for name, value in known.items():
        setattr(shape_env, name, value)
    for counter in ("_version_counter", "_replacements_version_counter"):
        if hasattr(shape_env, counter):  # values cached for a version are stale
            setattr(shape_env, counter, getattr(shape_env, counter) + 1)
    for name, empty in _ANSWERS:
        getattr(getattr(shape_env, name, None), empty, lambda: None)()
    return added


_FOLDED = re.compile(r"_folded(_\d+)?$")
_INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", REGIONS)


def program_fake_mode(program: Program) -> FakeTensorMode:
    """The fake mode the program was captured under (it knows the symbolic sizes)."""
    fakes = [v for v in map(val, program.graph.nodes) if isinstance(v, Tensor)]
    return detect_fake_mode(fakes) or FakeTensorMode(allow_non_fake_inputs=True)


def fx_nodes(structure: Any) -> list[fx.Node]:
    """Nodes inside nested arguments, in order."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(structure, note)
    return found


def _widen_dtype(value: Any) -> Any:
    floating = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if floating else value
