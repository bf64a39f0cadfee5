"""Where in the user's code a node comes from."""

from __future__ import annotations

import re

from torch.fx import Node

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def source_line(node: Node) -> str:
    """``file:line`` of the innermost frame of a node, else its module's path, else its name."""
    if frames := _FRAME.findall(node.meta.get("stack_trace") or ""):
        file, line = frames[-1]
        return f"{file}:{line}"
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        if path:
            return f"module {path}"
    return f"node {node.name}"
