"""From a TorchScript module, which cannot be traced, to an exported program."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from graphopt.errors import LoadError
from graphopt.loading.findings import printable

_FIX = "give the original nn.Module, or export that with torch.export.save"


def export_torchscript(
    module: torch.jit.ScriptModule, kwargs: Mapping[str, Any], where: str
) -> torch.export.ExportedProgram:
    """Convert a TorchScript module with torch's own converter, and compare the two.

    Sizes of tensor inputs are dynamic where the program allows it; arguments of ``forward`` that
    are left out become inputs with their default value.

    Args:
        kwargs: example inputs by the names of ``forward``'s arguments.
        where: the file, for messages.

    Raises:
        LoadError: the inputs do not fit ``forward``, an operator has no conversion, or the
            converted program gives other results.
    """
    args = _positional(module, kwargs, where)
    try:
        from torch._export.converter import TS2EPConverter

        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported: torch.export.ExportedProgram = TS2EPConverter(module, args, {}).convert()
            expected, got = module(*args), exported.module()(*args)
    except Exception as error:
        reason = printable(" ".join(str(error).split()))[:300]
        what = f"the TorchScript program could not be converted: {reason}"
        raise LoadError(what, where=where, fix=_FIX) from error
    try:
        torch.testing.assert_close(got, expected, equal_nan=True)
    except AssertionError as error:
        what = f"the converted TorchScript program computes something else: {error}"
        raise LoadError(what, where=where, fix=_FIX) from error
    return exported


def _positional(
    module: torch.jit.ScriptModule, kwargs: Mapping[str, Any], where: str
) -> tuple[Any, ...]:
    """The inputs in the order of ``forward``, with its defaults for those left out."""
    forward: Any = module.forward
    arguments = {a.name: a for a in forward.schema.arguments[1:]}
    missing = [n for n, a in arguments.items() if n not in kwargs and not a.has_default_value()]
    if missing or not kwargs.keys() <= arguments.keys():
        what = f"inputs {', '.join(kwargs)} do not fit forward({', '.join(arguments)})"
        raise LoadError(what, where=where, fix="name the inputs as forward does")
    return tuple(kwargs.get(name, a.default_value) for name, a in arguments.items())
