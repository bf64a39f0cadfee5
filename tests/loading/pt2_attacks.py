"""Edits of a clean ``.pt2`` file that make ``torch.export.load`` run code, or misread it.

Each is called with the contents of the archive, which it changes, and with the path of a marker
that the code would make.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import torch
from hostile_files import CONTENTS, Payload, edit_json, payload_code, saved

MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
SAMPLES = "data/sample_inputs/model.pt"
SYMBOL = re.compile(rb"Symbol\('s\d+', positive=True, integer=True\)")


def pickled_weight(contents: CONTENTS, marker: Path) -> None:
    edit_json(contents, WEIGHTS, lambda j: j["config"]["layer.weight"].update(use_pickle=True))
    contents["data/weights/weight_0"] = saved(Payload(marker))


def pickled_constant(contents: CONTENTS, marker: Path) -> None:
    entry = {"path_name": "tensor_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    edit_json(contents, CONSTANTS, lambda j: j["config"].update(c=entry))
    contents["data/constants/tensor_0"] = saved(Payload(marker))


def opaque_object(contents: CONTENTS, marker: Path) -> None:
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True}
    edit_json(contents, CONSTANTS, lambda j: j["config"].update(c=entry | {"tensor_meta": None}))
    contents["data/constants/opaque_obj_0"] = pickle.dumps(Payload(marker))


def legacy_weights(contents: CONTENTS, marker: Path) -> None:
    contents["data/weights/model.pt"] = saved({"layer.weight": Payload(marker)})


def sample_inputs(contents: CONTENTS, marker: Path) -> None:
    contents[SAMPLES] = saved(((Payload(marker),), {}))


def sample_inputs_of_a_newer_protocol(contents: CONTENTS, marker: Path) -> None:
    """Harmless, but the weights-only reader fails, and torch then takes the full one."""
    contents[SAMPLES] = saved(((torch.ones(3, 4),), {}), pickle_protocol=4)


def program_of_another_name(contents: CONTENTS, marker: Path) -> None:
    for record in list(contents):
        contents[record.replace("/model", "/other")] = contents.pop(record)


def shape_expression(contents: CONTENTS, marker: Path) -> None:
    def edit(found: re.Match[bytes]) -> bytes:
        return found[0] + f"+0*[{payload_code(marker)}, 1][1]".encode()

    contents[MODEL] = SYMBOL.sub(edit, contents[MODEL])


def guard(contents: CONTENTS, marker: Path) -> None:
    code = f"[{payload_code(marker)}] is not None"
    edit_json(contents, MODEL, lambda j: j.update(guards_code=[code]))


def input_name(contents: CONTENTS, marker: Path) -> None:
    """The last input's name becomes a default argument of the generated ``forward``."""
    bad = json.dumps(f"s=({payload_code(marker)},)").encode()
    contents[MODEL] = contents[MODEL].replace(b'"name": "scale_by"', b'"name": ' + bad)
    contents[MODEL] = contents[MODEL].replace(b'"scale_by": {"dtype"', bad + b': {"dtype"')


def argument_structure(contents: CONTENTS, marker: Path) -> None:
    (marker.parent / "hostile_module.py").write_text(payload_code(marker))
    context = {
        "default_factory_module": "hostile_module",
        "default_factory_name": "__name__",
        "dict_context": ["a"],
    }
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {"type": "collections.defaultdict", "context": context, "children_spec": [leaf]}

    def edit(program: dict) -> None:
        entry = program["graph_module"]["module_call_graph"][0]
        entry["signature"]["out_spec"] = json.dumps([1, spec])

    edit_json(contents, MODEL, edit)


def constant_text(contents: CONTENTS, marker: Path) -> None:
    """A text where an int is due; torch quotes it into a guard without escaping."""
    bad = f"' or {payload_code(marker)} or '"

    def edit(program: dict) -> None:
        graph, signature, user = first_input(program)
        graph["inputs"][user] = {"as_string": bad}
        value = {"name": "x", "value": {"as_string": bad}}
        signature["input_specs"][user] = {"constant_input": value}
        graph["nodes"] = []
        graph["outputs"] = []
        signature["output_specs"] = []

    edit_json(contents, MODEL, edit)


