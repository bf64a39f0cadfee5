"""The Dynamo backend: ``torch.compile(model, backend="graphopt")``, `graphopt.compile(model)`.

Guards, graph breaks and recompilation stay with torch. Each graph is captured, rewritten and
verified on the values of the call that compiled it; one that cannot be captured runs as Dynamo
gave it, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.capture_errors import first_line
from graphopt.capture_memory import Memory, memory_of, mode_of, overlap, results_memory
from graphopt.dynamo import fake_inputs, program_from_dynamo
from graphopt.errors import CaptureError, GraphoptError, RecipeError, VerificationError
from graphopt.optimize import TARGETS
from graphopt.presets import resolve
from graphopt.program import OutputKind, Program
from graphopt.recipe import Options, rewrite_program
from graphopt.report.model import Report

Compiled = Callable[..., Any]
_AHEAD_OF_TIME = {
    "dynamic_shapes": "; Dynamo keeps sizes dynamic that change between calls",
    "calibration": "; every graph is verified on the values of the call that compiled it",
    "quality": " and measure the compiled model yourself",
    "budget": " and measure the compiled model yourself",
}


class Backend:
    """A Dynamo backend with its own options; ``reports`` holds one report per compiled graph."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        check_options(self.options)
        self.reports: list[Report] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        try:
            with _ordinary_tensors():
                runner, report = self._compiled(graph_module, example_inputs)
        except RecipeError:
            raise
        except Exception as error:
            if self.options.strict:
                raise
            return self._as_given(graph_module, example_inputs, _reason(error))
        self.reports.append(report)
        return runner

    def _compiled(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]
    ) -> tuple[Compiled, Report]:
        program = program_from_dynamo(graph_module, example_inputs)
        memory = memory_of(graph_module, fake_inputs(graph_module)[0])
        optimized, report = self._rewrite(program)
        if not report.verified:
            message = f"{program.name}: the rewritten graph does not verify"
            if self.options.strict:
                raise VerificationError(message)
            report.notes.append(f"{message}; the original graph runs")
            optimized = program
        if memory.shared():
            _require_shared(optimized, memory, fake_inputs(graph_module)[0])
        return self._lower(optimized, memory, graph_module, example_inputs), report

    def _rewrite(self, program: Program) -> tuple[Program, Report]:
        with torch._dynamo.utils.disable_cache_limit(), torch.random.fork_rng(devices=[]):
            return rewrite_program(program, self.options)

    def _as_given(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], reason: str
    ) -> Compiled:
        self.reports.append(Report("graph", notes=[f"left as it is: {reason}"]))
        if self.options.target == "inductor":
            return _inductor(graph_module, example_inputs)
        return graph_module.forward

    def _lower(
        self,
        program: Program,
        memory: Memory,
        original: fx.GraphModule,
        example_inputs: Sequence[Any],
    ) -> Compiled:
        runner = Runner(program, memory, original.forward)
        if self.options.target == "inductor":
            runner.run = _inductor(program.graph_module, runner.bind(example_inputs))
        return runner


@contextmanager
def _ordinary_tensors() -> Iterator[None]:
    """Outside `torch.inference_mode`, whose tensors verification could not train with."""
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


def _reason(error: Exception) -> str:
    """One line of an error, and the user's line where it is known."""
    if isinstance(error, GraphoptError):
        return f"{error.what}{f' (at {error.where})' if error.where else ''}"
    return first_line(error)


def _require_shared(program: Program, memory: Memory, fakes: Sequence[Any]) -> None:
    """Refuse a graph whose results do not share memory as the original's do."""
    given, mode = iter(fakes), mode_of(fakes)
    targets = [program.inputs[n.name].target for n in program.placeholders()]
    inputs = [next(given) if t is None else mode.from_tensor(program.state[t]) for t in targets]
    storages = results_memory(program.graph_module, inputs)[-len(memory.groups) :]
    places: dict[int, Any] = {}
    for group, storage in zip(memory.groups, storages, strict=True):
        if group is not None and places.setdefault(group, storage) != storage:
            raise CaptureError("results share memory in a way that no functional graph keeps")


def _inductor(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph_module, list(example_inputs))
    return compiled  # type: ignore[no-any-return]


