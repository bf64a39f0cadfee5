"""Specifications of example inputs, and inputs from files."""

from __future__ import annotations

import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from graphopt.errors import GraphoptError
from graphopt.inputs import from_file, from_spec, given_inputs, parse_spec


def test_names_are_dynamic_axes_and_share_a_size():
    a, b = parse_spec("ids:int64[batch,seq=16]; mask:int64[batch,seq]")
    assert a.shape == b.shape == (2, 16)
    assert a.axes == b.axes == {0: "batch", 1: "seq"}


def test_commas_separate_inputs_too():
    specs = parse_spec("a:float32[2,3],b:int64[n=4]<100, c:bool[]")
    assert [s.name for s in specs] == ["a", "b", "c"]
    assert specs[1].below == 100 and specs[2].shape == ()


def test_integers_stay_below_the_vocabulary_and_masks_are_ones():
    model = nn.Sequential(nn.Embedding(7, 4))
    found = from_spec("ids:int64[64,8];attention_mask:int64[64,8];token_type_ids:int64[2,2]", model)
    assert 3 < found.kwargs["ids"].max() < 7
    assert found.kwargs["attention_mask"].min() == 1
    assert found.kwargs["token_type_ids"].max() == 0


def test_a_given_range_wins():
    ids = from_spec("ids:int64[400]<1000").kwargs["ids"]
    assert 500 < ids.max() < 1000


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("x", "cannot read"),
        ("x:f32[2]", "unknown dtype"),
        ("x:float32[a b]", "dimension"),
        ("x:int64[s=2];y:int64[s=3]", "2 in one place and 3"),
    ],
)
def test_what_cannot_be_read_is_shown(text, hint):
    with pytest.raises(GraphoptError, match=hint):
        parse_spec(text)


def test_files(tmp_path):
    tensors = {"x": torch.randn(2, 3)}
    torch.save(tensors, tmp_path / "x.pt")
    np.savez(tmp_path / "x.npz", x=tensors["x"].numpy())
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "x.safetensors")
    for name in ("x.pt", "x.npz", "x.safetensors"):
        torch.testing.assert_close(from_file(tmp_path / name).kwargs, tensors)
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(GraphoptError, match="dictionary"):
        from_file(tmp_path / "list.pt")
    with pytest.raises(GraphoptError, match="cannot read inputs"):
        from_file(tmp_path / "x.txt")


NPZ = {
    "objects": np.array([1, None], dtype=object),
    "texts": np.array(["a", "b"]),
    "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "records": np.zeros(2, dtype=[("a", "f4")]),
}


@pytest.mark.parametrize("kind", NPZ)
def test_arrays_that_are_no_tensors_are_refused(kind, tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=NPZ[kind])
    with pytest.raises(GraphoptError) as refusal:
        from_file(path)
    assert refusal.value.where == str(path) and "arrays of numbers" in refusal.value.fix


HEADER = b"\x93NUMPY\1\0\x76\0{'descr': '<f4', 'fortran_order': False, 'shape': (%s"


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "member", "shape", "header", "array"])
def test_damaged_npz_is_refused(damage, tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=np.ones(3, np.float32))
    whole = path.read_bytes()
    if damage == "array":
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    elif damage in ("member", "shape", "header"):
        member = {
            "member": b"hello",
            "shape": HEADER % b"9999999999999,), }",
            "header": HEADER % b"",
        }
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("x.npy", member[damage].ljust(128))
    else:
        path.write_bytes({"empty": b"", "text": b"hello", "cut": whole[:-20]}[damage])
    with pytest.raises(GraphoptError) as refusal:
        from_file(path)
    assert refusal.value.where == str(path)


def test_missing_npz_is_refused(tmp_path):
    with pytest.raises(GraphoptError, match="no such file"):
        from_file(tmp_path / "x.npz")


def test_inputs_larger_than_the_memory_are_refused_before_they_are_drawn():
    with pytest.raises(GraphoptError, match="GiB of memory") as refusal:
        from_spec("x:float32[99999999,99999,16]")
    assert refusal.value.where == "--inputs" and refusal.value.fix


def test_a_name_of_a_file_that_is_not_there_is_no_specification(tmp_path):
    missing = str(tmp_path / "missing.pt")
    with pytest.raises(GraphoptError, match="no such file") as refusal:
        given_inputs(missing)
    assert missing in refusal.value.where
    torch.save({"x": torch.ones(2)}, missing)
    assert given_inputs(missing).kwargs["x"].tolist() == [1, 1]


def test_a_long_specification_is_read():
    text = ";".join(f"input_{i}:float32[2,3]" for i in range(60))
    assert len(given_inputs(text).kwargs) == 60
