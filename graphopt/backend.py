"""The Dynamo backend: ``torch.compile(model, backend="graphopt")``, `graphopt.compile(model)`.

Guards, graph breaks and recompilation stay with torch. Each graph is captured, rewritten and
verified on the values of the call that compiled it; one that cannot be captured runs as Dynamo
gave it, and the report says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from graphopt.backend_options import check_options, parsed
from graphopt.backend_runner import Runner
from graphopt.capture_errors import first_line
from graphopt.capture_memory import Memory, memory_of, mode_of, results_memory
from graphopt.dynamo import fake_inputs, program_from_dynamo
from graphopt.emit.chunk_bodies import compile_bodies
from graphopt.emit.deferring import apart
from graphopt.errors import CaptureError, GraphoptError, RecipeError, VerificationError
from graphopt.program import Program
from graphopt.recipe import Options, rewrite_program
from graphopt.recompute import inlined, regrouped, runnable
from graphopt.report.model import Report

Compiled = Callable[..., Any]


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
        graph_module = inlined(graph_module)
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
        runner, notes = self._lower(optimized, memory, graph_module, example_inputs)
        report.notes += notes
        return runner, report

    def _rewrite(self, program: Program) -> tuple[Program, Report]:
        with torch._dynamo.utils.disable_cache_limit(), torch.random.fork_rng(devices=[]):
            return rewrite_program(program, self.options)

    def _as_given(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], reason: str
    ) -> Compiled:
        self.reports.append(Report("graph", notes=[f"left as it is: {reason}"]))
        if self.options.target == "inductor":
            return _inductor(graph_module, example_inputs)
        return runnable(graph_module).forward

    def _lower(
        self,
        program: Program,
        memory: Memory,
        original: fx.GraphModule,
        example_inputs: Sequence[Any],
    ) -> tuple[Compiled, list[str]]:
        """What runs, and notes on how."""
        module, notes = regrouped(program.graph_module), list[str]()
        runner = Runner(program, memory, runnable(module), original.forward)
        if self.options.target == "inductor":
            if self.options.measure:
                notes = compile_bodies(module.graph)
                module.recompile()
            inputs = runner.bind(example_inputs)
            runner.run = apart(module, lambda graph: _inductor(graph, inputs))
        return runner, notes


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


registered: list[Backend] = []
"""What the name ``"graphopt"`` stands for where it is given no options: the last of them."""


def graphopt_backend(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any
) -> Compiled:
    """Entry point of ``torch.compile(backend="graphopt", options={...})``.

    Options are the fields of `graphopt.recipe.Options` (``passes``, ``target``, ``strict``, ...).
    """
    given = options.get("options", options)
    backend = registered[-1] if registered and not given else Backend(parsed(given))
    return backend(graph_module, example_inputs)


def compile_dynamic(model: nn.Module, options: Options, dynamic_shapes: Any = None) -> Any:
    """A twin of the model that is compiled as it is called; ``.reports`` has a report per graph.

    The twin is of the model's own class and shares its parameters, buffers and submodules, so that
    methods which call the model, ``generate()`` above all, run what was compiled. The model itself
    stays as it is.

    Raises:
        RecipeError: an option that needs example inputs was given.
    """
    check_options(options, dynamic_shapes)
    backend = Backend(options)
    twin = copy.copy(model)
    twin._compiled_call_impl = torch.compile(_call_of(twin), backend=backend)
    object.__setattr__(twin, "reports", backend.reports)
    return twin


def _call_of(model: nn.Module) -> Callable[..., Any]:
    """The call of a module as a function that Dynamo does not skip, as it does those of torch."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return model._call_impl(*args, **kwargs)

    return call
