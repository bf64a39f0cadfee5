"""The files of an encoder and a decoder, held to their programs and to the model in a generation.

Each file was compared by itself when it was written. Here the second reads what the first gave, and
the third what both gave: they must fit, as they will where they are deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt.emit.onnx_decoding import Step, file_step, hold_walk, program_step
from graphopt.emit.onnx_runtime import open_session
from graphopt.huggingface_caches import PAST, PRESENT
from graphopt.huggingface_inputs import random_tokens
from graphopt.huggingface_seq2seq import DECODER, ENCODER, WITH_PAST, Part
from graphopt.program import Program

PROMPTS = (1, 4)
"""First tokens of a text, of which there is one or several (Whisper's language and task)."""
SOURCES = (6, 11)
"""Tokens of the source, where its length may vary."""
MORE = 4
"""Tokens that follow one by one."""

Steps = Mapping[str, Step]


def hold_seq2seq(
    folder: Path,
    parts: Sequence[Part],
    programs: Sequence[Program],
    captured: Sequence[Program],
    model: nn.Module,
    measured: float = 0.0,
) -> float:
    """Encode sources and decode tokens one by one; the largest error of logits of the files.

    Sources of two lengths, one row padded, and texts that begin with one token and with several.
    The captured programs are held to the model, and the files to the optimized programs.

    Args:
        folder: where the files of ``parts`` lie.
        measured: as in `hold_decoder`.

    Raises:
        VerificationError: logits differ, or are not finite.
    """
    steps = [
        _of_programs(parts, captured),
        _of_programs(parts, programs),
        {part.file: file_step(open_session(folder / part.file)) for part in parts},
    ]
    worst = 0.0
    for prompt, length in zip(PROMPTS, SOURCES, strict=True):
        source = _source(parts[0], length)
        rows, count = len(next(iter(source.values()))), prompt + MORE
        ids = random_tokens(model.config, (rows, count), count)
        with torch.no_grad():
            wanted = model(**source, decoder_input_ids=ids, use_cache=False).logits
        where = f"{prompt} first tokens and {MORE} behind them"
        walk = _walk(source, ids, prompt)
        worst = max(worst, hold_walk(walk, steps, wanted, torch.ones_like(ids), measured, where))
    return worst


def _of_programs(parts: Sequence[Part], programs: Sequence[Program]) -> Steps:
    made = {}
    for part, program in zip(parts, programs, strict=True):
        assert part.names is not None
        made[part.file] = program_step(program, part.names)
    return made


def _walk(source: Mapping[str, Tensor], ids: Tensor, prompt: int) -> Callable[[Steps], Tensor]:
    """Logits ``(B, T, V)``: of the first tokens at once, of those behind them one by one."""

    def walk(steps: Steps) -> Tensor:
        states = steps[ENCODER](source)["last_hidden_state"]
        given = {"encoder_hidden_states": states}
        if "attention_mask" in source:
            given["encoder_attention_mask"] = source["attention_mask"]
        found = dict(steps[DECODER]({"input_ids": ids[:, :prompt], **given}))
        logits, kept = [found.pop("logits")], found
        for start in range(prompt, ids.shape[1]):
            past = {name.replace(PRESENT, PAST): t for name, t in kept.items()}
            found = dict(
                steps[WITH_PAST]({"input_ids": ids[:, start : start + 1], **given, **past})
            )
            logits.append(found.pop("logits"))
            kept = {**kept, **found}
        return torch.cat(logits, 1)

    return walk


def _source(encoder: Part, length: int) -> dict[str, Tensor]:
    """Two rows of a source, the second one padded; features of sounds as they were captured."""
    kwargs = encoder.inputs.kwargs
    if "input_ids" not in kwargs:
        return dict(kwargs)
    generator = torch.Generator().manual_seed(length)
    known = kwargs["input_ids"].flatten()
    ids = known[torch.randint(len(known), (2, length), generator=generator)]
    mask = torch.ones_like(ids)
    mask[1, length - length // 3 :] = 0
    return {"input_ids": ids, "attention_mask": mask}
