"""``.pt2`` files that make ``torch.export.load`` run code are refused before torch sees them."""

from __future__ import annotations

import json
import logging
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hostile_files import (
    CONTENTS,
    Payload,
    edit_json,
    payload_code,
    rewritten,
    saved,
)

from graphopt.errors import LoadError
from graphopt.loading import inspect_file, load_model, scan_archive

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


@pytest.fixture
def attacked(request: pytest.FixtureRequest, clean_pt2: Path, tmp_path: Path, marker: Path) -> Path:
    return rewritten(clean_pt2, tmp_path / "evil.pt2", lambda c: request.param(c, marker))


def named(value: Attack | str) -> str:
    return "" if isinstance(value, str) else value.__name__


@pytest.mark.parametrize(("attacked", "reason"), REASONS.items(), indirect=["attacked"], ids=named)
def test_refused_and_not_run(
    attacked: Path, reason: str, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(attacked.parent)
    with pytest.raises(LoadError) as refusal:
        load_model(attacked)
    assert str(attacked) in str(refusal.value)
    with pytest.raises(LoadError):
        scan_archive(attacked)
    with pytest.raises(LoadError):
        load_model(attacked, trust_pickle=True)
    facts = inspect_file(attacked)
    assert any(reason in finding.what for finding in facts.findings), facts.findings
    assert facts.members
    assert not marker.exists()
    assert "hostile_module" not in sys.modules


@pytest.mark.parametrize("attacked", RUNS_IN_TORCH, indirect=True, ids=named)
def test_the_attack_is_real(
    attacked: Path, marker: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the scan torch does run it: otherwise the test above would prove nothing."""
    monkeypatch.syspath_prepend(attacked.parent)
    with caplog.at_level(logging.CRITICAL), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = torch.export.load(attacked).module()
            loaded(torch.randn(3, 4), scale={"by": torch.ones(4)})
        except Exception as error:
            after = repr(error)
        else:
            after = "and loaded"
    sys.modules.pop("hostile_module", None)
    if not marker.exists():
        pytest.skip(f"torch {torch.__version__} does not run it any more: {after:.200}")


def test_clean_file_loads_with_its_example_inputs(clean_pt2: Path) -> None:
    loaded = load_model(clean_pt2)
    assert loaded.kind == "pt2" and loaded.exported is not None
    assert loaded.extra_files == {"graphopt.json": '{"format": 1}'}
    args, kwargs = loaded.exported.example_inputs
    expected = torch.export.load(clean_pt2).module()(*args, **kwargs)
    torch.testing.assert_close(loaded.exported.module()(*args, **kwargs), expected, rtol=0, atol=0)


def test_clean_file_of_another_name_loads(clean_pt2: Path, tmp_path: Path) -> None:
    other = tmp_path / "model.bin"
    other.write_bytes(clean_pt2.read_bytes())
    assert load_model(other).kind == "pt2"


def test_control_flow_guards_and_tied_weights_load(tmp_path: Path) -> None:
    """Everything that torch itself writes passes the scan: symbols, subgraphs, guards, aliases."""

    class Rich(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 4)
            self.head = torch.nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: torch.Tensor, y: torch.Tensor, mode: str, steps: int) -> dict:
            halves = x.reshape(x.shape[0] // 2, 2, -1)
            rows = (x > 0).nonzero()
            with torch.no_grad():
                scaled = x * x.shape[0] ** 0.5
            with torch.autocast("cpu"):
                product = x @ x.t()
            branch = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
            logits = self.head(self.embed(torch.arange(3)))
            joined = torch.cat([x, y])[: x.shape[0] + y.shape[0] - 1]
            return {
                "parts": [halves, rows, scaled, product],
                "rest": (branch, logits, joined, torch.sym_max(x.shape[0], y.shape[0])),
                "at least": torch.arange(max(x.shape[0], steps)),
            }

    dynamic = {"x": {0: torch.export.Dim.DYNAMIC}, "y": {0: torch.export.Dim.AUTO}}
    inputs = (torch.randn(4, 4), torch.randn(3, 4), "gelu", 2)
    shapes = dynamic | {"mode": None, "steps": None}
    exported = torch.export.export(Rich(), inputs, dynamic_shapes=shapes, strict=False)
    assert exported._guards_code, "the program must have guards, or they are not tested"
    path = tmp_path / "rich.pt2"
    torch.export.save(exported, path)
    loaded = load_model(path).exported
    assert loaded is not None
    expected, got = exported.module()(*inputs), loaded.module()(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    weights = loaded.state_dict
    assert weights["head.weight"].data_ptr() == weights["embed.weight"].data_ptr()


def test_unregistered_operator_is_named(clean_pt2: Path, tmp_path: Path) -> None:
    def edit(contents: CONTENTS) -> None:
        old, new = b"torch.ops.aten.linear.default", b"torch.ops.nobodys_library.linear.default"
        contents[MODEL] = contents[MODEL].replace(old, new)

    evil = rewritten(clean_pt2, tmp_path / "custom.pt2", edit)
    scan_archive(evil)
    with pytest.raises(LoadError, match=r"nobodys_library\.linear") as refusal:
        load_model(evil)
    assert "import the package" in (refusal.value.fix or "")


def test_program_of_another_name(clean_pt2: Path, tmp_path: Path, marker: Path) -> None:
    other = rewritten(clean_pt2, tmp_path / "m.pt2", lambda c: program_of_another_name(c, marker))
    assert inspect_file(other).operators
    with pytest.raises(LoadError, match="no program called model"):
        load_model(other)


def test_checkpoint_called_pt2_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt2"
    torch.save({"a": torch.ones(1)}, path)
    with pytest.raises(LoadError, match=r"called [.]pt2 but holds pickled weights"):
        load_model(path, arch="torch.nn:Identity")


def test_old_format_is_refused(tmp_path: Path, marker: Path) -> None:
    from hostile_files import write_zip

    parts = {"version": b"8.8", "serialized_exported_program.json": b"{}"}
    parts["serialized_state_dict.pt"] = saved(Payload(marker))
    path = write_zip(tmp_path / "old.pt2", parts)
    with pytest.raises(LoadError, match=r"before 2[.]8"):
        load_model(path)
    assert not marker.exists()
