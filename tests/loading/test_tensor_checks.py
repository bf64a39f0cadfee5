"""Tensors that lie about their memory are refused, wherever they are nested."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from graphopt.errors import LoadError
from graphopt.loading import check_tensors, load_model


def coo(indices: list[list[int]], size: tuple[int, ...] = (10,)) -> torch.Tensor:
    values = torch.ones(len(indices[0]))
    return torch.sparse_coo_tensor(torch.tensor(indices), values, size, check_invariants=False)


def csr(rows: list[int], columns: list[int]) -> torch.Tensor:
    parts = torch.tensor(rows), torch.tensor(columns), torch.ones(len(columns))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.sparse_csr_tensor(*parts, (2, 3), check_invariants=False)


def shrunk(bytes_left: int) -> torch.Tensor:
    tensor = torch.ones(2, 5)
    tensor.untyped_storage().resize_(bytes_left)
    return tensor


def view_of_shrunk() -> torch.Tensor:
    whole = torch.ones(10)
    view = whole[8:]
    whole.untyped_storage().resize_(32)
    return view


def sparse_with_short_values() -> torch.Tensor:
    tensor = coo([[0, 1]])
    tensor._values().untyped_storage().resize_(4)
    return tensor


def nested_short() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    tensor.untyped_storage().resize_(16)
    return tensor


BAD = {
    "index too large": (lambda: coo([[0, 99]]), "invariants"),
    "index negative": (lambda: coo([[-5, 1]]), "invariants"),
    "index in second axis": (lambda: coo([[0, 1], [0, 7]], (3, 5)), "invariants"),
    "compressed column": (lambda: csr([0, 1, 2], [0, 50]), "invariants"),
    "compressed rows": (lambda: csr([0, 9, 2], [0, 1]), "invariants"),
    "short storage": (lambda: shrunk(36), "needs 40 bytes of a storage that holds 36"),
    "no storage": (lambda: shrunk(0), "needs 40 bytes of a storage that holds 0"),
    "view": (view_of_shrunk, "needs 40 bytes of a storage that holds 32"),
    "sparse values": (sparse_with_short_values, "needs 8 bytes of a storage that holds 4"),
    "nested": (nested_short, "reaches outside a storage of 4"),
    "meta": (lambda: torch.ones(3, device="meta"), "no data"),
}


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=list(BAD))
def test_bad_tensor_is_refused_and_named(make, reason: str) -> None:
    state = {"good": torch.ones(2), "deep": [{"layer": (make(),)}]}
    with pytest.raises(LoadError, match=reason) as refusal:
        check_tensors(state, "m.pt")
    assert refusal.value.where == "m.pt, tensor deep.0.layer.0"


def test_bad_parameter_of_a_module_is_refused() -> None:
    module = torch.nn.Linear(2, 5)
    module.weight.untyped_storage().resize_(0)
    with pytest.raises(LoadError, match="needs 40 bytes"):
        check_tensors({"model": module})


def test_good_tensors_pass() -> None:
    recursive: dict = {"expanded": torch.ones(1).expand(1000), "empty": torch.empty(0, 7)}
    recursive["self"] = recursive
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        channel = torch.quantize_per_channel(
            torch.ones(3, 2), torch.ones(3), torch.zeros(3, dtype=torch.long), 0, torch.qint8
        )
        nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3), torch.ones(0, 3)])
    good = [coo([[0, 9]]), csr([0, 1, 2], [0, 2]), torch.ones(4, 4).t()[1:], channel, nested]
    check_tensors([recursive, good, {1, 2}, "text", None, torch.ones(2, requires_grad=True)])


@pytest.mark.parametrize("index", [99, -5])
@pytest.mark.parametrize("legacy", [False, True])
def test_sparse_tensor_in_a_checkpoint(index: int, legacy: bool, tmp_path: Path) -> None:
    """torch loads it without a word, and a product with it reads foreign memory."""
    path = tmp_path / "m.pt"
    torch.save({"w": coo([[0, index]])}, path, _use_new_zipfile_serialization=not legacy)
    assert int(torch.load(path)["w"]._indices()[0, 1]) == index
    with pytest.raises(LoadError, match=r"index|indices|invariants"):
        load_model(path, arch="torch.nn:Identity")


def test_meta_tensor_in_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(3, device="meta")}, path)
    with pytest.raises(LoadError, match="no data"):
        load_model(path, arch="torch.nn:Identity")
