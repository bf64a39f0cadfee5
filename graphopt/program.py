"""The one IR: an FX graph in functional ATen with composites kept, and the signature around it.

Every tensor the model owns is an input of the graph (a *state* placeholder), so a program is a pure
function from state and user inputs to user outputs and updated buffers::

    (mutated buffers..., user outputs...) = program(state..., user inputs...)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, fx

from graphopt.errors import IllegalRewriteError
from graphopt.signature import (
    Assumption,
    CallSpec,
    InputKind,
    OutputKind,
    ProgramInput,
    ProgramOutput,
)

REGIONS = "checkpoint_regions"
"""Where a node's ``meta`` holds the regions of activation checkpointing that it is in, outermost
first."""

if TYPE_CHECKING:
    import networkx as nx


class Origin(NamedTuple):
    """What a tensor was computed from.

    Attributes:
        operator: that made it, if one did.
        sources: names of state in its order, which may be made themselves.
        tensors: the tensors of the model behind them: their names, and their shapes.
    """

    operator: str
    sources: tuple[str, ...]
    tensors: Mapping[str, torch.Size]


@dataclass
class Program:
    """A graph with its signature and state.

    Attributes:
        graph_module: the graph.
        inputs: one entry per placeholder, by node name; the graph holds their order.
        outputs: one entry per value of the output node.
        state: fully qualified name -> tensor. Names that share one tensor object are tied.
        call: flattening of user inputs and outputs; ``None`` for Dynamo programs (already flat).
        frozen: parameter values are constants and may be folded into others. False where the model
            trains or parameters may be replaced behind the program's back.
        training: the model was captured in training mode.
        example_inputs: flat user inputs of the capture, in placeholder order.
        range_constraints: symbol -> allowed sizes; 1 is among them unless the model excludes it.
        name: what reports call this program.
        assumptions: further conditions on sizes that every call must meet.
        axis_names: symbol -> the name under which the user declared the axis.
        notes: sentences about the capture that a user should read.
        relied: names of state whose values the rewrites so far have used.
        read: names of state whose values were looked at since this was last cleared.
        origins: name of state that a rewrite made -> what it was computed from; also of tensors
            that were folded further and are gone.
    """

    graph_module: fx.GraphModule
    inputs: dict[str, ProgramInput]
    outputs: list[ProgramOutput]
    state: dict[str, Tensor] = field(default_factory=dict)
    call: CallSpec | None = None
    frozen: bool = True
    training: bool = False
    example_inputs: tuple[Any, ...] = ()
    range_constraints: Mapping[Any, Any] = field(default_factory=dict)
    name: str = "model"
    assumptions: tuple[Assumption, ...] = ()
    axis_names: Mapping[Any, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    relied: frozenset[str] = frozenset()
    read: set[str] = field(default_factory=set)
    origins: dict[str, Origin] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    def placeholders(self) -> list[fx.Node]:
        """Placeholder nodes in signature order."""
        return list(self.graph.find_nodes(op="placeholder"))

    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    def input_of(self, node: fx.Node) -> ProgramInput | None:
        """The signature entry of a placeholder; ``None`` for every other node."""
        return self.inputs.get(node.name) if node.op == "placeholder" else None

    def target_of(self, node: fx.Node) -> str | None:
        """Fully qualified name of the tensor behind a state placeholder, else ``None``."""
        entry = self.input_of(node)
        return entry.target if entry else None

    def state_nodes(self) -> dict[fx.Node, str]:
        """State placeholders and the fully qualified names their tensors live at."""
        found = ((n, self.inputs[n.name].target) for n in self.placeholders())
        return {n: target for n, target in found if target is not None}

    def user_inputs(self) -> list[fx.Node]:
        return [n for n in self.placeholders() if self.inputs[n.name].kind is InputKind.USER]

    def results(self) -> tuple[Any, ...]:
        """Arguments of the output node (nodes or constants), one per entry of ``outputs``."""
        values: Any = self.output_node().args[0]
        return tuple(values)

    def user_outputs(self) -> list[Any]:
        """Arguments of the output node that the caller sees, in order (nodes or constants)."""
        pairs = zip(self.results(), self.outputs, strict=True)
        return [value for value, spec in pairs if spec.kind is OutputKind.USER]

    def mutated_state(self) -> frozenset[str]:
        """Names of buffers the program writes; their values are never constants."""
        return frozenset(
            o.target for o in self.outputs if o.kind is OutputKind.BUFFER_MUTATION and o.target
        )

    def aliases(self) -> dict[str, str]:
        """Tied names: every state name mapped to the first name that holds the same tensor."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(t), name) for name, t in self.state.items()}

    def differentiable(self) -> frozenset[str]:
        """Names of placeholders that gradients are asked of: parameters and floating user inputs.

        Dynamo programs say by the example values which of their inputs those are.
        """
        given = iter(self.example_inputs)
        found = set()
        for node in self.placeholders():
            entry = self.inputs[node.name]
            if entry.kind is InputKind.USER:
                wanted = _takes_gradient(next(given, None), flat=self.call is None)
            else:
                owned = self.state[entry.target or ""]
                wanted = entry.kind is InputKind.PARAMETER and owned.requires_grad
            found |= {node.name} if wanted else set()
        return frozenset(found)

    def weights(self) -> frozenset[fx.Node]:
        """Tensors the model owns: state, and parameters that Dynamo lifted to inputs."""
        lifted = zip(self.user_inputs(), self.example_inputs, strict=False)
        parameters = (n for n, v in lifted if isinstance(v, torch.nn.Parameter))
        return frozenset((*self.state_nodes(), *parameters))

    def is_constant(self, node: fx.Node) -> bool:
        """Whether the node is state whose value cannot change between calls."""
        entry = self.input_of(node)
        if entry is None or entry.target is None or entry.target in self.mutated_state():
            return False
        return self.frozen or entry.kind is InputKind.CONSTANT

    def tensor(self, node: fx.Node) -> Tensor:
        """The tensor behind a state placeholder; noted as read, as a rewrite may depend on it."""
        entry = self.input_of(node)
        if entry is None or entry.target is None:
            raise IllegalRewriteError(f"{node.name} is not state of {self.name}")
        self.read.add(entry.target)
        return self.state[entry.target]

    def sources(self, node: fx.Node) -> Mapping[str, torch.Size]:
        """The tensors of the model behind a state placeholder: names, tied ones too, and shapes."""
        target = self.target_of(node)
        if target is None:
            return {}
        if target in self.origins:
            return self.origins[target].tensors
        held = self.state[target]
        return {name: held.shape for name, tensor in self.state.items() if tensor is held}

    def weight_names(self, node: fx.Node) -> list[str]:
        """Names of the weights that a state placeholder is, or was computed from, in order.

        Tied weights have several, and so have projections that were merged. Vectors that were
        folded into a weight, such as the scale of a norm, lend it no name.
        """
        own, sources = self.target_of(node), self.sources(node)
        named = [name for name, shape in sources.items() if len(shape) > 1 or name == own]
        return named or [own or node.name]

    def add_state(
        self,
        name: str,
        value: Tensor,
        meta: Any,
        of: Sequence[fx.Node] = (),
        operator: str = "",
    ) -> fx.Node:
        """Add a tensor under ``name`` (made unique) and return its placeholder.

        Args:
            of: state that it was computed from; operator: by what.
        """
        unique, count = name, 1
        while unique in self.state or unique in self.origins:
            unique, count = f"{name}_{count}", count + 1
        kind = InputKind.PARAMETER if isinstance(value, torch.nn.Parameter) else InputKind.CONSTANT
        with self.graph.inserting_before():
            node = self.graph.placeholder("s_" + unique.replace(".", "_"))
        node.meta["val"] = meta
        if of:
            tensors = {k: v for source in of for k, v in self.sources(source).items()}
            names = tuple(self.target_of(source) or source.name for source in of)
            self.origins[unique] = Origin(operator, names, tensors)
        self.state[unique] = value
        self.inputs[node.name] = ProgramInput(node.name, kind, unique)
        return node

    def drop_unused_state(self) -> list[str]:
        """Remove state placeholders without users; returns the names whose tensors are gone.

        A buffer that is only written stays, and so does a tied name whose tensor is still read.
        """
        written = self.mutated_state()
        nodes = self.state_nodes()
        unused = {n: t for n, t in nodes.items() if not n.users and t not in written}
        if not unused:
            return []
        read = {id(self.state[t]) for n, t in nodes.items() if n not in unused}
        dead = {id(self.state[t]) for t in unused.values()} - read
        self._erase(unused)
        removed = [t for t, value in self.state.items() if id(value) in dead]
        for target in removed:
            del self.state[target]
        return removed

    def drop_state_of(self, nodes: Iterable[fx.Node]) -> None:
        """Remove those of the given state placeholders that nothing reads, and their tensors."""
        for node in [n for n in nodes if not n.users]:
            name = self.inputs[node.name].target or ""
            del self.state[name]
            self.origins.pop(name, None)
            self._erase([node])

    def _erase(self, placeholders: Iterable[fx.Node]) -> None:
        for node in placeholders:
            self.graph.erase_node(node)
            del self.inputs[node.name]

    def recompile(self) -> Program:
        self.graph_module.recompile()
        return self

    def copy(self) -> Program:
        """An independent graph over the same tensors."""
        twin = fx.GraphModule(self.graph_module, copy_graph(self.graph))
        return replace(
            self,
            graph_module=twin,
            inputs=dict(self.inputs),
            outputs=list(self.outputs),
            state=dict(self.state),
            notes=list(self.notes),
            read=set(),
            origins=dict(self.origins),
        )

    def run(
        self, user_inputs: Sequence[Any], state: Mapping[str, Tensor] | None = None
    ) -> list[Any]:
        """Execute on flat user inputs; returns every output (mutated buffers first).

        ``state`` stands in for the program's own tensors (a float64 copy, for example).
        """
        tensors = self.state if state is None else state
        given = iter(user_inputs)
        targets = (self.inputs[n.name].target for n in self.placeholders())
        flat = [next(given) if t is None else tensors[t] for t in targets]
        return list(self.graph_module(*flat))

    def flow(self) -> nx.DiGraph[fx.Node]:
        """The graph as a ``networkx.DiGraph``, for questions about regions."""
        from graphopt.analysis.flow import flow

        return flow(self.graph)

    def lint(self) -> None:
        """Raise `IllegalRewriteError` where this is not a legal functional program."""
        self.graph.lint()
        names = {n.name for n in self.placeholders()}
        if odd := names ^ self.inputs.keys():
            raise IllegalRewriteError("placeholders and signature disagree", where=str(sorted(odd)))
        if len(self.results()) != len(self.outputs):
            raise IllegalRewriteError("output node and signature disagree")
        for node in self.graph.nodes:
            if is_mutating(node.target):
                raise IllegalRewriteError(f"{node.target} writes its input", where=node.name)

    def __str__(self) -> str:
        from graphopt.printer import to_python

        return to_python(self)


