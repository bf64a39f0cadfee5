"""Operators that share one softmax: recognised, exact, in place where nothing else reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import CROSS_ENTROPY, HEADS, Head, Recorder, assert_as_exact, assert_close, make
from torch import Tensor

from graphopt.kernels.chunked_rows import Body, read
from graphopt.kernels.chunked_rows.chunks import Loop
from graphopt.kernels.chunked_rows.operands import Operands
from graphopt.kernels.chunked_rows.summaries import Summaries
from graphopt.kernels.chunked_rows.sweeping import Product

LINES = {
    "cross entropy": "a = aten.cross_entropy_loss.default(x, t, None, 0)",
    "sum": "a = aten.cross_entropy_loss.default(x, t, None, 2)",
    "ignored": "a = aten.cross_entropy_loss.default(x, s, None, 0, -100)",
    "ignoring a class": "a = aten.cross_entropy_loss.default(x, t, None, 0, 1)",
    "weighted": "a = aten.cross_entropy_loss.default(x, s, w, 0, -100)",
    "smoothed": "a = aten.cross_entropy_loss.default(x, s, None, 0, -100, 0.3)",
    "smoothed, weighted": "a = aten.cross_entropy_loss.default(x, s, w, 0, -100, 0.3)",
    "smoothed, weighted, sum": "a = aten.cross_entropy_loss.default(x, s, w, 2, -100, 0.3)",
    "nll": "l = aten.log_softmax.int(x, -1); a = aten.nll_loss.default(l, s, w, 0, -100)",
    "nll_nd": "l = aten._log_softmax.default(x, 1, False); "
    "a = aten.nll_loss_nd.default(l, t, None, 0)",
    "logsumexp": "a = aten.logsumexp.default(x, [-1])",
    "logsumexp, kept": "a = aten.logsumexp.default(x, [1], True)",
    "z": "l = aten.logsumexp.default(x, [1]); a = aten.pow.Tensor_Scalar(l, 2)",
    "chosen": "l = aten.log_softmax.int(x, 1); a = aten.gather.default(l, 1, i)",
    "chosen three": "l = aten.log_softmax.int(x, 1); a = aten.gather.default(l, 1, k)",
    "sum of logs": "l = aten.log_softmax.int(x, 1); a = aten.sum.dim_IntList(l, [1])",
    "mean of logs": "l = aten.log_softmax.int(x, 1); a = aten.mean.dim(l, [1], True)",
    "best log": "l = aten.log_softmax.int(x, 1); m = aten.max.dim(l, 1, True); a = item(m, 0)",
    "highest log": "l = aten.log_softmax.int(x, 1); a = aten.amax.default(l, [1])",
    "margin": "m = aten.max.dim(x, 1); b = item(m, 0); l = aten.logsumexp.default(x, [1]); "
    "a = aten.sub.Tensor(b, l)",
    "centred": "m = aten.mean.dim(x, [1]); l = aten.logsumexp.default(x, [1]); "
    "a = aten.sub.Tensor(l, m)",
    "top": "m = aten.amax.default(x, [1]); l = aten.logsumexp.default(x, [1]); "
    "a = aten.sub.Tensor(l, m)",
    "twice": "g = aten.gather.default(x, 1, i); "
    "l = aten.cross_entropy_loss.default(x, t, None, 0); "
    "h = aten.squeeze.dim(g, 1); a = aten.sub.Tensor(l, h)",
    "two losses": "b = aten.cross_entropy_loss.default(x, t, None, 0); "
    "c = aten.cross_entropy_loss.default(x, s, w, 0, -100, 0.1); a = aten.sub.Tensor(b, c)",
    "accuracy beside": "m = aten.argmax.default(x, 1); e = aten.eq.Tensor(m, t); "
    "l = aten.cross_entropy_loss.default(x, t, None, 0); a = aten.mul.Tensor(l, e)",
}
CHAINS = {
    "product": "",
    "upcast": "x = aten._to_copy.default(p, dtype=torch.float64); ",
    "tempered": "x = aten.div.Tensor(p, 0.7); ",
    "biased": "x = aten.add.Tensor(p, bias); ",
}
"""What stands between the product and the summaries; each can be written over."""


def text(lines: str, results: str = "[a], []") -> str:
    steps = lines.split("; ")
    return "\n    ".join(["def body(p, t, s, i, k, w, bias):", *steps, f"return {results}"])


def chained(chain: str, lines: str) -> str:
    return text(chain + lines if chain else lines.replace("(x,", "(p,"))


def operands(n: int = 6, v: int = 11, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        3 * torch.randn(n, v, dtype=dtype),
        torch.randint(0, v, (n,)),
        torch.randint(0, v, (n,)).where(torch.arange(n) % 3 != 1, -100),
        torch.randint(0, v, (n, 1)),
        torch.randint(0, v, (n, 3)),
        torch.rand(v, dtype=dtype) + 0.5,
        torch.randn(v, dtype=dtype),
    ]


def step_of(body: Body) -> Summaries | None:
    found = [s.target for s, _ in body.fused._steps if isinstance(s.target, Summaries)]
    return found[0] if found else None


def ran(body: Body, tensors: list[Tensor]) -> list[Tensor]:
    """The first result and the gradient of the product, every row counting differently."""
    x = tensors[0].detach().clone().requires_grad_()
    rows, sums, _ = body([x, *tensors[1:]])
    result = (rows + sums)[0]
    scale = torch.linspace(0.5, 2.0, result.numel(), dtype=result.dtype).view(result.shape)
    kept = result.detach().clone()
    return [kept, *torch.autograd.grad((result * scale).sum(), x)]


def same(found: list[Tensor], wanted: list[Tensor], limit: float = 1e-12) -> None:
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=limit, atol=limit, equal_nan=True)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("case", LINES)
def test_members(case: str, chain: str) -> None:
    results = "[], [a]" if case.split(", ")[-1] == "sum" else "[a], []"
    body = read(chained(CHAINS[chain], LINES[case]).replace("[a], []", results))
    step = step_of(body)
    assert step is not None
    assert step.in_place
    for n, v in ((6, 11), (1, 3), (5, 1), (0, 4)):
        tensors = operands(n, v)
        if case == "ignoring a class":
            tensors[1] %= 2
        if n == 0 and case == "top":
            continue  # nothing to take the largest of
        same(ran(body.fused, tensors), ran(body, tensors))


@pytest.mark.parametrize("case", LINES)
def test_float32_against_float64(case: str) -> None:
    results = "[], [a]" if case.split(", ")[-1] == "sum" else "[a], []"
    body = read(chained("", LINES[case]).replace("[a], []", results))
    tensors = operands(40, 4099, torch.float32)
    wanted = ran(body, [t.double() if t.is_floating_point() else t for t in tensors])
    assert_close(ran(body.fused, tensors), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", LINES)
def test_narrow_dtypes(case: str, dtype: torch.dtype) -> None:
    results = "[], [a]" if case.split(", ")[-1] == "sum" else "[a], []"
    body = read(chained("", LINES[case]).replace("[a], []", results))
    tensors = operands(40, 123, dtype)
    wanted = ran(body, [t.double() if t.is_floating_point() else t for t in tensors])
    found, eager = ran(body.fused, tensors), ran(body, tensors)
    assert [f.dtype for f in found] == [e.dtype for e in eager]
    assert_as_exact(found, eager, wanted, {torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])


INF = float("inf")
ODD = {
    "a column of -inf": (slice(None), 2, -INF),
    "a row of -inf": (3, slice(None), -INF),
    "inf": (4, 1, INF),
    "a row of inf": (4, slice(None), INF),
    "NaN": (0, 5, float("nan")),
    "large": (slice(None), 0, 1e30),
    "equals": (slice(None), slice(None), 2.0),
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("case", LINES)
def test_odd_numbers(case: str, odd: str) -> None:
    results = "[], [a]" if case.split(", ")[-1] == "sum" else "[a], []"
    body = read(chained("", LINES[case]).replace("[a], []", results))
    tensors = operands()
    rows, classes, number = ODD[odd]
    tensors[0][rows, classes] = number
    same(ran(body.fused, tensors), ran(body, tensors), 1e-9)


@pytest.mark.parametrize("number", [INF, -INF, float("nan")])
@pytest.mark.parametrize("case", ["cross entropy", "logsumexp", "z", "loss and z"])
def test_odd_numbers_in_a_sweep(case: str, number: float) -> None:
    """Infinite logits are NaN to a log-softmax all along their row, to a log-sum-exp at one."""
    both = f"{LINES['cross entropy'].replace('a =', 'b =')}; {LINES['z'].replace('a =', 'c =')}"
    lines = LINES.get(case, f"{both}; a = aten.add.Tensor(b, c)")
    body = read(chained("", lines).replace("(p, t, s, i, k, w, bias)", "(p, t)"))
    assert body.swept is not None
    hidden, weight = torch.randn(6, 4), torch.randn(11, 4)
    hidden[3, 0], weight[:, 0] = number, torch.linspace(-1.0, -0.1, 11)
    weight[5:, 0] *= -1
    pairs = []
    for run in (lambda h, w: body([h @ w.mT, TARGET]), lambda h, w: swept(body, h, w)):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        (made,), _, _ = run(*leaves)
        pairs.append([made, *torch.autograd.grad(made.sum(), leaves)])
    same(*pairs, 1e-4)


TARGET = torch.tensor([0, 10, 3, 3, 7, 1])


def swept(body: Body, hidden: Tensor, weight: Tensor) -> Any:
    assert body.swept is not None
    program, _ = body.swept
    return program([Product(hidden, weight), TARGET])


def test_zero_class_weights_and_no_target() -> None:
    for case in ("weighted", "smoothed, weighted", "nll"):
        body = read(chained("", LINES[case]))
        tensors = operands()
        tensors[5].zero_()
        same(ran(body.fused, tensors), ran(body, tensors))
        tensors[2].fill_(-100)
        found = ran(body.fused, tensors)
        same(found, ran(body, tensors))
        assert not any(f.any() for f in found)


def test_matrices_without_a_layout_of_their_own() -> None:
    body = read(chained("", LINES["cross entropy"]))
    for layout in (lambda x: x.T.contiguous().T, lambda x: x.repeat_interleave(2, 1)[:, ::2]):
        tensors = operands()
        x = layout(tensors[0]).requires_grad_()
        loss = body.fused([x, *tensors[1:]])[0][0]
        (slope,) = torch.autograd.grad(loss.sum(), x)
        dense = tensors[0].requires_grad_()
        (wanted,) = torch.autograd.grad(body([dense, *tensors[1:]])[0][0].sum(), dense)
        same([slope], [wanted])


@pytest.mark.parametrize("case", ["cross entropy", "chosen", "ignored"])
@pytest.mark.parametrize("wrong", [-1, 11])
def test_classes_out_of_range(case: str, wrong: int) -> None:
    body = read(chained("", LINES[case]))
    errors = []
    for run in (body, body.fused):
        tensors = operands()
        for i in (1, 2, 3):
            tensors[i][2] = wrong
        with pytest.raises((IndexError, RuntimeError)) as raised:
            ran(run, tensors)
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


def test_targets_of_other_kinds() -> None:
    """Probabilities, and what torch itself takes or refuses."""
    body = read(chained("", LINES["cross entropy"]))
    tensors = operands()
    tensors[1] = torch.rand(6, 11, dtype=torch.float64).softmax(1)
    same(ran(body.fused, tensors), ran(body, tensors))
    for kind in (torch.int32, torch.uint8):
        tensors[1] = torch.randint(0, 11, (6,), dtype=kind)
        ends = [_end(run, tensors) for run in (body, body.fused)]
        assert isinstance(ends[0], str) or ends[0].equal(ends[1])
        assert not isinstance(ends[0], str) or ends[0] == ends[1]


def _end(body: Body, tensors: list[Tensor]) -> Any:
    try:
        return ran(body, tensors)[0]
    except RuntimeError as error:
        return str(error)


def test_class_weights_with_a_gradient_are_refused() -> None:
    body = read(chained("", LINES["smoothed, weighted"]))
    tensors = operands()
    tensors[5].requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        body.fused(tensors)


NOT_IN_PLACE = {
    "another reader": "l = aten.logsumexp.default(x, [1], True); e = aten.sub.Tensor(x, l); "
    "f = aten.exp.default(e); a = aten.amax.default(f, [1])",
    "a result": "l = aten.logsumexp.default(x, [1], True); y = aten.slice.Tensor(x, 1, 0, 1); "
    "a = aten.sub.Tensor(y, l)",
    "a reader that saves": "q = aten.pow.Tensor_Scalar(x, 2); m = aten.sum.dim_IntList(q, [1]); "
    "l = aten.logsumexp.default(x, [1]); a = aten.add.Tensor(l, m)",
    "saved by tanh": "x = aten.tanh.default(p); a = aten.logsumexp.default(x, [1])",
    "saved by exp": "x = aten.exp.default(p); a = aten.logsumexp.default(x, [1])",
    "saved by softmax": "x = aten._softmax.default(p, 1, False); "
    "a = aten.cross_entropy_loss.default(x, t, None, 0)",
    "a view": "x = aten.slice.Tensor(p, 1, 0, 9); l = aten.logsumexp.default(x, [1]); "
    "m = aten.amax.default(p, [1]); a = aten.add.Tensor(l, m)",
    "an alias": "x = aten.contiguous.default(p); l = aten.logsumexp.default(x, [1]); "
    "q = aten.pow.Tensor_Scalar(p, 2); m = aten.sum.dim_IntList(q, [1]); a = aten.add.Tensor(l, m)",
    "used by mul": "l = aten.logsumexp.default(x, [1], True); q = aten.mul.Tensor(x, x); "
    "m = aten.sum.dim_IntList(q, [1], True); a = aten.mul.Tensor(l, m)",
}


@pytest.mark.parametrize("case", NOT_IN_PLACE)
def test_matrices_that_are_needed_otherwise_are_not_written_over(case: str) -> None:
    lines = NOT_IN_PLACE[case]
    body = read(
        text(lines if "x =" in lines else lines.replace("(x,", "(p,").replace(", x)", ", p)"))
    )
    step = step_of(body)
    assert step is not None
    assert not step.in_place
    tensors = operands()
    same(ran(body.fused, tensors), ran(body, tensors), 1e-9)


NO_KIN = {
    "entropy": "l = aten.log_softmax.int(x, 1); e = aten.exp.default(l); "
    "m = aten.mul.Tensor(e, l); a = aten.sum.dim_IntList(m, [1])",
    "no softmax": "m = aten.amax.default(x, [1], True); g = aten.gather.default(x, 1, i); "
    "a = aten.sub.Tensor(m, g)",
    "over rows": "l = aten.logsumexp.default(x, [0], True); "
    "m = aten.sum.dim_IntList(x, [1], True); a = aten.add.Tensor(m, l)",
    "in another dtype": "l = aten.log_softmax.int(x, 1, torch.float32); "
    "a = aten.gather.default(l, 1, i)",
    "a place that depends": "l = aten.logsumexp.default(x, [1], True); "
    "j = aten._to_copy.default(l, dtype=torch.int64); c = aten.clamp.default(j, 0, 3); "
    "a = aten.gather.default(x, 1, c)",
    "mean": "l = aten.cross_entropy_loss.default(x, t, None, 1); "
    "m = aten.sum.dim_IntList(x, [1], True); a = aten.mul.Tensor(m, l)",
}


@pytest.mark.parametrize("case", NO_KIN)
def test_look_alikes(case: str) -> None:
    body = read(text(NO_KIN[case].replace("(x,", "(p,")))
    assert step_of(body) is None
    tensors = operands()
    same(ran(body.fused, tensors), ran(body, tensors))


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_heads_that_are_of_the_kin(head: Head) -> None:
    assert (step_of(read(head.body)) is None) == (head.name == "distillation from a second head")


@pytest.mark.parametrize("chain", ["product", "tempered", "biased", "upcast"])
def test_the_slope_takes_the_memory_of_the_matrix(chain: str) -> None:
    body = read(chained(CHAINS[chain], LINES["smoothed"]))
    tensors = operands()
    x = tensors[0].requires_grad_()
    with Storages(x.numel()) as seen:
        loss = body.fused([x, *tensors[1:]])[0][0]
        (slope,) = torch.autograd.grad(loss.sum(), x)
    if chain == "product":
        assert slope.data_ptr() == x.data_ptr()
    tempered = chain == "tempered"  # the slope of a quotient is another one
    assert len(seen.pointers - {x.data_ptr()}) == (chain != "product") + tempered


def test_one_matrix_and_one_product_are_held() -> None:
    """In float32 the product of a chunk alone; in bfloat16 the float32 copy of a piece besides."""
    for dtype, most in ((torch.float32, 1), (torch.bfloat16, 3)):
        call = make(CROSS_ENTROPY, 64, 4099, 7).to(dtype)
        groups = Operands(call.hidden, call.weight, call.rows, call.whole)
        flags = [t.requires_grad for t in call.all]
        with Storages(64 * 4099) as seen, torch.no_grad():
            Loop(read(CROSS_ENTROPY.body), groups, 0).run_with_gradients(flags, [True])
        assert len(seen.pointers) <= most


class Storages(Recorder):
    """Notes the memory of tensors that have at least some number of elements."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.pointers = least, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, list | tuple) else [made]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.least:
                self.pointers.add(tensor.untyped_storage().data_ptr())
        return made
