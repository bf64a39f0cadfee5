"""Parts of a program by themselves: blocks, or single calls; and streams that stop and go back."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn

from graphopt.calibration import Stream, segments
from graphopt.capture import capture
from graphopt.program import Program

aten = torch.ops.aten


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu() * 2)


class Stack(nn.Module):
    """Layers, a product of its own, and a second result."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for layer in self.layers:
            x = layer(x)
        return self.last(x).sin(), x


def captured(depth: int = 4, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    model = Stack(depth).eval().to(dtype)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return capture(model, (torch.randn(3, 8, dtype=dtype),), dynamic_shapes=dynamic)


def linears(program: Program) -> list[torch.fx.Node]:
    return list(program.graph.find_nodes(op="call_function", target=aten.linear.default))


def samples(dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    torch.manual_seed(1)
    return [[torch.randn(rows, 8, dtype=dtype)] for rows in (3, 5, 2)]


def test_blocks_and_what_is_left() -> None:
    program = captured()
    products = linears(program)
    found = segments(program.graph, products)
    held = [[n for n in s.nodes if n in products] for s in found]
    assert held == [products[0:2], products[2:4], products[4:6], products[6:8], products[8:]]
    assert [len(s.outputs) for s in found] == [1] * 5
    assert found[-1].nodes == found[-1].outputs == (products[-1],)


def test_without_repeated_blocks_each_product_is_alone() -> None:
    program = captured(1)
    products = linears(program)
    assert [s.nodes for s in segments(program.graph, products)] == [(n,) for n in products]


def test_parts_give_what_the_program_gives() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        program = captured(dtype=dtype)
        found = segments(program.graph, linears(program))
        outputs = [n for s in found for n in s.outputs]
        stream = Stream(program, samples(dtype), outputs, outputs)
        for segment in found:
            stream.advance(segment.nodes[0])
            reads = [list(stream.given(n)) for n in segment.reads]
            stream.advance_to(stream.position + len(segment.nodes))
            wanted = list(stream.given(segment.outputs[0]))
            for index, want in enumerate(wanted):
                given = {n: r[index] for n, r in zip(segment.reads, reads, strict=True)}
                (made,) = segment.run(given)
                assert made.dtype == torch.float32
                close = 1e-6 if dtype == torch.float32 else 5e-2
                torch.testing.assert_close(made, want.float(), rtol=close, atol=close)


def test_what_is_kept_is_let_go_of() -> None:
    program = captured()
    found = segments(program.graph, linears(program))
    outputs = [n for s in found for n in s.outputs]
    stream = Stream(program, samples(), outputs, outputs)
    refs, held = [], []
    for segment in found:
        stream.advance(segment.nodes[0])
        stream.advance_to(stream.position + len(segment.nodes))
        refs.append(weakref.ref(stream.values[0][segment.outputs[0]]))
        held.append(len(stream.values[0]))
        stream.forget(segment.outputs)
        gc.collect()
        alive = [r() is not None for r in refs]
        assert not any(alive[:-2]), alive
    assert max(held) <= 2


def test_back_to_a_mark() -> None:
    program = captured()
    products = linears(program)
    stream = Stream(program, samples(), products)
    stream.advance(products[2])
    mark = stream.mark()
    given = [g.clone() for g in stream.given(products[2].args[0])]  # type: ignore[arg-type]
    stream.weight(products[2].args[1], torch.zeros(16, 8))  # type: ignore[arg-type]
    stream.advance(products[5])
    changed = list(stream.given(products[5].args[0]))  # type: ignore[arg-type]
    stream.rewind(mark)
    for one, two in zip(given, stream.given(products[2].args[0]), strict=True):  # type: ignore[arg-type]
        assert torch.equal(one, two)
    stream.advance(products[5])
    again = list(stream.given(products[5].args[0]))  # type: ignore[arg-type]
    fresh = Stream(program, samples(), products)
    fresh.advance(products[5])
    for old, new, right in zip(changed, again, fresh.given(products[5].args[0]), strict=True):  # type: ignore[arg-type]
        assert torch.equal(new, right)
        assert not torch.allclose(old, right)
