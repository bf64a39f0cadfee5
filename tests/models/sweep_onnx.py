"""A compiled module as an ONNX file that ONNX Runtime runs, for the sweep to call in its place."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.emit.guards import CallBinder, InputGuard
from graphopt.emit.onnx_runtime import feed_of, open_session
from graphopt.emit.onnx_translate import input_names


class OnnxModule(nn.Module):
    """Called like the module that was exported; gives the outputs of the file in their flat order.

    Calls are checked as the module checks them: sizes that it refuses are refused here.
    """

    def __init__(self, module: Any) -> None:
        super().__init__()
        program = module.current_program()
        self.bind, self.check = CallBinder(program), InputGuard(program)
        self.names = input_names(program)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            self.result = graphopt.export_onnx(module, path, measure=False)
            self.session = open_session(path)

    def forward(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        flat = self.bind(args, kwargs)
        self.check(flat)
        found = self.session.run(None, feed_of(self.session, flat, self.names))
        return [torch.from_numpy(array) for array in found]
