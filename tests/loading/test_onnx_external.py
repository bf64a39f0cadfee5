"""ONNX external data stays inside the model's folder and inside its files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import LoadError
from graphopt.loading import Limits, check_external_data, inspect_file, load_model

onnx = pytest.importorskip("onnx")
helper = onnx.helper
WEIGHTS = np.arange(6, dtype=np.float32).reshape(2, 3)


def external(location: str, shape: tuple[int, ...] = (2, 3), **entries: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def graph(nodes: list, initializers: list) -> onnx.GraphProto:
    x, y = (helper.make_tensor_value_info(n, 1, ["batch", 3]) for n in "xy")
    return helper.make_graph(nodes, "g", [x], [y], initializers)


def as_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    node = helper.make_node("Gemm", ["x", "w"], ["y"])
    return helper.make_model(graph([node], [tensor]))


def as_constant(tensor: onnx.TensorProto) -> onnx.ModelProto:
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor)]
    return helper.make_model(graph([*nodes, helper.make_node("Gemm", ["x", "w"], ["y"])], []))


def in_subgraph(tensor: onnx.TensorProto) -> onnx.ModelProto:
    inner = graph([helper.make_node("Constant", [], ["y"], value=tensor)], [])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    return helper.make_model(graph([node], []))


def in_function(tensor: onnx.TensorProto) -> onnx.ModelProto:
    inner = helper.make_node("Constant", [], ["y"], value=tensor)
    function = helper.make_function("mine", "F", [], ["y"], [inner], [])
    nodes = [helper.make_node("F", [], ["y"], domain="mine")]
    return helper.make_model(graph(nodes, []), functions=[function])


def in_sparse(tensor: onnx.TensorProto) -> onnx.ModelProto:
    indices = onnx.numpy_helper.from_array(np.arange(6), "i")
    sparse = helper.make_sparse_tensor(tensor, indices, [100])
    made = graph([helper.make_node("Gemm", ["x", "w"], ["y"])], [])
    made.sparse_initializer.append(sparse)
    return helper.make_model(made)


PLACES = [as_initializer, as_constant, in_subgraph, in_function, in_sparse]


def named(value: object) -> str:
    return getattr(value, "__name__", str(value)[:20])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder, with a secret beside it and links out of it."""
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "w.bin").write_bytes(WEIGHTS.tobytes())
    secret = tmp_path / "secret"
    secret.write_bytes(WEIGHTS.tobytes())
    (inside / "link").symlink_to(secret)
    (inside / "linked").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe")
    (inside / "sub").mkdir()
    return inside


def write(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("place", PLACES, ids=named)
@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("../secret", "not a path below"),
        ("sub/../../secret", "not a path below"),
        ("/etc/passwd", "not a path below"),
        ("..\\secret", "not a path below"),
        ("C:secret", "not a path below"),
        ("", "not a path below"),
        ("link", "leads out of the model's folder"),
        ("linked/secret", "leads out of the model's folder"),
        ("absent", "missing, or no regular file"),
        ("sub", "missing, or no regular file"),
        ("pipe", "missing, or no regular file"),
        ("m.onnx\x00", "not a path below"),
        ("w" * 5000, "damaged"),
        ("w:stream", "not a path below"),
    ],
)
def test_location_outside(place: Callable, location: str, reason: str, folder: Path) -> None:
    path = write(place(external(location)), folder)
    with pytest.raises(LoadError, match=reason):
        check_external_data(path)
    with pytest.raises(LoadError):
        load_model(path)
    assert inspect_file(path).findings


@pytest.mark.parametrize(
    ("entries", "shape", "reason"),
    [
        ({"offset": "4"}, (2, 3), "needs 24 bytes of external data that has 20"),
        ({"length": "25"}, (2, 3), "bytes 0 to 25 of a file that has 24"),
        ({"offset": "8", "length": "20"}, (2, 3), "bytes 8 to 28 of a file that has 24"),
        ({"offset": "-1"}, (2, 3), "are not numbers of bytes"),
        ({"offset": "٣"}, (2, 3), "are not numbers of bytes"),
        ({"length": "1e3"}, (2, 3), "are not numbers of bytes"),
        ({"length": "8"}, (2, 3), "needs 24 bytes of external data that has 8"),
        ({}, (1 << 40, 1 << 20), "needs .* bytes of external data that has 24"),
        ({}, (-2, -3), "make no tensor"),
    ],
)
def test_range_outside(entries: dict, shape: tuple, reason: str, folder: Path) -> None:
    path = write(as_initializer(external("w.bin", shape, **entries)), folder)
    with pytest.raises(LoadError, match=reason) as refusal:
        check_external_data(path)
    assert "'w'" in (refusal.value.where or "")


def test_two_locations(folder: Path) -> None:
    tensor = external("w.bin")
    tensor.external_data.add(key="location", value="../secret")
    with pytest.raises(LoadError, match="there twice"):
        check_external_data(write(as_initializer(tensor), folder))


def test_size_limit(folder: Path) -> None:
    path = write(as_initializer(external("w.bin")), folder)
    with pytest.raises(LoadError, match="GRAPHOPT_MAX_TOTAL_BYTES"):
        check_external_data(path, Limits(total_bytes=23))


@pytest.mark.parametrize("place", PLACES, ids=named)
def test_honest_data_passes(place: Callable, folder: Path) -> None:
    path = write(place(external("w.bin", length="24")), folder)
    assert check_external_data(path) == (folder / "w.bin",)
    loaded = load_model(path)
    assert loaded.kind == "onnx" and loaded.notes == ("external data in w.bin",)


def test_links_of_a_download_cache_pass(folder: Path, tmp_path: Path) -> None:
    """A cache keeps all files in one folder and links to them from another."""
    path = write(as_initializer(external("w.bin")), folder)
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("m.onnx", "w.bin"):
        (snapshot / name).symlink_to(folder / name)
    assert check_external_data(snapshot / path.name) == (snapshot / "w.bin",)


def test_inspect_shows_the_model(folder: Path) -> None:
    inline = onnx.numpy_helper.from_array(WEIGHTS, "w")
    model = as_initializer(inline)
    model.producer_name = "maker\x1b[31m"
    model.metadata_props.add(key="task", value="rank")
    (folder / "m.graphopt.json").write_text('{"rewrites": 3}')
    facts = inspect_file(write(model, folder))
    assert facts.kind == "onnx" and not facts.findings
    assert [(t.name, t.dtype, t.shape, t.bytes) for t in facts.tensors] == [
        ("w", "float32", (2, 3), 24)
    ]
    assert [(v.name, v.shape) for v in facts.inputs] == [("x", ("batch", 3))]
    assert facts.operators == {"Gemm": 1} and facts.metadata["task"] == "rank"
    assert facts.graphopt == {"rewrites": 3}
    assert all("\x1b" not in line for line in facts.lines())


def test_arch_is_refused_for_a_program(folder: Path) -> None:
    path = write(as_initializer(onnx.numpy_helper.from_array(WEIGHTS, "w")), folder)
    with pytest.raises(LoadError, match="whole model"):
        load_model(path, arch="torch.nn:Identity")
