"""TorchScript archives: their code is read first, and must compute on tensors only.

``torch.jit.load`` runs no Python, but it does run TorchScript (a module's ``__setstate__``), whose
operators can write and map files. So the code in the archive is searched for such operators and
for native classes; without them, loading it is as safe as running a graph.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import torch

from graphopt.loading.archive import Archive, open_archive, root_findings, structure_findings
from graphopt.loading.checkpoint import read_checkpoint
from graphopt.loading.findings import Finding, Limits, reading, refuse
from graphopt.loading.operators import REACHING_OPERATORS, registered_reason
from graphopt.loading.tensors import check_tensors

_REACHING_NAMES = {name.partition(".")[2] for name in REACHING_OPERATORS} - {"warn", "_print"}
_CLASS_NAMESPACES = {"quantized", "rnn", "xnnpack", "mkldnn"}
_SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
_FIX = "export the model again with torch.export.save, or, if you trust the file, --trust-pickle"


def torchscript_findings(archive: Archive) -> Iterator[Finding]:
    """What speaks against loading a TorchScript archive."""
    for folder in ("data", "constants"):
        if f"{folder}.pkl" in archive.records:
            yield from read_checkpoint(archive, folder).findings
    for record in archive.records:
        if record.startswith("code/") and record.endswith(".py"):
            where = f"{archive.where}, member {record}"
            with reading(where):
                code = archive.read(record).decode()
            for reason in dict.fromkeys(code_reasons(code)):
                yield Finding(reason, where, _FIX)


def code_reasons(code: str) -> Iterator[str]:
    """What TorchScript source does that a model need not: files, native objects, unknown text."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        yield f"the code cannot be read: {error}"
        return
    if any(t.type == tokenize.ERRORTOKEN and t.string.strip() for t in tokens):
        yield "the code cannot be read"
    words = [t for t in tokens if t.type not in _SKIPPED]
    named = {t.string for t in words if t.type == tokenize.NAME} | set(_texts(words))
    for name in sorted(named & _REACHING_NAMES):
        yield f"the code calls {name}, which reaches files"
    flat = " ".join(t.string for t in words).replace(" . ", ".")
    for namespace in sorted(set(re.findall(r"\btorch\.classes\.(\w+)", flat)) - _CLASS_NAMESPACES):
        yield f"the code builds a native object of torch.classes.{namespace}"
    for namespace, name in sorted(set(re.findall(r"\bops\.(\w+)\.(\w+)", flat))):
        reason = registered_reason(namespace, name, "default")
        if reason and namespace != "prim":  # TorchScript's own: dtype, NumToTensor, RaiseException
            yield reason


def _texts(words: list[tokenize.TokenInfo]) -> Iterator[str]:
    """The values of string literals, neighbours joined as TorchScript joins them."""
    for kind, run in itertools.groupby(words, key=lambda t: t.type):
        if kind == tokenize.STRING:
            values = [ast.literal_eval(t.string) for t in run]
            yield "".join(v if isinstance(v, str) else v.decode("latin-1") for v in values)


def load_torchscript(path: Path, *, trusted: bool, limits: Limits) -> torch.jit.ScriptModule:
    """Load a TorchScript archive, its tensors on the CPU.

    Args:
        trusted: load it whatever its code does (damage is refused all the same).

    Raises:
        LoadError: the archive is damaged, or its code reaches files or builds native objects.
    """
    with reading(path), path.open("rb") as file:
        with open_archive(file, str(path), limits) as archive:
            refuse([*structure_findings(archive), *root_findings(archive)])
            found = torchscript_findings(archive)
            refuse(f for f in found if f.fix != _FIX or not trusted)
        file.seek(0)
        module: torch.jit.ScriptModule = torch.jit.load(file, map_location="cpu")
    check_tensors(module, str(path))
    return module
