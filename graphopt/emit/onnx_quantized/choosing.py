"""In which form each quantized operator is written: what holds, and of that the fastest.

Forms are tried in ONNX Runtime on what the operator reads when the program runs on its captured
inputs, or a part of it. Operators of one kind take what the first of them was seen to run
fastest, each where its own weight holds to the bound in that form.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.emit.onnx_quantized.alone import Trial, attempt, difference, exact
from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.form import Form
from graphopt.emit.onnx_quantized.forms import forms_of
from graphopt.errors import ExportError
from graphopt.kernels.quantized import linear
from graphopt.kernels.quantized.choice import quartiles
from graphopt.program import Program

ROWS, RESULTS = 2048, 1 << 24
"""Rows of its input and numbers of its result that an operator is tried on, at most."""
SMALLER = 1.5
"""Times as long as the fastest a form may take that keeps the weight small in memory."""


Rounds = Callable[[str], bool]
"""By the name of a weight, whether its product may round activations that it reads as they are."""


def always(_name: str) -> bool:
    return True


@dataclass
class Choice:
    """A form for a call.

    Attributes:
        error: of the form, as `Trial` has it.
        trials: what was tried, what was chosen first.
        rows: of the input it was tried on.
    """

    call: Call
    form: Form
    error: float = 0.0
    trials: list[Trial] = field(default_factory=list)
    rows: int = 0


class FormChooser:
    """Chooses forms of calls, by what each is seen to do on its inputs.

    Args:
        standard: of operators of the ONNX standard alone.
        opset: operator set that forms are for.
        time: choose the fastest, else the first that holds.
        rounds: which products may do that of themselves.
    """

    def __init__(self, *, standard: bool, opset: int, time: bool, rounds: Rounds = always) -> None:
        self.standard, self.opset, self.time, self.rounds = standard, opset, time, rounds
        self.kinds: dict[Any, str] = {}

    def choose(self, call: Call, x: Tensor) -> Choice:
        """A form for a call on float32 ``x (..., K)``, or on indices.

        Raises:
            ExportError: nothing is within the bound.
        """
        own = 0.0
        if call.activations != "none":
            made = linear(x, call.weight, activations=call.activations, static=call.static)
            own = difference(made, exact(call, x))[0]
        forms = forms_of(call, standard=self.standard, opset=self.opset)
        free = call.activations != "none" or self.rounds(call.name)
        forms = [form for form in forms if free or not form.rounds]
        kind = (call.scheme, call.weight.shape, call.activations, call.embedding, x.shape, free)
        if kind in self.kinds:  # what was fastest first; the rest where that does not hold
            forms.sort(key=lambda form: form.name != self.kinds[kind])
            found = _first_that_holds(call, x, forms, self.opset, own)
        else:
            found = self._compare(call, x, forms, own)
        self.kinds.setdefault(kind, found.form.name)
        found.rows = x.numel() if call.embedding else x.shape[:-1].numel()
        return found

    def _compare(self, call: Call, x: Tensor, forms: Sequence[Form], own: float) -> Choice:
        trials: list[Trial] = []
        for tier in sorted({form.tier for form in forms}):
            trials += [attempt(f, call, x, self.opset, own) for f in forms if f.tier == tier]
            if held := [t for t in trials if not t.fault]:
                best = self._fastest(held)
                shown = [best, *(t for t in held if t.form != best.form)]
                shown += [t for t in trials if t.fault]
                return Choice(call, best.form, best.error, [t.released() for t in shown])
        raise _nothing_holds(call, trials)

    def _fastest(self, held: list[Trial]) -> Trial:
        if not self.time or len(held) == 1:
            return held[0]
        seconds = quartiles([trial.run for trial in held])
        held[:] = [trial.timed(s) for trial, s in zip(held, seconds, strict=True)]
        best = min(seconds)
        small = [t for t in held if not t.form.unpacks and (t.seconds or 0) <= SMALLER * best]
        return min(small or held, key=lambda trial: trial.seconds or 0)


class _Chooser(fx.Interpreter):
    """Runs a program, and chooses at each quantized operator."""

    def __init__(
        self,
        program: Program,
        calls: dict[fx.Node, Call],
        forms: FormChooser,
        known: Mapping[str, Choice] | None = None,
    ) -> None:
        super().__init__(program.graph_module)
        self.calls, self.choices = calls, dict[fx.Node, Choice]()
        self.forms, self.known = forms, known or {}

    def run_node(self, n: fx.Node) -> Any:
        call = self.calls.get(n)
        if call is not None and n.name in self.known:
            self.choices[n] = replace(self.known[n.name], call=call)
        elif call is not None:
            given = self.fetch_args_kwargs_from_env(n)[0][0]
            self.choices[n] = self.forms.choose(call, sample(call, given))
        return super().run_node(n)


def _first_that_holds(
    call: Call, x: Tensor, forms: Sequence[Form], opset: int, own: float
) -> Choice:
    trials = []
    for form in forms:
        trials.append(attempt(form, call, x, opset, own))
        if not trials[-1].fault:
            return Choice(call, form, trials[-1].error)
    raise _nothing_holds(call, trials)


def _nothing_holds(call: Call, trials: Sequence[Trial]) -> ExportError:
    tried = "; ".join(map(str, trials))
    return ExportError(
        f"ONNX Runtime computes `{call.name}` in no form within the bound: {tried}",
        where=call.where,
        fix="skip this weight, or take more bits for it",
    )


def sample(call: Call, given: Tensor) -> Tensor:
    """What is tried: a few rows of what the operator reads, or numbers drawn where that is odd."""
    if call.embedding:
        flat = given.reshape(-1)[:ROWS].cpu()
        return (flat if flat.numel() else flat.new_zeros(1)).contiguous()
    rows = max(1, min(ROWS, RESULTS // call.weight.shape[0]))
    flat = given.detach().reshape(-1, call.weight.width)[:rows].to("cpu", torch.float32)
    if not flat.numel() or not flat.isfinite().all() or not flat.any():
        generator = torch.Generator().manual_seed(0)
        flat = torch.randn(max(len(flat), 1), call.weight.width, generator=generator)
    return flat.reshape(*[1] * (max(given.dim(), 2) - 2), *flat.shape).contiguous()


def choose(
    program: Program,
    calls: dict[fx.Node, Call],
    *,
    standard: bool,
    opset: int,
    time: bool,
    rounds: Rounds = always,
    known: Mapping[str, Choice] | None = None,
) -> list[Choice]:
    """A choice for each call, in order; runs the program once.

    Args:
        known: choices by the names of nodes, which are taken as they are.

    Raises:
        ExportError: in no form a call is within its bound, or has no form at all.
    """
    given = iter(program.example_inputs)
    targets = (program.inputs[n.name].target for n in program.placeholders())
    values = [next(given) if t is None else program.state[t] for t in targets]
    forms = FormChooser(standard=standard, opset=opset, time=time, rounds=rounds)
    chooser = _Chooser(program, calls, forms, known)
    with torch.no_grad():
        chooser.run(*values)
    return [chooser.choices[node] for node in calls]
