"""Small ONNX models, and their outputs in ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT
node, tensor = helper.make_node, numpy_helper.from_array


def value(name, shape, element=FLOAT):
    return helper.make_tensor_value_info(name, element, shape)


def graph(nodes, inputs, outputs, initializers=(), name="g"):
    return helper.make_graph(list(nodes), name, list(inputs), list(outputs), list(initializers))


def model(nodes, inputs, outputs, initializers=(), *, opset=18, ir=10, functions=(), domains=()):
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    made = graph(nodes, inputs, outputs, initializers)
    return helper.make_model(made, opset_imports=opsets, ir_version=ir, functions=list(functions))


def save(made, path):
    onnx.save(made, path)
    return path


def weights(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def outputs(path, feed):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, feed)


def operators(path):
    """Kinds of the nodes of a file's main graph, in order."""
    return [n.op_type for n in onnx.load(path).graph.node]


def constants(path):
    return {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def metadata(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}