class Runner:
    """Calls a functional graph as Dynamo expects.

    Inputs that were written are written back, and results that show their memory do so again. The
    original graph runs where another input shows the memory of a written one, which only the values
    of a call say.
    """

    def __init__(self, program: Program, memory: Memory, original: Compiled) -> None:
        self.memory = memory
        self.original = original
        self.run: Compiled = program.graph_module
        nodes = program.placeholders()
        targets = [program.inputs[n.name].target for n in nodes]
        self.state = [None if t is None else program.state[t] for t in targets]
        names = [n.name for n, t in zip(nodes, targets, strict=True) if t is None]
        values = program.results()
        pairs = list(zip(values, program.outputs, strict=True))
        self.updates = [
            (i, names.index(o.target or ""))
            for i, (_, o) in enumerate(pairs)
            if o.kind is OutputKind.INPUT_MUTATION
        ]
        self.written = frozenset(position for _, position in self.updates)
        self.user = [i for i, (_, o) in enumerate(pairs) if o.kind is OutputKind.USER]

    def __call__(self, *inputs: Any) -> Any:
        if self.written and overlap(inputs, self.written):
            return self.original(*inputs)
        results = self.run(*self.bind(self._protected(inputs)))
        for index, position in self.updates:
            _write(inputs[position], results[index])
        returned = [results[i] for i in self.user]
        return tuple(self.memory.restore(returned, inputs, self.written))

    def bind(self, inputs: Sequence[Any]) -> list[Any]:
        """The graph's arguments: constants that rewrites added stand between the inputs."""
        given = iter(inputs)
        return [next(given) if s is None else s for s in self.state]

    def _protected(self, inputs: Sequence[Any]) -> list[Any]:
        """Copies of inputs that will be written, where autograd may save them for backward."""
        values = list(inputs)
        if torch.is_grad_enabled():
            for _, position in self.updates:
                if isinstance(values[position], Tensor):
                    values[position] = values[position].clone()
        return values


def _write(given: Tensor, value: Tensor) -> None:
    """What eager mode's write leaves behind, the gradient history of the value included.

    A constant ends the history of what it is written into; writes that autograd did not see are
    not here (`memory_of`).
    """
    seen = torch.is_grad_enabled() and given.requires_grad
    with torch.set_grad_enabled(seen or value.requires_grad):
        given.copy_(value)


def graphopt_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Compiled:
    """Entry point of ``torch.compile(backend="graphopt", options={...})``.

    Options are the fields of `graphopt.recipe.Options` (``passes``, ``target``, ``strict``, ...).
    """
    return Backend(_parse(options.get("options", options)))(graph_module, example_inputs)


def _parse(options: dict[str, Any]) -> Options:
    known = {f.name for f in fields(Options)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise RecipeError(
            f"unknown backend option {unknown[0]!r}",
            where="options of torch.compile",
            fix=f"valid options: {', '.join(sorted(known - _AHEAD_OF_TIME.keys()))}",
        )
    return Options(**options)


def check_options(options: Options, dynamic_shapes: Any = None) -> None:
    """Refuse what has no meaning where Dynamo captures graphs as the model is called.

    Raises:
        RecipeError: names the option, and what to do instead.
    """
    if options.target not in TARGETS:
        raise RecipeError(
            f"unknown target {options.target!r}",
            where="option target",
            fix=f"use one of {', '.join(TARGETS)}",
        )
    resolve(options.passes)
    given = {f.name: getattr(options, f.name) != f.default for f in fields(Options)}
    given["dynamic_shapes"] = dynamic_shapes is not None
    for name, fix in _AHEAD_OF_TIME.items():
        if given[name]:
            raise RecipeError(
                f"{name} has no meaning without example_inputs: graphs are captured as the model "
                "is called",
                where=f"option {name}",
                fix=f"pass example_inputs to graphopt.compile, or leave {name} out{fix}",
            )


def compile_dynamic(model: nn.Module, options: Options, dynamic_shapes: Any = None) -> Any:
    """``torch.compile`` with a backend of its own; ``.reports`` lists one report per graph.

    Raises:
        RecipeError: an option that needs example inputs was given.
    """
    check_options(options, dynamic_shapes)
    backend = Backend(options)
    compiled = torch.compile(model, backend=backend)
    object.__setattr__(compiled, "reports", backend.reports)
    return compiled
