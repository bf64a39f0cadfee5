"""What can be said about a model and its example inputs before anything is traced."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from graphopt.errors import CaptureError

_PLAIN = (int, float, bool, str, type(None))
_STRIDED = (torch.strided, torch._mkldnn)  # type: ignore[attr-defined]


def unwrapped(model: Any) -> tuple[nn.Module, list[str]]:
    """The module under data-parallel and torch.compile wrappers, and a sentence for each."""
    notes: list[str] = []
    while isinstance(model, nn.Module):
        kind = type(model).__name__
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        elif isinstance(model, torch._dynamo.OptimizedModule):
            inner = model._orig_mod
        else:
            return model, notes
        notes.append(f"{kind} was unwrapped: the program is that of the {type(inner).__name__}")
        model = inner
    raise CaptureError(
        f"{type(model).__name__} is not an nn.Module",
        fix="put the function into the forward of an nn.Module",
    )


def check_model(model: nn.Module) -> None:
    """Refuse modules that hold no traceable code or no values."""
    if getattr(type(model), "forward", None) is nn.Module.forward:
        raise CaptureError(f"{type(model).__name__} has no forward", fix="define forward")
    for path, module in model.named_modules():
        what, fix = _untraceable(module) or (None, None)
        if what:
            where = f"submodule {path}" if path else None
            raise CaptureError(f"{type(module).__name__} {what}", where=where, fix=fix)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        what, fix = _unusable(tensor) or (None, None)
        if what:
            raise CaptureError(f"{type(model).__name__}: {name} {what}", where=name, fix=fix)


def _untraceable(module: nn.Module) -> tuple[str, str] | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript, which has no Python code to trace", "pass the original nn.Module"
    if isinstance(getattr(module, "_packed_params", None), nn.Module | torch.ScriptObject):
        return (
            "is a quantized module with packed weights",
            "pass the float model, and quantize it with the pass QuantizeMatmul",
        )
    return None


def _unusable(tensor: Tensor) -> tuple[str, str] | None:
    if is_lazy(tensor):
        return "is not initialised yet (a lazy module)", "call the model once on real inputs first"
    if tensor.is_meta:
        return "is on the meta device and has no values", "load the weights before capture"
    if tensor.layout not in _STRIDED:
        return f"has the layout {tensor.layout}", "make it dense with .to_dense()"
    if tensor.is_nested:
        return "is a nested tensor", "pad it to a dense tensor and pass a mask"
    if tensor.is_inference():
        return (
            "was created under torch.inference_mode and has no gradient history",
            "create and load the model outside torch.inference_mode, or .clone() the tensor",
        )
    return None


def checked_call(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> inspect.BoundArguments:
    """The example call bound to ``forward``'s parameters, after every leaf was looked at.

    Raises:
        CaptureError: names the argument that does not fit, and what would.
    """
    try:
        bound = inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit {type(model).__name__}.forward"
            f"{inspect.signature(model.forward)}: {error}",
            fix="pass the arguments that forward takes, by its names",
        ) from error
    for name, value in bound.arguments.items():
        register_dataclasses(value)
        for path, leaf in pytree.tree_flatten_with_path(value)[0]:
            _check_leaf(name + pytree.keystr(path), leaf)
    return bound


def _check_leaf(name: str, leaf: Any) -> None:
    if isinstance(leaf, Tensor):
        what, fix = (None, None) if leaf.is_inference() else _unusable(leaf) or (None, None)
        if what:
            raise CaptureError(f"the example input {name} {what}", where=name, fix=fix)
    elif not isinstance(leaf, _PLAIN):
        raise CaptureError(
            f"the example input {name} is a {type(leaf).__name__}, which a graph cannot take",
            where=name,
            fix=_replacement(leaf),
        )


def _replacement(leaf: Any) -> str:
    kind = type(leaf).__name__
    if kind == "ndarray":
        return "pass torch.from_numpy(...)"
    if kind == "generator":
        return "pass a list or a tuple"
    if isinstance(leaf, torch.Generator):
        return "draw the random numbers before the call and pass them as a tensor"
    return (
        "pass tensors, numbers, strings, None, or lists, tuples, dicts and dataclasses of them; "
        "a class of your own needs torch.utils._pytree.register_pytree_node"
    )


def register_dataclasses(value: Any) -> None:
    """Let plain dataclasses inside ``value`` be taken apart and rebuilt at the graph's border."""
    for leaf in pytree.tree_leaves(value):
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            continue
        if type(leaf) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(leaf))
        for field in dataclasses.fields(leaf):
            register_dataclasses(getattr(leaf, field.name))
