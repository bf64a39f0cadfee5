"""The text of a body: spelled, read back, and refused where it is hostile."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from graphopt.kernels.chunked_rows import allowed, chunked_rows, read, spell
from graphopt.kernels.chunked_rows.parsing import LONGEST

aten = torch.ops.aten


def body(line: str, results: str = "[a], []") -> str:
    return f"def body(x, y):\n    a = {line}\n    return {results}"


def test_a_graph_is_spelled_and_read_back() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.call_function(aten.exp.default, (y,))
    top = graph.call_function(aten.topk.default, (x, 2, -1))
    first = graph.call_function(operator.getitem, (top, 0))
    wide = graph.call_function(aten._to_copy.default, (first,), {"dtype": torch.float64})
    low = graph.call_function(aten.clamp.default, (wide, float("-inf"), 0.5))
    rounded = graph.call_function(aten.div.Tensor_mode, (low, 0.25), {"rounding_mode": "floor"})
    total = graph.call_function(aten.sum.dim_IntList, (rounded, [0, 1]), {"dtype": None})
    text = spell([x, y], [rounded], [total])
    assert text == (
        "def body(x, y):\n"
        "    topk_default = aten.topk.default(x, 2, -1)\n"
        "    getitem = item(topk_default, 0)\n"
        "    _to_copy_default = aten._to_copy.default(getitem, dtype=torch.float64)\n"
        "    clamp_default = aten.clamp.default(_to_copy_default, -inf, 0.5)\n"
        "    div_tensor_mode = aten.div.Tensor_mode(clamp_default, 0.25, rounding_mode='floor')\n"
        "    sum_dim_int_list = aten.sum.dim_IntList(div_tensor_mode, [0, 1], dtype=None)\n"
        "    return [div_tensor_mode], [sum_dim_int_list]"
    )
    matrix = torch.rand(5, 9)
    rows, sums, _ = read(text)([matrix, torch.zeros(())])
    wanted = (matrix.topk(2).values.double().clamp(max=0.5) / 0.25).floor()
    assert rows[0].equal(wanted)
    assert sums[0].equal(wanted.sum())


def test_what_cannot_be_spelled() -> None:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    drawn = graph.call_function(aten.bernoulli.default, (x,))
    moved = graph.call_function(aten._to_copy.default, (x,), {"device": torch.device("cpu")})
    with pytest.raises(ValueError, match=r"aten.bernoulli.default cannot be part of a body"):
        spell([x], [drawn], [])
    with pytest.raises(ValueError, match="device cannot be part of a body"):
        spell([x], [moved], [])
    with pytest.raises(ValueError, match="`y` is computed from, and is not among the inputs"):
        spell([x], [y], [])


REFUSED_OPERATORS = (
    aten.add_.Tensor, aten.rand_like.default, aten.dropout.default, aten.full.default,
    aten.zeros.default, aten.new_zeros.default, aten.arange.default, aten.expand.default,
    aten.one_hot.default, aten.constant_pad_nd.default, aten.repeat.default,
    aten.from_file.default, aten.item.default, aten.nonzero.default, aten.equal.default,
    aten.sum.out, aten.set_.source_Tensor,
    torch.ops.prims.add.default, torch.add, print, getattr, "aten.add.Tensor",
)  # fmt: skip


@pytest.mark.parametrize(
    "target", REFUSED_OPERATORS, ids=lambda t: t if isinstance(t, str) else t.__name__
)
def test_operators_that_are_not_allowed(target: object) -> None:
    assert not allowed(target)


def test_no_allowed_operator_has_a_size_among_its_arguments() -> None:
    """But those that cannot give more numbers than they are given."""
    sized = set()
    for full in torch._C._dispatch_get_all_op_names():
        name, _, overload = full.removeprefix("aten::").partition(".")
        if not full.startswith("aten::") or not hasattr(aten, name):
            continue
        found = getattr(getattr(aten, name), overload or "default", None)
        words = ("size", "num_classes", "pad", "shape", "repeats", "device")
        if allowed(found) and any(a.name in words for a in found._schema.arguments):
            sized.add(name)
    copies = {"_to_copy", "to", "full_like", "ones_like", "zeros_like"}
    assert sized - copies <= {"view", "reshape"}


HOSTILE = {
    "nothing": "",
    "an expression": "__import__('os').system('true')",
    "two functions": "def body(x):\n    return [x], []\nprint(1)",
    "no function": "import os",
    "an async function": "async def body(x):\n    return [x], []",
    "a decorator": "@print\ndef body(x):\n    return [x], []",
    "a default": "def body(x=print(1)):\n    return [x], []",
    "an annotation": "def body(x: print(1)):\n    return [x], []",
    "a result annotation": "def body(x) -> print(1):\n    return [x], []",
    "many arguments": "def body(*x):\n    return [x], []",
    "named arguments": "def body(**x):\n    return [x], []",
    "keyword arguments": "def body(*, x):\n    return [x], []",
    "a parameter twice": "def body(x, x):\n    return [x], []",
    "no result": "def body(x):\n    a = aten.exp.default(x)",
    "one result": "def body(x):\n    return x",
    "names for lists": "def body(x, y):\n    return x, y",
    "four results": "def body(x):\n    return [x], [x], [x], [x]",
    "no list of columns": "def body(x):\n    return [x], [x], x",
    "an unknown result": "def body(x):\n    return [z], []",
    "a computed result": "def body(x):\n    return [x.T], []",
    "a starred result": "def body(x):\n    return [*x], []",
    "an import": "def body(x):\n    import os\n    return [x], []",
    "a loop": "def body(x):\n    while True: pass\n    return [x], []",
    "an early return": "def body(x):\n    return [x], []\n    return [x], []",
    "two targets": "def body(x):\n    a = b = aten.exp.default(x)\n    return [a], []",
    "unpacking": "def body(x):\n    a, b = aten.topk.default(x, 2)\n    return [a], []",
    "an attribute as target": "def body(x):\n    x.data = aten.exp.default(x)\n    return [x], []",
    "a name twice": "def body(x):\n    x = aten.exp.default(x)\n    return [x], []",
    "a method": body("x.exp()"),
    "an attribute": body("aten.exp.default(x.T)"),
    "a subscript": body("aten.exp.default(x[0])"),
    "another module": body("os.system('true')"),
    "another namespace": body("prims.exp.default(x)"),
    "a builtin": body("eval('1')"),
    "a dunder": body("aten.__class__.default(x)"),
    "a dunder overload": body("aten.exp.__class__(x)"),
    "a method of an operator": body("aten.exp.overloads(x)"),
    "no overload": body("aten.exp(x)"),
    "an unknown operator": body("aten.no_such_thing.default(x)"),
    "an unknown overload": body("aten.exp.no_such_thing(x)"),
    "an odd name": body("aten.\uff45xp\u0669.default(x)"),
    "a call of a call": body("aten.exp.default(x)(x)"),
    "a call as argument": body("aten.exp.default(aten.exp.default(x))"),
    "a lambda": body("aten.exp.default(lambda: 0)"),
    "a comprehension": body("aten.exp.default([i for i in x])"),
    "a walrus": body("aten.exp.default(z := x)"),
    "a formatted string": body("aten.exp.default(f'{x}')"),
    "a starred argument": body("aten.exp.default(*x)"),
    "a dictionary of arguments": body("aten.exp.default(**x)"),
    "an unknown value": body("aten.exp.default(z)"),
    "bytes": body("aten.exp.default(b'x')"),
    "an imaginary number": body("aten.mul.Tensor(x, 1j)"),
    "an ellipsis": body("aten.exp.default(...)"),
    "a minus before a value": body("aten.exp.default(-x)"),
    "a minus before nothing": body("aten.exp.default(-None)"),
    "a word": body("aten._to_copy.default(x, device='cuda')"),
    "no dtype": body("aten._to_copy.default(x, dtype=torch.compile)"),
    "a module of torch": body("aten._to_copy.default(x, dtype=torch._dynamo)"),
    "an item by text": body("item(x, 'a')"),
    "an item by list": body("item(x, [0])"),
    "an item by value": body("item(x, y)"),
    "a size": body("aten.full.default([1000000000000], 0.0)"),
    "an expansion": body("aten.expand.default(x, [1000000, 1000000])"),
    "a writing operator": body("aten.add_.Tensor(x, y)"),
    "an out argument": body("aten.exp.out(x, out=y)"),
    "a file": body("aten.from_file.default('/etc/passwd')"),
    "a random operator": body("aten.rand_like.default(x)"),
    "a null byte": body("aten.exp.default(x)\0"),
    "a large integer": body("aten.mul.Scalar(x, 9223372036854775808)"),
    "a larger integer": body(f"aten.mul.Scalar(x, {'9' * 5000})"),
    "a very large integer": body(f"aten.mul.Scalar(x, 0x{'f' * 100000})"),
    "deep lists": body(f"aten.exp.default({'[' * 5}x{']' * 5})"),
    "deeper lists": body(f"aten.exp.default({'[' * 150}x{']' * 150})"),
    "very deep lists": body(f"aten.exp.default({'[' * 100000}x{']' * 100000})"),
    "deep minuses": body(f"aten.exp.default({'-' * 3000}1)"),
    "very deep minuses": body(f"aten.exp.default({'-' * 200000}1)"),
    "deep sums": body(f"aten.exp.default(x{'+x' * 20000})"),
    "deep attributes": body(f"aten{'.exp' * 20000}(x)"),
    "deep calls": body(f"{'(' * 180}x{')()' * 180}"),
    "a long text": body("aten.exp.default(x)") + " " * LONGEST,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_texts_are_refused(case: str) -> None:
    with pytest.raises(ValueError, match="bod"):
        read(HOSTILE[case])


def test_a_long_plain_body_is_read() -> None:
    lines = [f"    a{i} = aten.add.Scalar({f'a{i - 1}' if i else 'x'}, 1)" for i in range(3000)]
    text = "\n".join(["def body(x):", *lines, "    return [a2999], []"])
    rows, *_ = read(text)([torch.zeros(2, 3)])
    assert rows[0].eq(3000).all()


def test_the_operator_refuses_a_hostile_text() -> None:
    h, w = torch.randn(5, 7), torch.randn(9, 7)
    with pytest.raises(ValueError, match="not part of a body: open"):
        chunked_rows(
            [h], [w], [], [], "def body(x):\n    a = open(x)\n    return [a], []", 0, [True]
        )


def test_values_that_share_a_name_with_a_number() -> None:
    text = "def body(inf, nan):\n    a = aten.add.Tensor(inf, nan)\n    return [a], []"
    rows, *_ = read(text)([torch.ones(2, 3), torch.ones(3)])
    assert rows[0].eq(2).all()
