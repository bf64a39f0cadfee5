"""The Dynamo backend: ``torch.compile(model, backend="graphopt")``, `graphopt.compile(model)`.

Guards, graph breaks and recompilation stay with torch. Each graph is captured, rewritten and
verified on the values of the call that compiled it; one that cannot be captured runs as Dynamo
gave it, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.dynamo import program_from_dynamo
from graphopt.errors import CaptureError, VerificationError
from graphopt.program import OutputKind, Program
from graphopt.recipe import Options, rewrite_program
from graphopt.report.model import Report

Compiled = Callable[..., Any]


class Backend:
    """A Dynamo backend with its own options; ``reports`` holds one report per compiled graph."""

    def __init__(self, options: Options | None = None) -> None:
        self.options = options or Options()
        self.reports: list[Report] = []

    def __call__(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        try:
            program = program_from_dynamo(graph_module, example_inputs)
            optimized, report = self._rewrite(program)
        except CaptureError as error:
            if self.options.strict:
                raise
            return self._as_given(graph_module, example_inputs, error.what)
        self.reports.append(report)
        if not report.verified:
            message = f"{program.name}: the rewritten graph does not verify"
            if self.options.strict:
                raise VerificationError(message)
            report.notes.append(f"{message}; the original graph runs")
            optimized = program
        return self._lower(optimized, example_inputs)

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

    def _lower(self, program: Program, example_inputs: Sequence[Any]) -> Compiled:
        runner = Runner(program)
        if self.options.target == "inductor":
            runner.run = _inductor(program.graph_module, runner.bind(example_inputs))
        return runner


def _inductor(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(graph_module, list(example_inputs))
    return compiled  # type: ignore[no-any-return]


class Runner:
    """Calls a functional graph as Dynamo expects: inputs that were written are written back."""

    def __init__(self, program: Program) -> None:
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
        written = {values[i]: position for i, position in self.updates}
        self.returned = [
            (i, written.get(v) if isinstance(v, fx.Node) else None)
            for i, (v, o) in enumerate(pairs)
            if o.kind is OutputKind.USER
        ]

    def __call__(self, *inputs: Any) -> Any:
        results = self.run(*self.bind(self._protected(inputs)))
        with torch.no_grad():
            for index, position in self.updates:
                inputs[position].copy_(results[index])
        return tuple(results[i] if p is None else inputs[p] for i, p in self.returned)

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


def graphopt_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Compiled:
    """Entry point of ``torch.compile(backend="graphopt", options={...})``.

    Options are the fields of `graphopt.recipe.Options` (``passes``, ``target``, ``strict``, ...).
    """
    return Backend(_parse(options.get("options", options)))(graph_module, example_inputs)


def _parse(options: dict[str, Any]) -> Options:
    from dataclasses import fields

    from graphopt.errors import RecipeError

    known = {f.name for f in fields(Options)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise RecipeError(
            f"unknown backend option {unknown[0]!r}",
            fix=f"valid options: {', '.join(sorted(known))}",
        )
    return Options(**options)


def compile_dynamic(model: nn.Module, options: Options) -> Any:
    """``torch.compile`` with a backend of its own; ``.reports`` lists one report per graph."""
    backend = Backend(options)
    compiled = torch.compile(model, backend=backend)
    object.__setattr__(compiled, "reports", backend.reports)
    return compiled
