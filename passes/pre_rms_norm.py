"""Pre-LN transformers as Pre-RMSNorm transformers: a stream without a mean needs none removed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.passes import pre_rms_examples as cases
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.residual_stream import Stream, between, find_streams
from graphopt.passes.stream_writers import can_centre, centred, scaled_linear
from graphopt.program import Program, val
from graphopt.rewrite import Builder, Candidate, Example, Match, Pass, Refusal, Rule, arguments

aten = torch.ops.aten


class CentreStream(Rule):
    """``LN(s) = RMSNorm(s) * gamma + beta`` where ``mean(s) = 0``, once every writer is centred.

    A linear layer that writes ``W x + b`` to the residual stream writes ``(W - 1 mean(W)) x + (b -
    mean(b))`` instead, an embedding rows less their means; sums and views keep the mean at zero.
    Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers", section 3. What cannot be
    centred beforehand (an embedding tied to the head) is centred as it is written.
    """

    benefit = 2

    def find(self, program: Program) -> Iterator[Candidate]:
        for stream in find_streams(program):
            writers = stream.writers()
            if len(stream.norms) < 2 and not any(w.target is _NORM for w in writers):
                continue
            scaled = [m for w in writers if (m := scaled_linear(program, w)) is not None]
            ends = (*stream.values, *scaled, *stream.norms)
            inside = between(program, ends)
            roots = tuple(stream.norms)
            escapes = frozenset(inside) - set(roots)
            yield Candidate(Match(program, roots, tuple(inside), {"stream": stream}, escapes))

    def check(self, match: Match) -> Refusal | None:
        stream: Stream = match["stream"]
        late = [w for w in stream.writers() if not can_centre(match.program, w, stream)]
        post = next((w for w in late if w.target is _NORM), None)
        if post is not None and 2 * len(late) > len(stream.norms):
            return Refusal(f"post-LN: the residual is the output of `{post.name}`", post)
        if not match.program.frozen:
            return Refusal("the model trains: its parameters may not be folded", match.root)
        if stream.refusal is not None:
            return stream.refusal
        if 2 * len(late) > len(stream.norms):
            reason = f"`{late[0].name}` writes to the stream and cannot be centred beforehand"
            return Refusal(f"{reason}, nor can {len(late) - 1} others", late[0])
        return None

    def rewrite(self, match: Match, build: Builder) -> tuple[fx.Node, ...]:
        stream: Stream = match["stream"]
        made: dict[fx.Node, fx.Node] = {}
        for node in _in_order(match.program, stream):
            if node.op == "call_function":
                build.anchor = node
            if node in stream.inner:
                copied = fx.node.map_arg((node.args, node.kwargs), lambda n: made.get(n, n))
                made[node] = build(node.target, *copied[0], **copied[1])
            elif node in stream.values:
                made[node] = centred(match.program, node, stream, build)
            else:
                made[node] = _rms_norm(node, made[node.args[0]], build)
                build.substitute(node, made[node])
        return tuple(made[norm] for norm in match.roots)

    def prepare(self) -> Iterable[Pass]:
        return (Canonicalize(),)

    def examples(self) -> Iterable[Example]:
        return cases.examples()

    def near_misses(self) -> Iterable[Example]:
        return cases.near_misses()


_NORM = aten.layer_norm.default


def _in_order(program: Program, stream: Stream) -> Sequence[fx.Node]:
    """Writers, sums, views and norms of a stream, in graph order."""
    wanted = {*stream.values, *stream.norms}
    return [n for n in program.graph.nodes if n in wanted]


def _rms_norm(norm: fx.Node, source: fx.Node, build: Builder) -> Any:
    given = arguments(norm)
    made = build(
        aten.rms_norm.default, source, given["normalized_shape"], given["weight"], given["eps"]
    )
    if given["bias"] is not None:
        made = build(aten.add.Tensor, made, given["bias"])
    dense = val(norm).is_contiguous() and not val(made).is_contiguous()
    return build(aten.contiguous.default, made) if dense else made


@dataclass(frozen=True)
class PreRMSNorm(Pass):
    """Turn LayerNorms that read a residual stream into RMSNorms by centring what writes to it."""

    def rules(self) -> Sequence[Rule]:
        return (CentreStream(),)
