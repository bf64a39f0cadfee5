"""A file that decodes, held to its program and to the model on prompts and on tokens behind them.

A program is captured, and verified, with some tokens in its cache. A prompt has none, rows of a
batch are padded, and what a step gives is what the next one reads: here the file takes that way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.emit.onnx_drafts import Names
from graphopt.emit.onnx_runtime import TOLERANCE, feed_of, open_session
from graphopt.errors import VerificationError
from graphopt.huggingface_caches import PAST, PRESENT
from graphopt.huggingface_decoding import Decoding, positions_of
from graphopt.program import Program
from graphopt.verify.whole import run_program

Step = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]

PROMPT, MORE = 8, 3
"""Tokens of the longer prompt, and tokens that follow one by one."""
WINDOW = 64
"""Windows of attention up to this size are walked past."""
FROM_MODEL = {torch.float16: 3e-2, torch.bfloat16: 0.1}
"""Largest relative error of logits against the model's own; of others, ``EXACT``."""
EXACT = 1e-3


def hold_decoder(
    path: Path,
    decoder: Decoding,
    program: Program,
    captured: Program,
    model: nn.Module,
    measured: float = 0.0,
) -> float:
    """Walk file, program and model through prompts and tokens; the largest error of the file.

    Prompts of one token and of several stand behind an empty cache, beside a row that is padded on
    its left. The captured program is held to the model, and the file to the optimized program:
    between the two lies what passes may change.

    Args:
        program: what the file was made of.
        captured: the same before passes.
        measured: relative error of the file on the captured inputs; three times as much is allowed,
            where products round activations.

    Raises:
        VerificationError: logits differ, or are not finite.
    """
    file, worst = file_step(open_session(path)), 0.0
    names = decoder.input_names, decoder.output_names
    steps = [program_step(captured, names), program_step(program, names), file]
    for prompt in (1, _longest(model)):
        ids, mask = _batch(prompt, model)
        walk = Walk(decoder, ids, mask, prompt)
        wanted, where = _of_model(model, ids, mask), f"a prompt of {prompt} tokens and {MORE} more"
        worst = max(worst, hold_walk(walk, steps, wanted, mask, measured, where))
    return worst


def hold_walk(
    walk: Callable[[Any], Tensor],
    steps: Sequence[Any],
    wanted: Tensor,
    mask: Tensor,
    measured: float,
    where: str,
) -> float:
    """The relative error of a file's logits ``(B, S, V)`` on a way from step to step.

    Args:
        steps: of the captured program, of the optimized one, and of the file.
        wanted: logits of the model, of all tokens at once.
        mask: ``(B, S)``, zero where logits mean nothing.
        measured: see `hold_decoder`.

    Raises:
        VerificationError: logits differ, or are not finite.
    """
    dtype = wanted.dtype
    captured, program, file = steps
    first = _error(walk(captured), wanted, mask)
    _check("the captured program", first, FROM_MODEL.get(dtype, EXACT), where)
    found = _error(walk(file), walk(program), mask)
    _check("the file", found, max(10 * TOLERANCE.get(dtype, 1e-5), 3 * measured), where)
    return found


class Walk:
    """Logits ``(B, S, V)`` of tokens: of a prompt at once, and of those behind it one by one."""

    def __init__(self, decoder: Decoding, ids: Tensor, mask: Tensor, prompt: int) -> None:
        self.ids, self.mask, self.prompt = ids, mask, prompt
        caches = [v for v in _tensors(decoder) if v.dim() == 4]
        names = [n for n in decoder.input_names if n.startswith(f"{PAST}.")]
        self.empty = {
            name: value.new_zeros(len(ids), value.shape[1], 0, value.shape[3])
            for name, value in zip(names, caches, strict=True)
        }
        self.positions = positions_of(mask) if "position_ids" in decoder.input_names else None

    def __call__(self, step: Step) -> Tensor:
        cache, logits, total = self.empty, [], self.ids.shape[1]
        ends = [self.prompt, *range(self.prompt + 1, total + 1)]
        for start, end in zip([0, *ends], ends, strict=False):
            values = {"input_ids": self.ids[:, start:end], "attention_mask": self.mask[:, :end]}
            if self.positions is not None:
                values["position_ids"] = self.positions[:, start:end]
            found = step({**values, **cache})
            logits.append(found["logits"])
            cache = {n: found[n.replace(PAST, PRESENT)] for n in cache}
        return torch.cat(logits, 1)


def _tensors(decoder: Decoding) -> list[Tensor]:
    found = pytree.tree_leaves(decoder.inputs.kwargs)
    return [value for value in found if isinstance(value, Tensor)]


def _longest(model: nn.Module) -> int:
    """A prompt that fills the windows of attention, unless they are wide."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    window = getattr(config, "sliding_window", None) or 0
    return max(PROMPT, window + 2) if window <= WINDOW else PROMPT


def _batch(prompt: int, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Tokens ``(2, prompt + MORE)``, and their mask: the second row of long prompts is padded."""
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(config.vocab_size, (2, prompt + MORE), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, : prompt // 3] = 0
    return ids, mask


def _of_model(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """The model's own logits, of all tokens at once and without a cache."""
    values = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in _parameters(model):
        values["position_ids"] = positions_of(mask)
    with torch.no_grad():
        logits: Tensor = model(**values).logits
    return logits


def _parameters(model: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


def program_step(program: Program, names: Names) -> Step:
    """A run of a program, by the names of its inputs and outputs."""

    def step(values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        flat = [values[name] for name in names[0]]
        outputs = run_program(program, flat, wide=False, grad=False).outputs
        return dict(zip(names[1], outputs, strict=True))

    return step


def file_step(session: Any) -> Step:
    """A run of a file, in the halves that it reads."""
    inputs = [entry.name for entry in session.get_inputs()]
    outputs = [entry.name for entry in session.get_outputs()]

    def step(values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        found = session.run(None, feed_of(session, [values[n] for n in inputs], inputs))
        return {n: torch.from_numpy(a) for n, a in zip(outputs, found, strict=True)}

    return step


def _error(found: Tensor, wanted: Tensor, mask: Tensor) -> float:
    """Relative RMS error of the logits of tokens; of padding they mean nothing."""
    seen = mask.bool()
    wide, exact = found[seen].double(), wanted[seen].double()
    return float((wide - exact).norm() / exact.norm().clamp(min=1e-30))


def _check(what: str, error: float, allowed: float, where: str) -> None:
    if not error <= allowed:
        raise VerificationError(
            f"{what} gives other logits token by token than the model it was made of: "
            f"relative error {error:.2g}, allowed {allowed:.0e}",
            where=where,
            fix="nothing was written; --recipe exact shows whether a pass is at fault",
        )
