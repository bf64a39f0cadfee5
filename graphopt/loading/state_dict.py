"""From a loaded checkpoint to a module: find the state dict, build the architecture, fill it."""

from __future__ import annotations

import difflib
import importlib
import traceback
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from graphopt.errors import LoadError
from graphopt.loading.checkpoint import importable_from_cwd
from graphopt.loading.findings import printable

_NESTS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "params",
    "net",
    "network",
    "weights",
)
_WRAPPERS = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
State = OrderedDict[str, torch.Tensor]


def find_state(loaded: Any, where: str) -> tuple[State, list[str]]:
    """The state dict in what a checkpoint held, with a note for each layer that was unwrapped.

    Raises:
        LoadError: there is no mapping from names to tensors under any usual key.
    """
    notes: list[str] = []
    for _ in range(4):
        if isinstance(loaded, torch.nn.Module):
            loaded = loaded.state_dict()
            notes.append("took the module's state dict")
        if _is_state(loaded):
            return _copy(loaded), notes
        key = next((k for k in _NESTS if isinstance(loaded, Mapping) and _holds(loaded, k)), None)
        if key is None:
            break
        others = sorted(str(k) for k in loaded if k != key)
        beside = f", beside {', '.join(others[:6])}" if others else ""
        notes.append(f"took the weights under {key!r}{beside}")
        loaded = loaded[key]
    raise LoadError(f"no state dict in the file: it holds {describe(loaded)}", where=where)


def _is_state(value: Any) -> bool:
    if not isinstance(value, Mapping) or not value:
        return False
    tensors = sum(isinstance(v, torch.Tensor) for v in value.values())
    return tensors > 0 and all(
        isinstance(k, str) and (isinstance(v, torch.Tensor) or k.endswith("_extra_state"))
        for k, v in value.items()
    )


def _copy(state: Mapping[str, Any]) -> State:
    """A copy that can be renamed; keeps the versions of modules that torch stores beside it."""
    copied: State = OrderedDict(state)
    if (versions := getattr(state, "_metadata", None)) is not None:
        copied._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return copied


def _holds(loaded: Mapping[Any, Any], key: str) -> bool:
    return isinstance(loaded.get(key), Mapping | torch.nn.Module) and bool(loaded[key])


def describe(value: Any) -> str:
    """A value in a few words, for messages."""
    if isinstance(value, Mapping):
        return f"a mapping with the keys {_some([str(key) for key in value]) or '(none)'}"
    return f"a {type(value).__module__}.{type(value).__qualname__}"


def build_architecture(arch: str) -> torch.nn.Module:
    """Import ``package.module`` and call ``factory`` of ``package.module:factory``, no arguments.

    Raises:
        LoadError: the name has another form, cannot be imported, or does not give a module; where
            the user's own code raises, the error names its line.
    """
    module_name, _, factory_name = arch.partition(":")
    if not module_name or not factory_name:
        raise LoadError(
            f"--arch {arch!r} has not the form package.module:factory",
            fix="name the function or class that builds the model, as in --arch mymodels.vit:build",
        )
    with importable_from_cwd():
        try:
            factory: Any = importlib.import_module(module_name)
            for part in factory_name.split("."):
                factory = getattr(factory, part)
            model = factory()
        except Exception as error:
            raise _arch_error(arch, error) from error
    if isinstance(model, torch.nn.Module):
        return model
    raise LoadError(
        f"the factory gave {describe(model)}, not a torch.nn.Module", where=f"--arch {arch}"
    )


def _arch_error(arch: str, error: Exception) -> LoadError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if f.filename != __file__ and "importlib" not in f.filename]
    place = f"{own[-1].filename}:{own[-1].lineno}" if own else f"--arch {arch}"
    return LoadError(
        f"the architecture could not be built: {type(error).__name__}: {error}",
        where=place,
        fix=f"check that `python -c 'import {arch.partition(':')[0]}'` works in {Path.cwd()}, and "
        "that the factory needs no arguments",
    )


def load_into(module: torch.nn.Module, state: State, where: str) -> list[str]:
    """Fill ``module`` with ``state``, every name and shape accounted for; return notes.

    A prefix that DataParallel or torch.compile put before every name is taken off.

    Raises:
        LoadError: names are missing or unexpected, shapes differ, or floating-point weights would
            be rounded to integers.
    """
    own = module.state_dict()
    state, notes = _without_wrapper(state, own)
    problems = [*_name_problems(state, own), *_value_problems(state, own)]
    if problems:
        what = "the checkpoint does not fit the architecture:\n    " + "\n    ".join(problems)
        fix = "give --arch the factory (and configuration) that the checkpoint was saved from"
        raise LoadError(what, where=where, fix=fix)
    casts = sorted(
        {f"{v.dtype} to {own[k].dtype}" for k, v in _tensors(state, own) if v.dtype != own[k].dtype}
    )
    try:
        module.load_state_dict(state, strict=True)
    except Exception as error:
        raise LoadError(f"the weights could not be copied: {error}", where=where) from error
    return notes + [f"converted weights from {cast}".replace("torch.", "") for cast in casts]


def _without_wrapper(state: State, own: Mapping[str, Any]) -> tuple[State, list[str]]:
    notes: list[str] = []
    for _ in _WRAPPERS:
        for prefix, maker in _WRAPPERS.items():
            wrapped = all(k.startswith(prefix) for k in state)
            if wrapped and not any(k.startswith(prefix) for k in own):
                state = _copy(state)
                consume_prefix_in_state_dict_if_present(state, prefix)
                notes.append(f"took the prefix {prefix!r} ({maker}) off every name")
    return state, notes


def _name_problems(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    # BatchNorm kept no batch count before torch 0.4.1; load_state_dict fills it in.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in own]
    problems = []
    if missing:
        problems.append(f"missing in the checkpoint ({len(missing)}): {_some(missing)}")
    if unexpected:
        problems.append(f"unknown to the architecture ({len(unexpected)}): {_some(unexpected)}")
        close = difflib.get_close_matches(unexpected[0], missing, n=1)
        problems += [f"(perhaps {unexpected[0]} is {close[0]})"] if close else []
    return problems


def _value_problems(state: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    shapes, rounded = [], []
    for name, tensor in _tensors(state, own):
        target = own[name]
        if tensor.shape != target.shape:
            shapes.append(f"{name} {tuple(tensor.shape)} for {tuple(target.shape)}")
        if not torch.can_cast(tensor.dtype, target.dtype):
            rounded.append(f"{name} {tensor.dtype} for {target.dtype}")
    problems = [f"shapes differ ({len(shapes)}): {_some(shapes)}"] if shapes else []
    return problems + ([f"types differ ({len(rounded)}): {_some(rounded)}"] if rounded else [])


def _tensors(state: Mapping[str, Any], own: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    both = ((k, v) for k, v in state.items() if isinstance(own.get(k), torch.Tensor))
    return ((k, v) for k, v in both if isinstance(v, torch.Tensor))


def _some(names: list[str]) -> str:
    return printable(", ".join(names[:8])) + (", ..." if len(names) > 8 else "")
