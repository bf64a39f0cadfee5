"""Heads that become one operator, and look-alikes that must not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

from graphopt.passes.loss_head import grouped
from graphopt.rewrite import Example

CLASSES, WIDTH = 520, 12
BATCH, TOKENS = 4, 65
IGNORED = -100

Function = Callable[..., Any]


class Head(nn.Module):
    """A head ``w (V, D)`` with what losses use besides: a teacher, class weights, a temperature."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.w = nn.Parameter(torch.randn(CLASSES, WIDTH))
        self.b = nn.Parameter(torch.randn(CLASSES))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.register_buffer("teacher", torch.randn(CLASSES, WIDTH))
        self.register_buffer("weights", torch.rand(CLASSES) + 0.5)

    def forward(self, h: Tensor, t: Tensor) -> Any:
        return self.function(self, h, t)

    def logits(self, h: Tensor) -> Tensor:
        return F.linear(h, self.w)

    def taught(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            return F.linear(h * 0.9, self.teacher)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def loss(x: Tensor, t: Tensor, **options: Any) -> Tensor:
    return F.cross_entropy(flat(x), t.reshape(-1), **options)


def chosen(x: Tensor, t: Tensor) -> Tensor:
    return x.log_softmax(-1).gather(-1, t.unsqueeze(-1)).squeeze(-1)


def shifted(m: Head, h: Tensor, t: Tensor) -> Tensor:
    return loss(m.logits(h)[:, :-1].float().contiguous(), t[:, 1:], ignore_index=3)


def padded(m: Head, h: Tensor, t: Tensor) -> Tensor:
    return loss(m.logits(h), F.pad(t, (0, 1), value=IGNORED)[:, 1:], ignore_index=IGNORED)


def with_z(m: Head, h: Tensor, t: Tensor) -> Tensor:
    x = m.logits(h)
    return loss(x, t) + 1e-3 * x.logsumexp(-1).square().mean()


def capped(m: Head, h: Tensor, t: Tensor) -> Tensor:
    return loss(30 * torch.tanh(F.linear(h, m.w, m.b) / 30), t)


def weighted(m: Head, h: Tensor, t: Tensor) -> Tensor:
    keep = (t > 100).float()
    each = F.cross_entropy(m.logits(h).mT, t, reduction="none")
    return (each * keep).sum() / keep.sum()


def with_accuracy(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x = m.logits(h)
    return loss(x, t), (x.argmax(-1) == t).float().mean()


def of_other_rows(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x = m.logits(h)
    return loss(x[:, :-1], t[:, 1:]) + 1e-3 * x.logsumexp(-1).mean(), x.argmax(-1)


def distilled(m: Head, h: Tensor, t: Tensor) -> Tensor:
    student, teacher = m.logits(h) / 2, m.taught(h) / 2
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="sum") * 4 / t.numel()


def jensen_shannon(m: Head, h: Tensor, _: Tensor) -> Tensor:
    p, q = m.logits(h).log_softmax(-1), m.taught(h).log_softmax(-1)
    middle = torch.stack([p, q]).logsumexp(0) - 0.6931471805599453
    sides = [F.kl_div(middle, x, reduction="none", log_target=True).sum(-1) for x in (p, q)]
    return (0.5 * sides[0] + 0.5 * sides[1]).mean()


def preferred(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Rafailov et al. 2023: the first half of the batch is preferred over the second."""
    ratio = (chosen(m.logits(h), t) - chosen(m.taught(h), t)).sum(-1)
    return -F.logsigmoid(0.1 * (ratio[:2] - ratio[2:])).mean()


def policy(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Shao et al. 2024: clipped policy gradient on sampled tokens, with an entropy bonus."""
    logs = m.logits(h).log_softmax(-1)
    picked = logs.gather(-1, t.unsqueeze(-1)).squeeze(-1)
    ratio, gain = (picked - picked.detach()).exp(), h[:, :1, 0].detach()
    entropy = -(logs.exp() * logs).sum(-1)
    return -(torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain) + 0.01 * entropy).mean()


def contrastive(m: Head, h: Tensor, _: Tensor) -> Tensor:
    """Radford et al. 2021: rows and columns both take part."""
    left, right = F.normalize(flat(h), dim=-1), F.normalize(flat(h).flip(0) + 0.1, dim=-1)
    x = m.scale.exp() * left @ right.T
    places = torch.arange(x.shape[0])
    return (F.cross_entropy(x, places) + F.cross_entropy(x.T, places)) / 2


def sigmoid_pairs(m: Head, h: Tensor, _: Tensor) -> Tensor:
    """Zhai et al. 2023."""
    x = flat(h) @ flat(h.tanh()).T * m.scale.exp() - 1.0
    return -F.logsigmoid(x * (2 * torch.eye(BATCH * TOKENS) - 1)).sum(-1).mean()


def labelled_classes(m: Head, h: Tensor, t: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(m.logits(h), F.one_hot(t, CLASSES).float())


def margin(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Wang et al. 2018: a margin on the cosine of the target."""
    cosine = F.linear(F.normalize(h, dim=-1), F.normalize(m.w, dim=-1))
    return loss(30.0 * (cosine - 0.3 * F.one_hot(t, CLASSES)), t)


def margin_in_place(m: Head, h: Tensor, t: Tensor) -> Tensor:
    x, rows = F.linear(flat(h), m.w), torch.arange(t.numel())
    x[rows, t.flatten()] -= 0.3
    return loss(10.0 * x, t)


def without_classes(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Classes that are none, and one that is another's double, written over."""
    x = m.logits(h)
    x[..., 512:] = -1e4
    x[..., 7] = 0.5 * x[..., 3] - 1
    return loss(x, t % 512)


def yes_or_no(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Two tokens of all."""
    x = m.logits(h)
    return F.softplus((x[..., 7] - x[..., 9]) * t.sign()).mean()


def of_two_halves(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Rafailov et al. 2023, with the preferred answers and the others apart."""
    logs = [chosen(x, y).sum(-1) for x, y in zip(m.logits(h).chunk(2), t.chunk(2), strict=True)]
    return -F.logsigmoid(0.1 * (logs[0] - logs[1])).mean()


def of_two_vocabularies(m: Head, h: Tensor, t: Tensor) -> Tensor:
    parts = m.logits(h).split([200, 320], -1)
    return sum((loss(x, t % x.shape[-1]) for x in parts), torch.zeros(()))


def with_queue(m: Head, h: Tensor, _: Tensor) -> Tensor:
    """He et al. 2020: one positive for each query, negatives from a queue."""
    query, queue = flat(F.normalize(h, dim=-1)), F.normalize(m.teacher, dim=-1)
    own = (query * query.flip(-1)).sum(-1, keepdim=True)
    x = torch.cat([own, query @ queue.T], 1) / 0.07
    return F.cross_entropy(x, torch.zeros(len(query), dtype=torch.int64))


def on_soft_targets(m: Head, h: Tensor, t: Tensor) -> Tensor:
    targets = 0.9 * F.one_hot(t.flatten(), CLASSES).float() + 0.1 / CLASSES
    return F.cross_entropy(flat(m.logits(h)), targets)


def on_learned_targets(m: Head, h: Tensor, t: Tensor) -> Tensor:
    share = m.scale.sigmoid()
    targets = share * F.one_hot(t.flatten(), CLASSES) + (1 - share) / CLASSES
    return F.cross_entropy(flat(m.logits(h)), targets)


def of_masked(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Devlin et al. 2019: only some tokens are predicted."""
    keep = t > 100
    return F.cross_entropy(m.logits(h)[keep], t[keep])


MASKS_COMPARED = torch.torch_version.TorchVersion(torch.__version__) >= (2, 13)
"""Whether capture takes selections by a mask that is spelled twice; torch 2.11 refuses them."""


def of_answers(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Shifted, flat, and the mask spelled twice."""
    x, y = flat(m.logits(h)[:, :-1]).float(), t[:, 1:].flatten()
    return F.cross_entropy(x[y != 7], y[y != 7], label_smoothing=0.1)


def of_found(m: Head, h: Tensor, t: Tensor) -> Tensor:
    places = (t.flatten() > 100).nonzero().squeeze(-1)
    x = flat(m.logits(h)).index_select(0, places)
    return F.cross_entropy(x, t.flatten()[places])


def of_sampled(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Log-probabilities of sampled tokens where a mask says so."""
    logs = (m.logits(h) / 0.7).log_softmax(-1)
    return -logs[t > 100].gather(-1, t[t > 100].unsqueeze(-1)).mean()


def of_masked_teacher(m: Head, h: Tensor, t: Tensor) -> Tensor:
    keep = t > 100
    student, teacher = (x[keep] for x in (m.logits(h), m.taught(h)))
    return F.kl_div(student.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


def of_masked_with_accuracy(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of some rows, a metric of all."""
    x, keep = m.logits(h), t > 100
    return F.cross_entropy(x[keep], t[keep]), (x.argmax(-1) == t).float().mean()


def at_positions(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Some positions more than once."""
    batch, places = torch.arange(h.shape[0])[:, None], t[:, :50] % 20
    return loss(m.logits(h)[batch, places], t[batch, places])


ROWS = {0: Dim("batch"), 1: Dim("tokens", min=2)}
DYNAMIC = (ROWS, ROWS)


def smoothed_by_hand(m: Head, h: Tensor, t: Tensor) -> Tensor:
    logs = flat(m.logits(h)).log_softmax(-1)
    wanted = torch.full_like(logs.detach(), 1e-4).scatter(1, t.reshape(-1, 1), 0.9)
    return -(wanted * logs).sum(-1).mean()


def one_hot_by_hand(m: Head, h: Tensor, t: Tensor) -> Tensor:
    logs = flat(m.logits(h)).log_softmax(-1)
    wanted = torch.zeros(t.numel(), CLASSES).scatter(1, t.reshape(-1, 1), 0.9) + 1e-4
    return -(wanted * logs).sum(-1).mean()


def over_kin(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """The mean over all classes of a label's kind, which are counted."""
    kin = t.reshape(-1, 1) % 7 == torch.arange(CLASSES) % 7
    logs = flat(m.logits(h)).log_softmax(-1)
    return -((logs * kin).sum(-1) / kin.sum(-1)).mean()


def masked_divergence(m: Head, h: Tensor, t: Tensor) -> Tensor:
    """Jensen-Shannon divergence of some rows, selected behind it."""
    p, q = m.logits(h).log_softmax(-1), m.taught(h).log_softmax(-1)
    mean = torch.logaddexp(p - 0.4, q - 1.1)
    each = F.kl_div(mean, p, reduction="none", log_target=True)
    each = each + F.kl_div(mean, q, reduction="none", log_target=True)
    return each[t > 100].sum() / BATCH


HEADS: dict[str, Function] = {
    "smoothed by hand": smoothed_by_hand,
    "one hot by hand": one_hot_by_hand,
    "counts of a mask": over_kin,
    "mean": lambda m, h, t: loss(m.logits(h), t),
    "bias": lambda m, h, t: loss(F.linear(h, m.w, m.b), t),
    "sum, upcast": lambda m, h, t: loss(m.logits(h).float(), t, reduction="sum"),
    "class weights": lambda m, h, t: loss(m.logits(h), t, weight=m.weights),
    "smoothed": lambda m, h, t: loss(m.logits(h), t, label_smoothing=0.1),
    "token weights": weighted,
    "capped, bias": capped,
    "z": with_z,
    "shifted": shifted,
    "padded": padded,
    "accuracy": with_accuracy,
    "other rows": of_other_rows,
    "last rows": lambda m, h, t: loss(m.logits(h)[:, -64:], t[:, -64:]),
    "nll": lambda m, h, t: F.nll_loss(flat(m.logits(h)).log_softmax(-1), t.reshape(-1)),
    "binary": labelled_classes,
    "distilled": distilled,
    "Jensen-Shannon": jensen_shannon,
    "margin": margin,
    "margin in place": margin_in_place,
    "without classes": without_classes,
    "yes or no": yes_or_no,
    "preferred": preferred,
    "policy, entropy": policy,
    "contrastive": contrastive,
    "sigmoid pairs": sigmoid_pairs,
    "two halves": of_two_halves,
    "two vocabularies": of_two_vocabularies,
    "queue": with_queue,
    "soft targets": on_soft_targets,
    "learned targets": on_learned_targets,
    "last token": lambda m, h, t: F.cross_entropy(m.logits(h)[:, -1], t[:, -1]),
    "hinge": lambda m, h, t: F.multi_margin_loss(flat(m.logits(h)), t.flatten()),
    "spread": lambda m, h, _: m.logits(h).var(-1, correction=0).mean(),
    "einsum": lambda m, h, t: loss(torch.einsum("bsd,vd->bsv", h, m.w), t),
    "best of each": lambda m, h, _: m.logits(h).topk(3, -1)[0].logsumexp(-1).mean(),
    "padded classes": lambda m, h, t: loss(m.logits(h)[..., :512], t % 512),
    "masked": of_masked,
    **({"answers": of_answers} if MASKS_COMPARED else {}),
    "found": of_found,
    "sampled": of_sampled,
    "masked teacher": of_masked_teacher,
    "masked, accuracy": of_masked_with_accuracy,
    "positions": at_positions,
    "by index": lambda m, h, t: (
        -flat(m.logits(h)).log_softmax(-1)[torch.arange(t.numel()), t.reshape(-1)].mean()
    ),
    **grouped.HEADS,
}
STATIC = frozenset({"contrastive", "sigmoid pairs", "preferred", "two halves"})
"""Heads whose sizes are written in the model."""


def _inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(BATCH, TOKENS, WIDTH), torch.randint(0, CLASSES, (BATCH, TOKENS))


def case(name: str, function: Function, **options: Any) -> Example:
    return Example(name, lambda: Head(function), _inputs, **options)


def examples() -> Iterator[Example]:
    for name, function in HEADS.items():
        yield case(name, function, training=True)
        if name not in STATIC:
            yield case(f"{name}, dynamic", function, training=True, dynamic_shapes=DYNAMIC)
    yield case("in eval mode", HEADS["mean"])
    yield case("repeated summary", _repeated, training=True)
    yield case("two heads on one weight", _two, training=True, count=2)


def _two(m: Head, h: Tensor, t: Tensor) -> Tensor:
    return loss(m.logits(h), t) + 0.3 * loss(m.logits(h.tanh()), t)


def _returned(m: Head, h: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x = m.logits(h)
    return loss(x, t), x


def _over_rows(m: Head, h: Tensor, t: Tensor) -> Tensor:
    x = m.logits(h)
    return loss(x - x.mean((0, 1)), t)


def _repeated(m: Head, h: Tensor, _: Tensor) -> Tensor:
    """A summary that is repeated counts as often."""
    highest = m.logits(h).amax(-1, keepdim=True)
    return highest.expand(-1, -1, 3).sum(-1).square().mean()


def _summary_first(m: Head, h: Tensor, _: Tensor) -> Tensor:
    return m.logits(h).mT.topk(3, 1)[0] * 2


def _rows_written(m: Head, h: Tensor, t: Tensor) -> Tensor:
    x = flat(m.logits(h))
    x[5:9] = 0.0
    return loss(x, t)


def _shorter(m: Head, h: Tensor, t: Tensor) -> Tensor:
    return -m.logits(h).log_softmax(-1).gather(-1, t[:2].unsqueeze(-1)).mean()


def near_misses() -> Iterator[Example]:
    yield case("returned", _returned, training=True, reason="output of the model")
    yield case("mean over rows", _over_rows, training=True, reason="some of the rows")
    yield case("rows written", _rows_written, training=True, reason="mixes rows")
    yield case("fewer rows", _shorter, training=True, reason="fewer rows")
    for name, function, reason in grouped.MISSES:
        yield case(name, function, training=True, reason=reason)
    yield case("summary first", _summary_first, training=True, reason="share an axis")
    yield case("an inner layer", lambda m, h, _: m.logits(h).relu() @ m.w, training=True)
    yield case("only returned", lambda m, h, _: m.logits(h).softmax(-1), training=True)
    yield case("sorted rows", lambda m, h, _: m.logits(h).sort(1)[0].sum(-1), reason="all of")
