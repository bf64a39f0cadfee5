"""Loss heads that a sweep computes in place of chunks, and others that are nearly such."""

from __future__ import annotations

from heads import CROSS_ENTROPY, DISTILLATION, PAIRS, PER_ROW, SELECTED, Z_LOSS, Head
from torch import Tensor

from graphopt.kernels.chunked_rows import read

LOSS = "aten.cross_entropy_loss.default"


def head(
    name: str,
    lines: str,
    results: str = "[a], []",
    *,
    flags: tuple[bool, ...] = (True,),
    rows: tuple[str, ...] = ("target",),
    whole: tuple[str, ...] = (),
    products: int = 1,
) -> Head:
    """A body whose eager mode is its own text on whole matrices."""
    parameters = ", ".join([*["x", "y"][:products], *rows, *whole])
    steps = lines.split("; ")
    body = "\n    ".join([f"def body({parameters}):", *steps, f"return {results}"])

    def dense(*tensors: Tensor) -> list[Tensor]:
        rows, sums, matrices = read(body)([*tensors])
        return [*rows, *sums, *(m.logsumexp(0) for m in matrices)]

    return Head(name, body, dense, flags, rows, whole, products)


CAP = "b = aten.div.Tensor(x, 3.0); c = aten.tanh.default(b); z = aten.mul.Tensor(c, 3.0); "
KIN = [
    CROSS_ENTROPY,
    Z_LOSS,
    head(
        "mean, as the pass spells it",
        f"u = aten.unsqueeze.default(some, 1); t = aten.squeeze.dim(u, 1); "
        f"l = {LOSS}(x, t, None, 0, -100, 0.0); m = aten.unsqueeze.default(l, 1); "
        "n = aten.mul.Tensor(m, heat); a = aten.sum.default(n)",
        "[], [a]",
        rows=("some",),
        whole=("heat",),
    ),
    head("smoothed", f"a = {LOSS}(x, some, None, 0, -100, 0.3)", rows=("some",)),
    head("smoothed sum", f"a = {LOSS}(x, some, None, 2, -100, 0.3)", "[], [a]", rows=("some",)),
    head("a class ignored", f"a = {LOSS}(x, target, None, 0, 1)"),
    head(
        "class weights",
        f"a = {LOSS}(x, some, classes, 0, -100)",
        rows=("some",),
        whole=("classes",),
    ),
    head(
        "weighted rows",
        f"l = {LOSS}(x, target, None, 0); a = aten.mul.Tensor(l, scale)",
        rows=("target", "scale"),
    ),
    head(
        "mean and z-loss, as the pass spells it",
        f"l = {LOSS}(x, some, None, 0, -100, 0.0); m = aten.unsqueeze.default(l, 1); "
        "n = aten.logsumexp.default(x, [1], True); p = aten.pow.Tensor_Scalar(n, 2); "
        "q = aten.mul.Tensor(p, 0.001); r = aten.mul.Tensor(m, heat); "
        "s = aten.add.Tensor(r, q); a = aten.sum.default(s)",
        "[], [a]",
        rows=("some",),
        whole=("heat",),
    ),
    head(
        "bias and cap",
        f"v = aten.add.Tensor(x, bias); {CAP.replace('(x', '(v')}a = {LOSS}(z, target, None, 0)",
        whole=("bias",),
    ),
    head(
        "bias that is scaled, and another cap",
        "v = aten.add.Tensor(bias, x); w = aten.mul.Tensor(v, 0.7); c = aten.tanh.default(w); "
        f"z = aten.mul.Scalar(c, 5); a = {LOSS}(z, target, None, 0)",
        whole=("bias",),
    ),
    head(
        "scaled, then a bias",
        "v = aten.div.Tensor(x, 0.7); w = aten.add.Tensor(v, bias); "
        f"z = aten._to_copy.default(w, dtype=torch.float32); a = {LOSS}(z, target, None, 0)",
        whole=("bias",),
    ),
    head(
        "selected log-probabilities, accuracy, sums",
        "z = aten._to_copy.default(x, dtype=torch.float32); l = aten.log_softmax.int(z, -1); "
        "a = aten.gather.default(l, 1, index); m = aten.mean.dim(l, [1]); "
        "b = aten.argmax.default(z, 1, True); e = aten.eq.Tensor(b, index); "
        "g = aten.sum.dim_IntList(z, [1], True)",
        "[a, b, e, m, g], []",
        flags=(True, False, False, True, True),
        rows=("index",),
    ),
    head(
        "two losses of one target",
        f"t = aten.squeeze.dim(index, 1); b = {LOSS}(x, t, None, 0, {-(2**63) + 1}, 0.1); "
        f"c = {LOSS}(x, t, None, 0, {-(2**63) + 1}); a = aten.add.Tensor(c, b)",
        rows=("index",),
    ),
    head(
        "nll",
        "l = aten._log_softmax.default(x, 1, False); a = aten.nll_loss.default(l, some, None, 0)",
        rows=("some",),
    ),
    head("log-sum-exp alone", "a = aten.logsumexp.default(x, [-1], True)"),
]
MISSES = [
    DISTILLATION,
    PAIRS,
    PER_ROW,
    SELECTED,
    head(
        "a second product", f"z = aten.add.Tensor(x, y); a = {LOSS}(z, target, None, 0)", products=2
    ),
    head(
        "one more reader of the matrix",
        f"b = {LOSS}(x, target, None, 0); c = aten.amin.default(x, [1]); a = aten.add.Tensor(b, c)",
    ),
    head(
        "a reader of the product",
        f"z = aten.mul.Tensor(x, 2.0); b = {LOSS}(z, target, None, 0); "
        "c = aten.sum.dim_IntList(x, [1]); a = aten.add.Tensor(b, c)",
    ),
    head("columns", f"a = {LOSS}(x, target, None, 0)", "[a], [], [x]", flags=(True, True)),
    head(
        "the matrix in another dtype",
        f"z = aten._to_copy.default(x, dtype=torch.float64); a = {LOSS}(z, target, None, 0)",
    ),
    head("an operator of another kind", f"z = aten.exp.default(x); a = {LOSS}(z, target, None, 0)"),
    head(
        "a bias after the cap",
        CAP + f"w = aten.add.Tensor(z, bias); a = {LOSS}(w, target, None, 0)",
        whole=("bias",),
    ),
    head("a cap below zero", CAP.replace("c, 3.0", "c, -3.0") + f"a = {LOSS}(z, target, None, 0)"),
    head(
        "a number of each row for a bias",
        f"z = aten.add.Tensor(x, index); a = {LOSS}(z, target, None, 0)",
        rows=("target", "index"),
    ),
    head(
        "a bias twice over",
        f"z = aten.add.Tensor(x, bias, alpha=2); a = {LOSS}(z, target, None, 0)",
        whole=("bias",),
    ),
    head(
        "two targets",
        f"b = {LOSS}(x, target, None, 0); c = aten.gather.default(x, 1, index); "
        "d = aten.squeeze.dim(c, 1); a = aten.add.Tensor(b, d)",
        rows=("target", "index"),
    ),
    head(
        "two ignored classes",
        f"b = {LOSS}(x, target, None, 0); "
        f"c = {LOSS}(x, target, None, 0, 1); a = aten.add.Tensor(b, c)",
    ),
    head(
        "class weights read otherwise",
        f"b = {LOSS}(x, target, classes, 0); "
        "s = aten.sum.default(classes); a = aten.div.Tensor(b, s)",
        whole=("classes",),
    ),
    head(
        "a result beside",
        f"a = {LOSS}(x, target, None, 0); b = aten.neg.default(scale)",
        "[a, b], []",
        flags=(True, True),
        rows=("target", "scale"),
    ),
]
