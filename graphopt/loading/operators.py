"""Which operators a file may name: those that compute on tensors and nothing else."""

from __future__ import annotations

import re

import torch

_REGISTERED = re.compile(r"torch\.ops\.([A-Za-z_]\w*)\.([A-Za-z_]\w*)(?:\.([A-Za-z_]\w*))?")
_SYMBOLIC = re.compile(r"torch\.sym_[a-z]+")
_BUILTIN = {
    f"_operator.{name}"
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq"),
        *("ne", "lt", "le", "gt", "ge", "and_", "or_", "lshift", "rshift", "getitem"),
    )
} | {f"math.{name}" for name in ("trunc", "ceil", "floor", "sqrt", "log2")}
_WRAPPERS = {
    "torch._C._set_grad_enabled",
    "torch.amp.autocast_mode._enter_autocast",
    "torch.amp.autocast_mode._exit_autocast",
    "torch.fx.experimental.symbolic_shapes.cast_symbool_to_symint_guardless",
} | {
    f"torch._functorch.predispatch.{name}"
    for name in (
        *("_add_batch_dim", "_remove_batch_dim", "_vmap_increment_nesting"),
        *("_vmap_decrement_nesting", "lazy_load_decompositions", "_make_dual", "_unpack_dual"),
        *("_jvp_increment_nesting", "_jvp_decrement_nesting", "_unwrap_for_grad"),
        *("_enter_dual_level", "_exit_dual_level"),
    )
}
_HIGHER_ORDER = {
    *("cond", "while_loop", "while_loop_stack_output", "map_impl", "scan", "associative_scan"),
    *("wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast", "wrap_activation_checkpoint"),
    *("tag_activation_checkpoint", "invoke_subgraph", "hints_wrapper", "out_dtype", "strict_mode"),
    *("flex_attention", "flex_attention_backward", "auto_functionalized"),
    *("auto_functionalized_v2", "with_effects", "_export_tracepoint", "foreach_map"),
}
# Namespaces of torch that reach files, other processes, or torch's own machinery.
_REACHING_NAMESPACES = {
    *("c10d", "symm_mem", "prim", "profiler", "debugprims", "debug_mode_ops", "static_runtime"),
    *("inductor", "rpc", "export", "_test"),
}
REACHING_OPERATORS = {"aten.from_file", "aten.save", "aten._print", "aten.warn"}
_DUNDERS = {
    f"__{i}{name}__" for i in ("", "i") for name in ("and", "or", "xor", "lshift", "rshift")
}


def operator_reason(target: object) -> str | None:
    """Why a graph from a file may not call ``target``, or None where it may.

    Args:
        target: the operator as ``.pt2`` files write it: ``torch.ops.aten.add.Tensor``.
    """
    if not isinstance(target, str):
        return "the operator is not named by a text"
    if target in _BUILTIN or target in _WRAPPERS or _SYMBOLIC.fullmatch(target):
        return None
    if match := _REGISTERED.fullmatch(target):
        return registered_reason(*match.groups())
    return (
        f"{target!r:.80} is not an operator but some function, which torch would look up and call"
    )


def registered_reason(namespace: str, name: str, overload: str | None) -> str | None:
    """As :func:`operator_reason`, for an operator registered with torch."""
    if namespace == "higher_order":
        known = overload is None and name in _HIGHER_ORDER
        return None if known else f"the higher-order operator {name} may run code from the file"
    if namespace in _REACHING_NAMESPACES or f"{namespace}.{name}" in REACHING_OPERATORS:
        return f"the operator {namespace}.{name} reaches outside the model's tensors"
    if not _is_operator_path(namespace, name, overload):
        return f"torch.ops.{namespace}.{name}.{overload} is not an operator but a part of torch.ops"
    return None


def _is_operator_path(namespace: str, name: str, overload: str | None) -> bool:
    taken = vars(torch.ops).get(namespace)
    if hasattr(type(torch.ops), namespace) or not isinstance(taken, torch._ops._OpNamespace | None):
        return False
    if hasattr(torch._ops._OpNamespace, name) or name.startswith("__"):
        return name in _DUNDERS
    return overload is not None and not hasattr(torch._ops.OpOverloadPacket, overload)


def unregistered(targets: set[str]) -> list[str]:
    """Those of ``targets`` that this process does not know, sorted."""
    return sorted(t for t in targets if (m := _REGISTERED.fullmatch(t)) and not _known(*m.groups()))


def _known(namespace: str, name: str, overload: str | None) -> bool:
    try:
        found = getattr(getattr(torch.ops, namespace), name)
        return overload is None or hasattr(found, overload)
    except AttributeError:
        return False
