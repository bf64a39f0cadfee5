"""One model through `graphopt.compile`, held against the model itself: outputs and gradients."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.errors import GraphoptError

FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
"""Largest relative RMS difference from the float32 original; a hundredth of a percent off fails."""
SILENT = 1e-3
"""A gradient this much smaller than the model's is rounding (an attention's key bias, say)."""
DRAWS = 4
"""How often the original runs with other roundings, where a difference is put down to rounding."""


@dataclass
class Trial:
    """A model, how it is called, and the further sizes it must then take.

    ``lower`` makes of the compiled module what is compared in its place, such as an ONNX file.
    """

    model: Callable[[], nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shapes: Any
    sizes: list[tuple[str, Callable[[], dict[str, Any]]]]
    training: bool
    lower: Callable[[nn.Module], nn.Module] | None = None


@dataclass
class Row:
    """What happened to one model in one mode.

    ``sizes`` says at which it was compared, ``axes`` are the ones that stayed dynamic, ``applied``
    counts kept rewrites by pass, ``forward`` and ``gradient`` are the largest relative RMS
    differences, ``cause`` says what was refused.
    """

    name: str
    family: str
    mode: str
    captured: bool = False
    axes: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    before: int = 0
    after: int = 0
    applied: dict[str, int] = field(default_factory=dict)
    forward: float = 0.0
    gradient: float | None = None
    cause: str = ""
    wrong: str = ""
    seconds: float = 0.0

    def named(self, row: Row, axes: Iterable[str]) -> Row:
        """This result under the name of another row."""
        given = {"name": row.name, "family": row.family, "mode": row.mode, "cause": row.cause}
        return replace(self, **given, axes=tuple(axes))

    def because(self, cause: str) -> Row:
        return replace(self, cause=cause)

    def line(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in asdict(self).items() if v or k == "captured")


def run(trial: Trial) -> Row:
    """Optimize, call both, compare."""
    row, started = Row("", "", ""), time.perf_counter()
    try:
        module = graphopt.compile(
            trial.model(),
            example_inputs=trial.args,
            example_kwargs=trial.kwargs,
            dynamic_shapes=trial.shapes,
            measure=False,
        )
        called = module if trial.lower is None else trial.lower(module)
    except GraphoptError as error:
        row.cause = _first_line(error)
        return row
    except Exception as error:
        row.captured, row.wrong = True, f"optimizing, with {_first_line(error)}"
        return row
    row.seconds, row.captured = time.perf_counter() - started, True
    row.applied = dict(Counter(a.pass_name for a in module.report.applied))
    row.before, row.after = len(module.report.graph_before), len(module.report.graph_after)
    for what, kwargs in [("the captured size", lambda: trial.kwargs), *trial.sizes]:
        _compare(row, called, trial, kwargs(), what)
    return row


def _compare(row: Row, module: nn.Module, trial: Trial, kwargs: dict[str, Any], what: str) -> None:
    """Call twice, and look at the second call: a graph that repeats a first call's work shows.

    A size that the original itself does not take says nothing.
    """
    original = trial.model()
    try:
        theirs = _answers(original, trial, kwargs)
    except Exception:
        return
    try:
        ours = _answers(module, trial, kwargs)
    except GraphoptError as error:
        row.cause = row.cause or f"{what}: {_first_line(error)}"
        return
    except Exception as error:
        row.wrong = row.wrong or f"{what}, with {_first_line(error)}"
        return
    row.sizes = (*row.sizes, what)
    row.forward = max(row.forward, difference(ours[0], theirs[0]))
    if trial.training:
        row.gradient = max(row.gradient or 0.0, difference(ours[1], theirs[1], SILENT))
    if not _close(ours, theirs) and not _as_exact(ours, theirs, trial, kwargs):
        row.wrong = row.wrong or what


Answers = tuple[dict[str, Tensor], dict[str, Tensor]]


def _answers(model: nn.Module, trial: Trial, kwargs: dict[str, Any]) -> Answers:
    """Outputs and gradients of the second of two calls."""
    with torch.set_grad_enabled(trial.training):
        for _ in range(2):
            outputs = _call(model, trial.args, kwargs)
    return _floats(outputs), _gradients(model, outputs) if trial.training else {}


def _close(ours: Answers, theirs: Answers) -> bool:
    forward, gradient = (difference(*pair, SILENT) for pair in zip(ours, theirs, strict=True))
    return forward <= FORWARD_TOLERANCE and gradient <= GRADIENT_TOLERANCE


def _as_exact(ours: Answers, theirs: Answers, trial: Trial, kwargs: dict[str, Any]) -> bool:
    """Whether ours is as near to the original in float64 as the original in float32 is.

    The original counts by the worst of a few runs, with its weights moved by a rounding: a model
    that magnifies rounding may be near by luck in one.
    """
    wide = pytree.tree_map_only(Tensor, _double, (trial.args, kwargs))
    exact = _single(_answers(trial.model().double(), replace(trial, args=wide[0]), wide[1]))
    runs = [theirs, *(_answers(_moved(trial.model(), i), trial, kwargs) for i in range(DRAWS))]
    allowed = [3 * max(_apart(run[part], exact[part]) for run in runs) for part in (0, 1)]
    return all(_apart(ours[part], exact[part]) <= allowed[part] for part in (0, 1))


def _apart(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    return difference(ours, exact, SILENT)


def _single(answers: Answers) -> Answers:
    outputs, gradients = (
        {k: v.float() if v.is_floating_point() else v for k, v in part.items()} for part in answers
    )
    return outputs, gradients


def _moved(model: nn.Module, seed: int) -> nn.Module:
    """The model with each weight times ``1 + u``, u uniform within its dtype's eps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 - 1
            weight.copy_(weight.double() * (1 + drawn * torch.finfo(weight.dtype).eps))
    return model


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _first_line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, GraphoptError) else f"{type(error).__name__}: {text}"


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return model(*args, **kwargs)


def _floats(tree: Any) -> dict[str, Tensor]:
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
    return {str(i): tensor.detach() for i, tensor in enumerate(tensors)}


def _gradients(model: nn.Module, outputs: Any) -> dict[str, Tensor]:
    """Gradients of the loss, or of the squares of all outputs where there is none."""
    model.zero_grad()
    loss = getattr(outputs, "loss", None)
    if loss is None:
        leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
        trained = [t for t in leaves if t.requires_grad and t.is_floating_point()]
        loss = sum((t.square().mean() for t in trained), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], silent: float = 0.0) -> float:
    """The largest RMS difference of two sets of tensors, relative; infinite where they do not fit.

    The scale of each tensor is its own RMS, but at least ``silent`` times the largest one's.
    """
    if ours.keys() != theirs.keys():
        return float("inf")
    floor = silent * max((_rms(t) for t in theirs.values()), default=0.0)
    return max((_off(ours[k], theirs[k], floor) for k in theirs), default=0.0)


def _off(ours: Tensor, theirs: Tensor, floor: float) -> float:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    if not theirs.is_floating_point():
        return 0.0 if torch.equal(ours, theirs) else float("inf")
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    error = torch.where(same, 0.0, ours.double() - theirs.double())
    return _rms(error) / max(_rms(theirs.nan_to_num(0.0, 0.0, 0.0)), floor, 1e-12)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
