"""What rows of calibration inputs count by."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from graphopt.capture import capture
from graphopt.passes import QuantizeMatmul
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.quantize import factors
from graphopt.passes.quantize.observed import Observed
from graphopt.passes.quantize.plan import calibrate, products_of
from graphopt.passes.quantize.token_scores import LEAST, received, scaled
from graphopt.passes.quantize.weights import QuantizeWeights
from graphopt.program import Program
from graphopt.rewrite.driver import apply_rules

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Grouped heads, causal; tokens are the middle axis."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = F.layer_norm(x, (WIDTH,))
        key, value = self.key_value(y).chunk(2, -1)
        q = self.query(3 * y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (HEADS // 2, -1)).transpose(1, 2) for t in (key, value))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        made = F.scaled_dot_product_attention(*self.heads(x), is_causal=True, enable_gqa=True)
        x = x + self.out(made.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(F.layer_norm(x, (WIDTH,)))))


class Model(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return F.layer_norm(x, (WIDTH,))


def model() -> Model:
    torch.manual_seed(0)
    return Model().eval()


def batches(sizes: tuple[int, ...] = (24, 24, 24)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, size, WIDTH, generator=generator) for size in sizes]


def weights_of(block: Block, x: Tensor) -> Tensor:
    """By hand: r^2 for the tokens ``(B, S)`` of a sample."""
    q, k, _ = block.heads(x)
    logits = q @ k.repeat_interleave(2, 1).mT / (WIDTH // HEADS) ** 0.5
    seen = torch.ones(x.shape[1], x.shape[1]).tril().bool()
    scores = logits.masked_fill(~seen, -torch.inf).softmax(-1).sum((1, 2))
    low, high = scores.min(), scores.max()
    return (LEAST + (1 - LEAST) * (scores - low) / (high - low)).square()


def prepared(
    module: nn.Module, data: list[Tensor], dynamic: Any = None, **options: Any
) -> tuple[Program, QuantizeWeights]:
    program = capture(module.eval(), (data[0],), dynamic_shapes=dynamic)
    apply_rules(program, list(Canonicalize().rules()))
    options = {"bits": 3, "activations": None, "method": "gptq", "head": True, **options}
    stage = QuantizeMatmul(**options).stages()[-1]
    assert isinstance(stage, QuantizeWeights)
    return program, stage


def test_attention_that_is_got() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 4, 300, 8), torch.randn(2, 2, 300, 8)
    mask = torch.rand(300, 300) < 0.5
    mask[7] = False
    logits = q @ k.repeat_interleave(2, 1).mT * 0.5
    exact = logits.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num(0).sum(-2)
    torch.testing.assert_close(received(q, k, mask, scale=0.5), exact)
    bias = torch.randn(2, 1, 1, 300)
    exact = (logits + bias).softmax(-1).sum(-2)
    torch.testing.assert_close(received(q, k, bias, scale=0.5), exact)
    assert torch.equal(scaled(torch.tensor([3.0, 5.0, 4.0])), torch.tensor([LEAST, 1, 0.505]))
    assert torch.equal(scaled(torch.ones(3)), torch.ones(3))


@pytest.mark.parametrize("sizes", [(24, 24), (24, 7, 31)], ids=str)
def test_moments_are_those_of_scaled_rows(sizes: tuple[int, ...]) -> None:
    data, module = batches(sizes), model()
    dynamic = ({1: torch.export.Dim.DYNAMIC},) if len({*sizes}) > 1 else None
    program, stage = prepared(module, data, dynamic)
    products = [n for m in stage.matches(program) for n in products_of(m)]
    assert len(products) == 10
    observed = Observed(program, [[x] for x in data], products, importance="attention")
    given: dict[str, list[Tensor]] = {}
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            seen = given.setdefault(name, [])
            layer.register_forward_hook(lambda _m, args, _o, seen=seen: seen.append(args[0]))
    with torch.no_grad():
        counts = [
            [weights_of(b, x) for x in inputs(module, i, data)] for i, b in enumerate(module.blocks)
        ]
        for seen in given.values():
            seen.clear()
        for x in data:
            module(x)
        while observed.left:
            product = observed.next()
            name = str(program.target_of(product.args[1])).removesuffix(".weight")
            block = int(name.split(".")[1])
            pairs = zip(given[name], counts[block], strict=True)
            exact = sum(torch.einsum("bs,bsi,bsj->ij", r, x, x) for x, r in pairs)
            torch.testing.assert_close(
                observed.statistics[product.args[0]].moment, exact, rtol=1e-3, atol=1e-3
            )
            observed.keep([])
            assert len(observed.importance.scores) <= 1
    assert not observed.importance.unknown


def inputs(module: Model, depth: int, data: list[Tensor]) -> list[Tensor]:
    for block in module.blocks[:depth]:
        data = [block(x) for x in data]
    return data


def test_lengths_of_rows() -> None:
    data = [torch.randn(5, WIDTH)]
    program, stage = prepared(nn.Sequential(nn.Linear(WIDTH, WIDTH)), data)
    products = [n for m in stage.matches(program) for n in products_of(m)]
    observed = Observed(program, [data], products, importance="norm")
    observed.next()
    size = data[0].norm(dim=1)
    r = LEAST + (1 - LEAST) * (size - size.min()) / (size.max() - size.min())
    exact = data[0].T @ (r.square()[:, None] * data[0])
    torch.testing.assert_close(observed.statistics[products[0].args[0]].moment, exact)


@pytest.mark.parametrize(
    "options", [{"method": "gptq"}, {"method": "learned", "steps": 3}], ids=str
)
def test_weights_follow_what_counts(options: dict[str, Any]) -> None:
    samples, found = [[x] for x in batches()[:2]], {}
    program, _ = prepared(model(), samples[0])
    for importance, again in ((None, 0), ("attention", 0), ("attention", 1), ("norm", 0)):
        step = QuantizeMatmul(bits=3, activations=None, importance=importance, **options)
        made: Any = step.stages()[-1].calibrated(program, samples, lambda _text: None)
        assert len(made.plan.weights) == 10
        assert not any("count the same" in note for note in made.plan.notes.values())
        found[importance, again] = made.plan.weights["blocks.1.up.weight"].dequantize()
    assert torch.equal(found["attention", 0], found["attention", 1])
    assert not torch.equal(found[None, 0], found["attention", 0])
    assert not torch.equal(found["norm", 0], found["attention", 0])


def test_factors_follow_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    class Watched(Observed):
        def __init__(self, *args: Any, importance: Any = None) -> None:
            asked.append(importance)
            super().__init__(*args, importance=importance)

    monkeypatch.setattr(factors, "Observed", Watched)
    samples = [[x] for x in batches()[:1]]
    program, _ = prepared(model(), samples[0])
    step = QuantizeMatmul(bits=3, activations=None, method="awq", importance="attention")
    step.stages()[1].calibrated(program, samples, lambda _text: None)
    assert asked == ["attention"]


class Words(nn.Module):
    """Of token ids, with kinds of tokens and places besides."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.kinds = nn.Embedding(40, WIDTH), nn.Embedding(2, WIDTH)
        self.words, self.model = nn.Embedding(50, WIDTH), Model()

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1]))
        return self.model(self.kinds(ids % 2) + self.words(ids.view(ids.shape)) + places)