def _takes_gradient(value: Any, *, flat: bool) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return value.requires_grad if flat else True


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A deep copy whose nodes keep their names; fx would rename one called like a builtin."""
    twin = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, twin.nodes, strict=True):
        if new.name != old.name:
            new.name = old.name
    return twin


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum(t.nbytes for t in {id(t): t for t in tensors}.values())


def is_mutating(target: Any) -> bool:
    """Whether an operator writes one of its arguments."""
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def is_random(node: fx.Node) -> bool:
    """Whether the node draws from a random generator."""
    tags = getattr(node.target, "tags", ())
    return node.op == "call_function" and torch.Tag.nondeterministic_seeded in tags


def compute_nodes(graph: fx.Graph) -> Iterator[fx.Node]:
    """Nodes that compute: neither placeholders nor the output."""
    return (n for n in graph.nodes if n.op not in ("placeholder", "output"))


def val(node: Any) -> Any:
    """Fake value of a node (shape, dtype, strides); other arguments are returned as they are."""
    return node.meta.get("val") if isinstance(node, fx.Node) else node


def operator_name(target: Callable[..., Any] | str) -> str:
    """``aten.linear`` for ``torch.ops.aten.linear.default``."""
    if isinstance(target, torch._ops.OpOverload):
        overload = target._overloadname
        base = f"{target.namespace}.{target._schema.name.split('::')[1]}"
        return base if overload == "default" else f"{base}.{overload}"
    return getattr(target, "__name__", str(target))
