"""A program as an ordinary ``nn.Module``: original parameter names, original call signature."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from graphopt.emit.folded import FoldedWeights
from graphopt.emit.guards import CallBinder, InputGuard
from graphopt.emit.memory import Write, store
from graphopt.errors import GraphoptError
from graphopt.memory import overlapping
from graphopt.program import Program
from graphopt.report.model import Report
from graphopt.rewrite.builder import is_folded
from graphopt.signature import InputKind, OutputKind

_USER = OutputKind.USER


class OptimizedModule(nn.Module):
    """The emitted module.

    Captured in eval mode, it takes its weights as constants: gradients reach its inputs, not its
    weights. Buffers that it updates are written in place, so the original sees the updates.

    State stands in the original hierarchy, so ``state_dict`` keys are those of the original where
    a tensor was not rewritten. A tensor that was folded has a name of its own, so that loading an
    original checkpoint into a folded model fails instead of undoing the fold. A call after the
    original's own tensor was written in place fails too, where that tensor was folded; where it was
    not, both modules hold it and both see the write.

    Args:
        original: the program before it was rewritten.

    Attributes:
        program: the rewritten program.
        report: what was applied, missed and proved.
    """

    program: Program
    report: Report

    def __init__(self, program: Program, report: Report, original: Program | None = None) -> None:
        super().__init__()
        object.__setattr__(self, "program", program)
        object.__setattr__(self, "report", report)
        self._register_state(program)
        self.training = program.training
        self._graph = _Graph(program)
        self._binder = CallBinder(program)
        self._guard = InputGuard(program)
        self._folded = FoldedWeights(original, program)
        rules = {applied.rule for applied in report.applied}
        self._recognised = program.frozen and "RecognizeAttention" in rules
        self._laid: frozenset[str] = frozenset()
        self._lowered: dict[str, Any] = {}

    def _register_state(self, program: Program) -> None:
        kinds = {e.target: e for e in program.inputs.values() if e.target is not None}
        for name, tensor in program.state.items():
            entry = kinds.get(name)
            holder, leaf = _holder(self, name)
            if isinstance(tensor, nn.Parameter):
                holder.register_parameter(leaf, tensor)
            else:
                kept = entry is None or (entry.kind is not InputKind.CONSTANT and entry.persistent)
                made = is_folded(name)
                holder.register_buffer(leaf, tensor, persistent=kept or made)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call as the captured module was called."""
        flat = self._binder(args, kwargs)
        self._guard(flat)
        self._keep_apart(flat)
        self._folded()
        with self._attention(flat):
            results = self._graph(*self._arguments(flat))
        return self._finish(results, flat)

    def _attention(self, flat: list[Any]) -> AbstractContextManager[None]:
        """Unfused where gradients of inputs are recorded and the model had written it out.

        Fused kernels have no second derivative, and wrong first ones in rows that a finite mask
        hides; the memory they save was never saved by the model.
        """
        if self._recognised and _recording(flat):
            return sdpa_kernel(SDPBackend.MATH)
        return nullcontext()

    def _arguments(self, flat: list[Any]) -> list[Any]:
        given, recording = iter(flat), torch.is_grad_enabled()
        return [
            next(given) if target is None else self._state(target, recording)
            for target in self._graph.targets
        ]

    def _keep_apart(self, flat: list[Any]) -> None:
        """Refuse an input that is written and shares memory with another one."""
        written = {self._graph.positions[name]: name for name in self._graph.written}
        if written and (shared := overlapping(flat, written)) is not None:
            raise GraphoptError(
                f"{written[shared]} is written in place and shares memory with another input",
                fix="pass a copy of one of them",
            )

    def _state(self, name: str, recording: bool) -> Tensor:
        """A tensor of the module as the graph takes it.

        What autograd may save is not the buffer itself, which is written after the graph has run.
        """
        tensor = _get(self, name)
        if recording and name in self._graph.updated:
            return tensor.detach().clone()
        return tensor.detach() if recording and self.program.frozen else tensor

    def _finish(self, results: tuple[Any, ...], flat: list[Any]) -> Any:
        """Write updated buffers and inputs, after the graph has run, then rebuild the outputs."""
        given: list[Write] = []
        buffers: dict[str, Write] = {}
        for value, (kind, target) in zip(results, self._graph.outputs, strict=True):
            if kind is OutputKind.BUFFER_MUTATION:
                buffers[target] = (value, _get(self, target))
            elif kind is OutputKind.INPUT_MUTATION:
                given.append((value, flat[self._graph.positions[target]]))
        pairs = zip(results, self._graph.outputs, strict=True)
        user = [(value, buffers.get(name)) for value, (kind, name) in pairs if kind is _USER]
        outputs = [value for value, _ in user]
        if given or buffers:
            outputs = store(given, list(buffers.values()), user)
        call = self.program.call
        return outputs if call is None else pytree.tree_unflatten(outputs, call.out_spec)

    def add_fast_path(self, code: Callable[..., Any]) -> None:
        """Run ``code`` instead of the graph wherever neither gradients nor autocast are on."""
        object.__setattr__(self._graph, "fast", code)

    def lay_out(self, executed: Program, laid: Collection[str]) -> None:
        """Run a twin of the program that reads codes in the layout `int4pack` of this machine.

        ``executed`` holds them under the names ``laid``, which the plain ones have. These are given
        up: what leaves the module (`current_program`) is plain again.
        """
        for name in {*executed.state} - {*self.program.state}:
            holder, leaf = _holder(self, name)
            holder.register_buffer(leaf, executed.state[name], persistent=False)
        for name in laid:
            holder, leaf = _holder(self, name)
            holder._buffers[leaf] = executed.state[name]
            self.program.state[name] = executed.state[name].to("meta")
        self._laid, self._graph = frozenset(laid), _Graph(executed)

    def current_program(self) -> Program:
        """The program over the tensors the module holds now, in the layouts that files have."""
        from graphopt.kernels.quantized.int4pack import unpack

        twin = self.program.copy()
        for name in twin.state:
            held = _get(self, name)
            twin.state[name] = unpack(held) if name in self._laid else held
        return twin

    def train(self, mode: bool = True) -> OptimizedModule:
        """Stay in the captured mode; a program cannot change between training and evaluation."""
        if mode != self.program.training:
            wanted, captured = ("training", "eval") if mode else ("eval", "training")
            raise GraphoptError(
                f"this module was captured in {captured} mode and cannot switch to {wanted} mode",
                fix=f"call .{'train' if mode else 'eval'}() on the original, then compile it again",
            )
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OptimizedModule:
        """Stay in the captured dtypes and on the captured devices: the graph was made for them."""
        for dtype, device in {(t.dtype, t.device) for t in self.state_dict().values()}:
            made = fn(torch.empty(0, dtype=dtype, device=device))
            if (made.dtype, made.device) != (dtype, device):
                raise GraphoptError(
                    f"this module was captured in {dtype} on {device} and cannot become "
                    f"{made.dtype} on {made.device}",
                    fix="convert or move the original, then compile it again",
                )
        return super()._apply(fn, recurse)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled as the bytes of its ``.pt2``: graphs lose their shapes in a pickle.

        Regions in ONNX Runtime are made again when it is loaded, as ``_lowered`` says.
        """
        from graphopt.artifact import save

        with tempfile.TemporaryDirectory() as folder:
            data = save(self, Path(folder) / "module.pt2").read_bytes()
        return _unpickled, (data, self._lowered)

    def __copy__(self) -> OptimizedModule:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def extra_repr(self) -> str:
        kept = len(self.report.applied)
        return f"{self.program.name}: {kept} rewrites, verified={self.report.verified}"


def _unpickled(data: bytes, options: Mapping[str, Any] | None = None) -> OptimizedModule:
    from graphopt.artifact import load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.pt2"
        path.write_bytes(data)
        return load(path, **(options or {}))


class _Graph(nn.Module):
    """The generated code, with where each placeholder's value comes from and each output goes."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        nodes = program.placeholders()
        self.targets = [program.inputs[n.name].target for n in nodes]
        names = [n.name for n in nodes if program.inputs[n.name].target is None]
        self.positions = {name: i for i, name in enumerate(names)}
        self.outputs = [(o.kind, o.target or "") for o in program.outputs]
        self.updated = {t for kind, t in self.outputs if kind is OutputKind.BUFFER_MUTATION}
        self.written = [t for kind, t in self.outputs if kind is OutputKind.INPUT_MUTATION]
        self.code: Callable[..., Any] = fx.GraphModule(program.graph_module, program.graph)
        self.fast: Callable[..., Any] | None = None

    def forward(self, *flat: Any) -> Any:
        if self.fast is not None and _is_plain(flat):
            return self.fast(*flat)
        return self.code(*flat)


def _is_plain(flat: tuple[Any, ...]) -> bool:
    """Whether neither gradients nor other precisions nor another tracer are asked for."""
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    if torch._C._are_functorch_transforms_active():
        return False
    return not _recording(flat)


def _recording(flat: Iterable[Any]) -> bool:
    """Whether autograd records what is computed from these values."""
    return torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in flat)


def _holder(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The submodule that holds ``name`` (created on the way) and the attribute's own name."""
    *path, leaf = name.split(".")
    for part in path:
        child = root._modules.get(part)
        if child is None:
            child = nn.Module()
            root.add_module(part, child)
        root = child
    return root, leaf


def _get(root: nn.Module, name: str) -> Tensor:
    *path, leaf = name.split(".")
    for part in path:
        root = root._modules[part]  # type: ignore[assignment]
    found = root._parameters.get(leaf)
    return found if found is not None else root._buffers[leaf]  # type: ignore[return-value]