def sums(module: nn.Module, data: list[Tensor], rows: list[Tensor]) -> dict[str, Tensor]:
    """By hand: the moment of each layer's inputs whose rows ``(B, S)`` count r^2."""
    found: dict[str, Tensor] = {}
    at = [torch.empty(0)]

    def add(name: str, x: Tensor) -> None:
        found[name] = found.get(name, 0) + torch.einsum("bs,bsi,bsj->ij", at[0], x, x)

    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(lambda _m, args, _o, name=name: add(name, args[0]))
    with torch.no_grad():
        for x, counts in zip(data, rows, strict=True):
            at[0] = counts
            module(x)
    return found


def moments(module: nn.Module, data: list[Tensor], dynamic: Any, kind: str) -> dict[str, Tensor]:
    program, stage = prepared(module, data, dynamic)
    products = [n for m in stage.matches(program) for n in products_of(m)]
    observed = Observed(program, [[x] for x in data], products, importance=kind)
    assert not observed.importance.unknown
    found = {}
    while observed.left:
        product = observed.next()
        name = str(program.target_of(product.args[1])).removesuffix(".weight")
        found[name] = observed.statistics[product.args[0]].moment
    return found


@pytest.mark.parametrize("sizes", [(24, 24), (24, 7, 31)], ids=str)
@pytest.mark.parametrize("kind", ["first", "first:5", "first:100", "frequency"])
def test_rows_count_by_place_or_frequency_of_their_token(kind: str, sizes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    data = [(torch.rand(2, size, generator=generator).square() * 50).long() for size in sizes]
    torch.manual_seed(0)
    module, rows = Words().eval(), []
    counts = torch.cat([x.flatten() for x in data]).bincount(minlength=50)
    for x in data:
        first = {"first": x.shape[1] // 4, "first:5": 5}.get(kind, 100)
        near = (torch.arange(x.shape[1]) < first).float().expand(x.shape)
        scores = -counts[x].float() if kind == "frequency" else near
        rows.append(scaled(scores).square())
    assert kind == "first:100" or all(r.min() < 1e-3 and r.max() > 0.999 for r in rows)
    dynamic = ({1: torch.export.Dim.DYNAMIC},) if len({*sizes}) > 1 else None
    found = moments(module, data, dynamic, kind)
    exact = sums(module, data, rows)
    assert len(exact) == 10
    for name, moment in exact.items():
        torch.testing.assert_close(found[name], moment, rtol=1e-3, atol=1e-3)


def test_first_tokens_are_found_without_ids() -> None:
    data = batches((24,))
    found = moments(model(), data, None, "first:3")
    rows = [torch.where(torch.arange(24) < 3, 1.0, LEAST**2).expand(2, 24)]
    for name, moment in sums(model(), data, rows).items():
        torch.testing.assert_close(found[name], moment, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["first", "frequency"])
@pytest.mark.parametrize("method", ["gptq", "propagate", "awq", "learned", "outliers"])
def test_methods_count_so(kind: str, method: str) -> None:
    data = [torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    torch.manual_seed(0)
    program, _ = prepared(Words(), data)
    found = []
    for importance in (None, kind):
        step = QuantizeMatmul(bits=3, activations=None, method=method, importance=importance)
        made: Any = step.stages()[-1].calibrated(program, [[x] for x in data], lambda _text: None)
        assert not any("count the same" in note for note in made.plan.notes.values())
        found.append(made.plan.weights["model.blocks.1.up.weight"].dequantize())
    assert not torch.equal(*found)


class Apart(nn.Module):
    """Attention over channels: no row is a token of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x).mT
        return self.outside(F.scaled_dot_product_attention(y, y, y).mT)


class Folded(nn.Module):
    """Words of a sequence as features of one row: no row is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inside = nn.Embedding(50, 4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x * 7).long().remainder(50)[..., : WIDTH // 4]
        return self.inside(self.words(ids).sum(2).repeat(1, 1, WIDTH // 4)) + x


@pytest.mark.parametrize(
    ("module", "kind", "reason"),
    [
        (nn.Sequential(nn.Linear(WIDTH, WIDTH)), "attention", "has no attention"),
        (nn.Sequential(nn.Linear(WIDTH, WIDTH)), "first", "has no attention"),
        (nn.Sequential(nn.Linear(WIDTH, WIDTH)), "frequency", "looks no table up"),
        (Apart(), "attention", "no attention looks at"),
        (Apart(), "first:3", "no attention looks at"),
        (Folded(), "frequency", "no token ids"),
    ],
)
def test_rows_that_are_no_tokens_count_the_same_and_it_is_said(
    module: nn.Module, kind: str, reason: str
) -> None:
    data = batches()
    plans = []
    for importance in (None, kind):
        program, stage = prepared(module, data, importance=importance)
        samples = [[x] for x in data]
        matches = stage.matches(program)
        plans.append(calibrate(program, matches, samples, stage.settings, lambda _text: None))
    assert plans[1].notes and all(reason in note for note in plans[1].notes.values())
    for name, weight in plans[0].weights.items():
        assert torch.equal(weight.dequantize(), plans[1].weights[name].dequantize())


def test_options() -> None:
    for options, reason in (
        ({"importance": "size", "method": "gptq"}, "none of 'attention', 'norm'"),
        ({"importance": "first:0", "method": "gptq"}, "such as 'first:64'"),
        ({"importance": "first:", "method": "gptq"}, "such as 'first:64'"),
        ({"importance": "norm:3", "method": "gptq"}, "none of"),
        ({"importance": "norm"}, "has none of them"),
        ({"importance": "norm", "method": "smoothquant"}, "has none of them"),
    ):
        with pytest.raises(ValueError, match=reason):
            QuantizeMatmul(**options)
