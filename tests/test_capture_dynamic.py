"""Axes declared dynamic stay dynamic, under their names and ranges, or are refused by name."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import AdditionalInputs, Dim, ShapesCollection

from graphopt.capture import capture
from graphopt.emit.guards import InputGuard
from graphopt.errors import CaptureError, GraphoptError
from graphopt.program import Program

TOKENS = {0: "batch", 1: "seq"}


class Encoder(nn.Module):
    """Token and position embeddings under a mask; at most 64 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(99, 8)
        self.register_buffer("positions", torch.randn(64, 8))

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.tokens(ids) + self.positions[: ids.shape[1]]
        return y if mask is None else y * mask[..., None]


def tokens(batch: int, seq: int) -> tuple[Tensor, Tensor]:
    return torch.randint(99, (batch, seq)), torch.rand(batch, seq)


def sizes(program: Program) -> dict[str, str]:
    """``name -> range`` of the named axes."""
    return {
        name: str(program.range_constraints[symbol]) for symbol, name in program.axis_names.items()
    }


def test_names_tie_axes_and_the_model_narrows_ranges() -> None:
    program = capture(Encoder(), tokens(2, 7), dynamic_shapes={"ids": TOKENS, "mask": TOKENS})
    assert sizes(program) == {"batch": "VR[1, int_oo]", "seq": "VR[1, 64]"}
    assert "axis 1 of ids (`seq`) must be at most 64: the model allows no more" in program.notes
    shapes = [program.user_inputs()[i].meta["val"].shape for i in range(2)]
    assert shapes[0] == shapes[1]
    for batch, seq in ((2, 7), (5, 64), (1, 1)):
        example = tokens(batch, seq)
        assert torch.equal(program.run(example)[0], _model_of(program)(*example))


def _model_of(program: Program) -> nn.Module:
    model = Encoder()
    model.load_state_dict(program.state)
    return model


