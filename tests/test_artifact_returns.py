"""What a saved module returns has the types that the module in memory returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from saved_modules import X, change, edited, through_a_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.emit.module import OptimizedModule
from graphopt.errors import GraphoptError, LoadError


class Pair(NamedTuple):
    """A named tuple that torch does not know."""

    first: Tensor
    second: Tensor


class Returning(nn.Module):
    """Returns what ``function`` makes of its input."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def returning(function: Callable[[Tensor], Any]) -> OptimizedModule:
    return graphopt.compile(
        Returning(function).eval(), example_inputs=(X[0],), measure=False, passes="none"
    )


RETURNS: dict[str, Callable[[Tensor], Any]] = {
    "topk": lambda x: x.topk(2),
    "sort": lambda x: x.sort(-1),
    "svd": torch.linalg.svd,
    "old svd": torch.svd,
    "inside others": lambda x: {"plain": (x + 1, x * 2), "named": [x.max(0), x.min(1)]},
    "a tuple": lambda x: (x + 1, x * 2),
    "nothing": lambda x: (x + 1, None, ()),
}


@pytest.mark.parametrize("name", RETURNS)
def test_a_return_value_keeps_its_types(name: str, tmp_path: Path) -> None:
    module = returning(RETURNS[name])
    again = through_a_file(module, tmp_path)
    for loaded in (again, through_a_file(again, tmp_path)):
        expected, found = module(X[1]), loaded(X[1])
        torch.testing.assert_close(found, expected)
        assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    assert pytree.tree_structure(module(X[1])) == pytree.tree_structure(RETURNS[name](X[1]))


def test_torch_alone_reads_a_named_return_as_a_tuple(tmp_path: Path) -> None:
    path = graphopt.save(returning(RETURNS["topk"]), tmp_path / "module.pt2")
    found = torch.export.load(path).module()(X[1])
    assert type(found) is tuple
    torch.testing.assert_close(found, tuple(X[1].topk(2)))


@pytest.mark.parametrize("returns", [{"": "sort"}, {"0": "sort"}, {"": "Tensor"}, {"1": "max"}])
def test_a_return_of_another_kind_is_refused(returns: dict[str, str], tmp_path: Path) -> None:
    path = graphopt.save(returning(lambda x: (x + 1, x, x * 2)), tmp_path / "module.pt2")
    with pytest.raises(LoadError, match=r"return value") as caught:
        graphopt.load(edited(path, tmp_path / "changed.pt2", change("returns", to=returns)))
    assert "returns" in str(caught.value.where)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda _x: (), "returns nothing"),
        (lambda _x: [], "returns nothing"),
        (lambda x: Pair(x + 1, x * 2), "Pair"),
    ],
)
def test_what_the_format_has_no_words_for_is_refused(
    function: Callable[[Tensor], Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(GraphoptError, match=words):
        graphopt.save(returning(function), tmp_path / "module.pt2")
    assert not list(tmp_path.iterdir())
