"""What values inside an ONNX model are when it runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from graphopt.onnx_files.document import session_of
from graphopt.onnx_files.values import Feed, run

AT_ONCE = 64
"""Values that are kept of one run: activations are large."""


def recorded(
    model: Any, names: Sequence[str], feeds: Sequence[Feed], *, external: bool
) -> Iterator[tuple[str, list[Any]]]:
    """Each of the values by name, with its arrays on all feeds."""
    left = list(dict.fromkeys(names))
    known = {v.name for v in model.graph.inputs}
    for name in [n for n in left if n in known]:
        left.remove(name)
        yield name, [feed[name] for feed in feeds]
    for start in range(0, len(left), AT_ONCE):
        part = left[start : start + AT_ONCE]
        twin = model.clone()
        values = {v.name: v for node in twin.graph for v in node.outputs}
        values |= twin.graph.initializers
        twin.graph.outputs.clear()
        twin.graph.outputs.extend(values[name] for name in part)
        session = session_of(twin, external=external)
        rows = [run(session, feed) for feed in feeds]
        for index, name in enumerate(part):
            yield name, [row[index] for row in rows]