def first_input(program: dict) -> tuple[dict, dict, int]:
    """The graph, its signature, and the position of the first input that the user gives."""
    graph, signature = (program["graph_module"][k] for k in ("graph", "signature"))
    specs = signature["input_specs"]
    return graph, signature, next(i for i, s in enumerate(specs) if "user_input" in s)


def constant_of_the_signature(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        _, signature, user = first_input(program)
        value = {"as_string": f"' or {payload_code(marker)} or '"}
        signature["input_specs"][user] = {"constant_input": {"name": "x", "value": value}}

    edit_json(contents, MODEL, edit)


def text_as_number(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        graph, _, user = first_input(program)
        graph["inputs"][user] = {"as_int": f"' or {payload_code(marker)} or '"}

    edit_json(contents, MODEL, edit)


def keyword_of_the_structure(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        protocol, spec = json.loads(signature["in_spec"])
        spec["children_spec"][1]["context"] = json.dumps([f"scale=print({marker.name})"])
        signature["in_spec"] = json.dumps([protocol, spec])

    edit_json(contents, MODEL, edit)


def enumeration(contents: CONTENTS, marker: Path) -> None:
    """A key of an output mapping that says it is an enumeration of some module."""
    (marker.parent / "hostile_module.py").write_text(payload_code(marker))
    key = {"__enum__": True, "fqn": "hostile_module:Kind", "name": "ONE"}
    leaf = {"type": None, "context": None, "children_spec": []}
    spec = {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [leaf]}

    def edit(program: dict) -> None:
        entry = program["graph_module"]["module_call_graph"][0]
        entry["signature"]["out_spec"] = json.dumps([1, spec])

    edit_json(contents, MODEL, edit)


def object_in_the_graph(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        node = program["graph_module"]["graph"]["nodes"][-1]
        argument = {"as_custom_obj": {"name": "thing", "class_fqn": "__torch__.Thing"}}
        node["inputs"].append({"name": "thing", "arg": argument, "kind": 1})

    edit_json(contents, MODEL, edit)


RUNS_IN_TORCH = {
    pickled_weight: "use_pickle",
    pickled_constant: "use_pickle",
    opaque_object: "member is a pickled object",
    legacy_weights: "member is a pickled object",
    sample_inputs: "example inputs would import and may run",
    shape_expression: "more than arithmetic: a subscript",
    guard: "more than a condition on sizes: a list",
    input_name: "would become code",
    argument_structure: "imports hostile_module and calls its __name__",
    enumeration: "imports hostile_module:Kind",
}


def function_by_path(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        node = program["graph_module"]["graph"]["nodes"][-1]
        node["target"] = "torch.serialization.os.system"
        argument = {"as_string": f"touch {marker}"}
        node["inputs"] = [{"name": "", "arg": argument, "kind": 1}]

    edit_json(contents, MODEL, edit)


def function_as_argument(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        node = program["graph_module"]["graph"]["nodes"][-1]
        argument = {"as_operator": "torch.hub.load"}
        node["inputs"].append({"name": "f", "arg": argument, "kind": 1})

    edit_json(contents, MODEL, edit)


def parameter_name(contents: CONTENTS, marker: Path) -> None:
    bad = json.dumps(f'layer.a", {payload_code(marker)}) or getattr(self, "b').encode()
    for record in (MODEL, WEIGHTS):
        contents[record] = contents[record].replace(b'"layer.weight"', bad)


def keyword_name(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        signature = program["graph_module"]["module_call_graph"][0]["signature"]
        signature["forward_arg_names"] = ["x", f"y={payload_code(marker)}"]

    edit_json(contents, MODEL, edit)


def reaching_operator(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        node = program["graph_module"]["graph"]["nodes"][-1]
        node["target"] = "torch.ops.aten.from_file.default"
        argument = {"as_string": str(marker)}
        node["inputs"] = [{"name": "filename", "arg": argument, "kind": 1}]

    edit_json(contents, MODEL, edit)


def method_of_ops(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        target = "torch.ops.load_library.__call__"
        program["graph_module"]["graph"]["nodes"][-1]["target"] = target

    edit_json(contents, MODEL, edit)


def running_higher_order(contents: CONTENTS, marker: Path) -> None:
    def edit(program: dict) -> None:
        target = "torch.ops.higher_order.aoti_call_delegate"
        program["graph_module"]["graph"]["nodes"][-1]["target"] = target

    edit_json(contents, MODEL, edit)


def native_library(contents: CONTENTS, marker: Path) -> None:
    contents["data/aotinductor/model/model.wrapper.so"] = b"\x7fELF"


def native_object(contents: CONTENTS, marker: Path) -> None:
    contents["data/constants/custom_obj_0"] = b"PK"


def unknown_member(contents: CONTENTS, marker: Path) -> None:
    contents["data/later/thing"] = b""


def view_outside_weight(contents: CONTENTS, marker: Path) -> None:
    def edit(config: dict) -> None:
        meta = config["config"]["layer.weight"]["tensor_meta"]
        meta["sizes"] = [{"as_int": 4}, {"as_int": 5}]

    edit_json(contents, WEIGHTS, edit)


def endless_zeros(contents: CONTENTS, marker: Path) -> None:
    """An empty file makes torch allocate whatever the shape says."""
    contents["data/weights/weight_0"] = b""

    def edit(config: dict) -> None:
        meta = config["config"]["layer.weight"]["tensor_meta"]
        meta["sizes"] = [{"as_int": 1 << 40}, {"as_int": 1 << 10}]

    edit_json(contents, WEIGHTS, edit)


def negative_size(contents: CONTENTS, marker: Path) -> None:
    def edit(config: dict) -> None:
        config["config"]["layer.bias"]["tensor_meta"]["sizes"] = [{"as_int": -4}]

    edit_json(contents, WEIGHTS, edit)


def weight_elsewhere(contents: CONTENTS, marker: Path) -> None:
    def edit(config: dict) -> None:
        config["config"]["layer.bias"]["path_name"] = "../constants/tensor_0"

    edit_json(contents, WEIGHTS, edit)


def no_samples(contents: CONTENTS, marker: Path) -> None:
    del contents[SAMPLES]


def endless_symbols(contents: CONTENTS, marker: Path) -> None:
    edit_json(
        contents,
        MODEL,
        lambda j: j["range_constraints"].update(u99999999999={"min_val": 0, "max_val": 1}),
    )


ALSO_REFUSED = {
    constant_of_the_signature: "holds quotes or control characters",
    text_as_number: "as_int is a str",
    keyword_of_the_structure: "would become code",
    object_in_the_graph: "holds a native object",
    constant_text: "holds quotes or control characters",
    function_by_path: "not an operator but some function",
    function_as_argument: "not an operator but some function",
    parameter_name: "is not a parameter's name",
    keyword_name: "would become code",
    reaching_operator: "reaches outside the model's tensors",
    method_of_ops: "not an operator but a part of torch.ops",
    running_higher_order: "may run code from the file",
    native_library: "compiled native code",
    native_object: "a pickled object",
    unknown_member: "of a kind that no exported program has",
    view_outside_weight: "needs 68 bytes of a file that holds 64",
    endless_zeros: "of a file that holds 0",
    negative_size: "the size -4",
    weight_elsewhere: "not one that torch.export.save writes",
    sample_inputs_of_a_newer_protocol: "need a full unpickler",
    no_samples: "no record of example inputs",
    endless_symbols: "none that torch makes",
}
REASONS = RUNS_IN_TORCH | ALSO_REFUSED
Attack = Callable[[CONTENTS, Path], None]