def test_one_name_is_one_size_also_where_the_model_does_not_care() -> None:
    class Apart(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            return x.sin(), y.cos()

    args = torch.rand(3), torch.rand(3)
    tied = capture(Apart(), args, dynamic_shapes={"x": {0: "n"}, "y": {0: "n"}})
    free = capture(Apart(), args, dynamic_shapes={"x": {0: "n"}, "y": {0: "m"}})
    InputGuard(free)([torch.rand(4), torch.rand(5)])
    with pytest.raises(GraphoptError, match="`n` must be 4, as in x"):
        InputGuard(tied)([torch.rand(4), torch.rand(5)])


def test_every_way_to_declare_gives_the_same_graph() -> None:
    model, example = Encoder(), tokens(2, 7)
    batch, seq = Dim("batch"), Dim("seq", max=64)
    collection = ShapesCollection()
    collection[example[0]] = collection[example[1]] = {0: batch, 1: seq}
    more = AdditionalInputs()
    more.add(tokens(3, 9))
    dynamic = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    ways: list[Any] = [
        {"ids": TOKENS, "mask": TOKENS},
        (TOKENS, ("batch", "seq")),
        {"ids": {0: batch, 1: seq}, "mask": {0: batch, -1: seq}},
        {"ids": dynamic, "mask": dynamic},
        collection,
        more,
    ]
    targets = [
        [str(n.target) for n in capture(model, example, dynamic_shapes=way).graph.nodes]
        for way in ways
    ]
    assert all(t == targets[0] for t in targets)


def test_an_example_of_size_one_stays_dynamic() -> None:
    model, example = Encoder(), tokens(1, 7)
    program = capture(model, example, dynamic_shapes={"ids": TOKENS, "mask": TOKENS})
    assert program.example_inputs[0].shape == (1, 7)
    for batch in (1, 2, 5):
        example = tokens(batch, 7)
        assert torch.equal(program.run(example)[0], model(*example))


def test_inputs_left_out_are_static() -> None:
    program = capture(Encoder(), tokens(2, 7)[:1], dynamic_shapes={"ids": {0: "batch"}})
    shape = program.user_inputs()[0].meta["val"].shape
    assert isinstance(shape[0], torch.SymInt) and shape[1] == 7


@dataclasses.dataclass
class Batch:
    ids: Tensor
    extra: list[Tensor]


class Nested(nn.Module):
    def forward(self, batch: Batch, *more: Tensor, **named: Tensor) -> Tensor:
        return batch.ids * batch.extra[0] + sum(more) + named["bias"]


@pytest.mark.parametrize(
    "batch",
    [
        {"ids": {0: "n"}, "extra": [{0: "n"}]},
        [{0: "n"}, [{0: "n"}]],
        {"ids": {0: "n"}, "extra": {0: {0: "n"}}},
    ],
)
def test_nested_inputs(batch: Any) -> None:
    args = Batch(torch.rand(3, 2), [torch.rand(3, 2)]), torch.rand(3, 2), torch.rand(3, 2)
    specs = {"batch": batch, "more": ({0: "n"}, {0: "n"}), "bias": {0: "n"}}
    program = capture(Nested(), args, {"bias": torch.rand(3, 2)}, dynamic_shapes=specs)
    assert list(program.axis_names.values()) == ["n"]
    flat = [torch.rand(5, 2) for _ in range(5)]
    InputGuard(program)(flat)
    assert torch.allclose(program.run(flat)[0], flat[0] * flat[1] + flat[2] + flat[3] + flat[4])


class Halves(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.view(y.shape[0], 2, -1) + y[:, None]


def test_derived_axes_are_checked_at_each_call() -> None:
    half = Dim("half", max=9)
    args = torch.rand(6, 4), torch.rand(3, 4)
    program = capture(Halves(), args, dynamic_shapes=({0: 2 * half}, {0: half}))
    guard = InputGuard(program)
    guard([torch.rand(10, 4), torch.rand(5, 4)])
    with pytest.raises(GraphoptError, match=r"axis 0 must be 10 \(2\*half\)"):
        guard([torch.rand(9, 4), torch.rand(5, 4)])
    with pytest.raises(GraphoptError, match="`half` must be between 1 and 9"):
        guard([torch.rand(20, 4), torch.rand(10, 4)])


class Even(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] % 2 == 0:  # here
            return x * 2
        return x


def test_a_branch_on_a_size_becomes_an_assumption() -> None:
    program = capture(Even(), (torch.rand(4),), dynamic_shapes={"x": {0: "n"}})
    lines, start = inspect.getsourcelines(Even)
    line = start + next(i for i, text in enumerate(lines) if "# here" in text)
    (assumption,) = program.assumptions
    assert "% 2" in assumption.text and assumption.where == f"{__file__}:{line}"
    guard = InputGuard(program)
    guard([torch.rand(6)])
    with pytest.raises(GraphoptError, match=r"captured for sizes with .*n % 2") as caught:
        guard([torch.rand(5)])
    assert caught.value.where == f"{__file__}:{line}"


class Attends(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(query, key, value)  # here


def test_attention_has_as_many_keys_as_values() -> None:
    """PyTorch's kernels on CPUs read beyond keys that are fewer."""
    axes = ({2: Dim.DYNAMIC},) * 3
    args = tuple(torch.rand(2, 4, 6, 8) for _ in range(3))
    program = capture(Attends(), args, dynamic_shapes=axes)
    guard = InputGuard(program)
    guard([torch.rand(2, 4, size, 8) for size in (3, 5, 5)])
    with pytest.raises(GraphoptError, match="as many keys as values") as caught:
        guard([torch.rand(2, 4, size, 8) for size in (3, 1, 5)])
    assert caught.value.where is not None and caught.value.where.startswith(f"{__file__}:")
    tied = capture(Attends(), args, dynamic_shapes=({2: "rows"}, {2: "seen"}, {2: "seen"}))
    assert not tied.assumptions


class Fixed(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = x.sin()
        return z.view(3, 2, 2) + y.sum()  # here


def test_an_axis_that_the_model_fixes_is_refused_by_name_and_line() -> None:
    args = torch.rand(3, 4), torch.rand(3)
    with pytest.raises(CaptureError) as caught:
        capture(Fixed(), args, dynamic_shapes={"x": {0: "batch"}, "y": {0: "other"}})
    lines, start = inspect.getsourcelines(Fixed)
    line = start + next(i for i, text in enumerate(lines) if "# here" in text)
    assert caught.value.what == "declared dynamic, but the model fixes axis 0 of x (`batch`) to 3"
    assert caught.value.where == f"{__file__}:{line}" and "Dim.AUTO" in caught.value.fix


@pytest.mark.parametrize("way", ["allow", "auto"])
def test_an_axis_may_be_given_up_but_not_silently(way: str) -> None:
    args, axis = (torch.rand(3, 4), torch.rand(3)), Dim.AUTO if way == "auto" else Dim.DYNAMIC
    program = capture(
        Fixed(),
        args,
        dynamic_shapes={"x": {0: axis}, "y": {0: axis}},
        specialize="allow" if way == "allow" else "refuse",
    )
    assert "axis 0 of x is fixed at 3 by the model" in program.notes
    with pytest.raises(GraphoptError, match=r"axis 0 must be 3"):
        InputGuard(program)([torch.rand(6, 4), torch.rand(5)])


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_axes_that_the_model_ties_are_said() -> None:
    args = torch.rand(3), torch.rand(3)
    program = capture(Sum(), args, dynamic_shapes={"x": {0: "a"}, "y": {0: "b"}})
    assert any("must equal `" in note for note in program.notes)
    with pytest.raises(GraphoptError, match="must be 4, as in x"):
        InputGuard(program)([torch.rand(4), torch.rand(5)])


def test_a_dynamic_number_is_an_input() -> None:
    class Take(nn.Module):
        def forward(self, x: Tensor, count: int) -> Tensor:
            return x[:count] * count

    program = capture(Take(), (torch.rand(8), 5), dynamic_shapes={"count": Dim.DYNAMIC})
    example = torch.rand(8)
    assert torch.equal(program.run([example, 3])[0], example[:3] * 3)
    with pytest.raises(GraphoptError, match="count is 9, but must be between 1 and 8"):
        InputGuard(program)([example, 9])


BATCH = {0: "batch"}

WRONG: dict[str, tuple[Any, str]] = {
    "an unknown input": ({"idx": TOKENS}, "names 'idx'"),
    "an unknown axis": ({"ids": {5: "batch"}}, "names axis 5"),
    "too few inputs": ((TOKENS, TOKENS, TOKENS), "3 entries for 2 arguments"),
    "too few axes": (({0: "a"}, ("a",)), "mask has 2 axes"),
    "not a name": ({"ids": {0: "2*batch"}}, "declared as '2*batch'"),
    "not a mapping": (7, "is a int"),
    "a number for an input": ({"ids": 7}, "ids is declared as 7"),
    "a name for an input": ({"ids": "batch"}, "ids is declared as 'batch'"),
    "two sizes for one name": ({"ids": {0: "n", 1: "n"}}, "`n` is 2 in ids but 7 in ids"),
    "out of its own range": ({"ids": {0: Dim("n", max=1)}}, "between 1 and 1 but 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_declaration_is_refused(name: str) -> None:
    spec, what = WRONG[name]
    with pytest.raises(CaptureError) as caught:
        capture(Encoder(), tokens(2, 7), dynamic_shapes=spec)
    assert what in caught.value.what and caught.value.fix


class Summed(nn.Module):
    def forward(self, *values: Tensor) -> Tensor:
        return torch.stack([value.square() for value in values]).sum()


@pytest.mark.parametrize("spec", [{"values": (BATCH, BATCH)}, ((BATCH, BATCH),)])
def test_axes_of_several_values_behind_one_name(spec: Any) -> None:
    program = capture(Summed(), (torch.rand(3, 2), torch.rand(3, 2)), dynamic_shapes=spec)
    given = torch.rand(5, 2), torch.rand(5, 2)
    torch.testing.assert_close(program.run(given)[0], Summed()(*given))


WRONG_FOR_SEVERAL: dict[str, tuple[Any, str]] = {
    "axes without a sequence": ({"values": BATCH}, "has 2 values, dynamic_shapes gives 'batch'"),
    "one entry each, not nested": ((BATCH, BATCH), "2 entries for 1 arguments"),
    "a number": ({"values": 3}, "declared as 3"),
    "one too many": ({"values": (BATCH, BATCH, BATCH)}, "has 2 values, no value 2"),
}


@pytest.mark.parametrize("name", WRONG_FOR_SEVERAL)
def test_a_wrong_declaration_for_several_values_is_refused(name: str) -> None:
    spec, what = WRONG_FOR_SEVERAL[name]
    with pytest.raises(CaptureError) as caught:
        capture(Summed(), (torch.rand(3, 2), torch.rand(3, 2)), dynamic_shapes=spec)
    assert what in caught.value.what and caught.value.fix


def test_axes_of_a_value_without_axes() -> None:
    with pytest.raises(CaptureError, match="mask is a NoneType and has no axes"):
        capture(Encoder(), (tokens(2, 7)[0], None), dynamic_shapes={"mask": TOKENS})


def test_an_empty_example_is_refused() -> None:
    with pytest.raises(CaptureError, match="dynamic but empty"):
        capture(Encoder(), tokens(0, 7), dynamic_shapes={"ids": TOKENS, "mask": TOKENS})
