"""Resident memory of an ONNX Runtime session: ``FILE FEED THREADS [NAME=VALUE ...]``, as JSON.

Megabytes above those of this process with the runtime imported and a session of one node open:
after load, after a few steps, and the most there ever was.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper

STEPS = 3


def _session(model: str | bytes, threads: int, settings: list[str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for setting in settings:
        options.add_session_config_entry(*setting.split("=", 1))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _tiny() -> bytes:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", [x], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    data: bytes = made.SerializeToString()
    return data


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def main() -> None:
    file, feed, threads, *settings = sys.argv[1:]
    tiny = _session(_tiny(), int(threads), [])
    tiny.run(None, {"x": np.zeros(1, np.float32)})
    with np.load(feed) as stored:
        given = {name: stored[name] for name in stored.files}
    gc.collect()
    before = _status("VmRSS")
    session = _session(file, int(threads), settings)
    loaded = _status("VmRSS")
    names = {i.name for i in session.get_inputs()}
    for _ in range(STEPS):
        session.run(None, {n: v for n, v in given.items() if n in names})
    found = {"loaded": loaded, "after steps": _status("VmRSS"), "most": _status("VmHWM")}
    print(json.dumps({name: round(value - before, 1) for name, value in found.items()}))


if __name__ == "__main__":
    main()
