"""One contender of `quantized_smollm2` in a process of its own, which takes steps as it is told.

``python -m benchmarks.smollm2_worker NAME FOLDER`` reads commands from its input, one a line, and
answers each with one line of JSON: ``decode``, ``prefill``, ``memory``, ``logits``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

THREADS = 2
Step = Callable[[], Tensor]


class Contender(NamedTuple):
    """``decode``: one token behind those of the cache; ``prefill``: many tokens behind one.

    Both give logits of the last token, ``(49152,)`` in float32.
    """

    decode: Step
    prefill: Step


class Inputs(NamedTuple):
    """Token ids ``(1, n)``, and keys and values in turn, ``(1, 3, n, 64)`` each; ``first`` are
    those of the first token alone."""

    prompt: Tensor
    token: Tensor
    cache: list[Tensor]
    first: list[Tensor]


@cache
def inputs_of(folder: Path, dtype: torch.dtype) -> Inputs:
    """Read at the first step: memory after loading is that of the model alone."""
    found = torch.load(folder / "inputs.pt")
    past = [tensor.to(dtype) for tensor in found["cache"]]
    first = [tensor[:, :, :1].clone() for tensor in past]
    return Inputs(found["prompt"], found["token"], past, first)


def _float(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).eval()
    return model


def _cache(model_config: Any, tensors: list[Tensor]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model_config)
    for layer, (keys, values) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        cache.update(keys, values, layer)
    return cache


def _contender(
    call: Callable[..., Any], config: Any, folder: Path, dtype: torch.dtype
) -> Contender:
    """A model that is called as transformers calls it."""

    def step(ids: Tensor, tensors: list[Tensor]) -> Tensor:
        with torch.no_grad():
            out = call(
                input_ids=ids,
                past_key_values=_cache(config, tensors),
                use_cache=True,
                logits_to_keep=1,
            )
        logits: Tensor = out.logits[0, -1].float()
        return logits

    return _steps(step, folder, dtype)


def _steps(
    step: Callable[[Tensor, list[Tensor]], Tensor], folder: Path, dtype: torch.dtype
) -> Contender:
    def decode() -> Tensor:
        given = inputs_of(folder, dtype)
        return step(given.token, given.cache)

    def prefill() -> Tensor:
        given = inputs_of(folder, dtype)
        return step(given.prompt, given.first)

    return Contender(decode, prefill)


def _eager(folder: Path, dtype: torch.dtype, *, compiled: bool = False) -> Contender:
    model = _float(folder, dtype)
    call = torch.compile(model) if compiled else model
    return _contender(call, model.config, folder, dtype)


def _quantize_dynamic(folder: Path) -> Contender:
    model = _float(folder)
    model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    return _contender(model, model.config, folder, torch.float32)


def _torchao(folder: Path, name: str, dtype: torch.dtype, *, compiled: bool = False) -> Contender:
    from torchao import quantization
    from torchao.prototype.quantization import int4

    configs = {
        "int8 dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
        "int8 weight-only": lambda: quantization.Int8WeightOnlyConfig(),
        "int4 weight-only": lambda: int4.PrototypeInt4WeightOnlyConfig(group_size=64),
        "int4, int8 dynamic": lambda: int4.Int8DynamicActivationInt4WeightConfig(group_size=64),
    }
    model = _float(folder, dtype)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    quantization.quantize_(model, configs[name]())
    call = torch.compile(model) if compiled else model
    return _contender(call, model.config, folder, dtype)


def _graphopt(folder: Path, name: str, target: str, dtype: torch.dtype) -> Contender:
    from transformers import AutoConfig

    import graphopt

    made = graphopt.load(folder / f"{name}.pt2", target=target)
    if any("torch target was kept" in note for note in made.report.notes):
        raise RuntimeError(made.report.notes[-1])
    config = AutoConfig.from_pretrained(folder / "model")
    return _contender(made, config, folder, dtype)


def _runtime(folder: Path, name: str) -> Contender:
    """Inputs stand in the order of the captured call: ids, and keys and values in turn."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(
        str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    names = [entry.name for entry in session.get_inputs()]

    def step(ids: Tensor, tensors: list[Tensor]) -> Tensor:
        feed = dict(zip(names, [t.numpy() for t in (ids, *tensors)], strict=True))
        return torch.from_numpy(session.run(None, feed)[0])[0, -1]

    return _steps(step, folder, torch.float32)


F32, BF16 = torch.float32, torch.bfloat16
CONTENDERS: dict[str, Callable[[Path], Contender]] = {
    "eager float32": partial(_eager, dtype=F32),
    "eager bfloat16": partial(_eager, dtype=BF16),
    "torch.compile float32": partial(_eager, dtype=F32, compiled=True),
    "torch.compile bfloat16": partial(_eager, dtype=BF16, compiled=True),
    "quantize_dynamic": _quantize_dynamic,
    "torchao int8 dynamic": partial(_torchao, name="int8 dynamic", dtype=F32),
    "torchao int8 dynamic, torch.compile": partial(
        _torchao, name="int8 dynamic", dtype=F32, compiled=True
    ),
    "torchao int8 weight-only, torch.compile": partial(
        _torchao, name="int8 weight-only", dtype=BF16, compiled=True
    ),
    "torchao int4 weight-only": partial(_torchao, name="int4 weight-only", dtype=BF16),
    "torchao int4 weight-only, torch.compile": partial(
        _torchao, name="int4 weight-only", dtype=BF16, compiled=True
    ),
    "torchao int4, int8 dynamic, torch.compile": partial(
        _torchao, name="int4, int8 dynamic", dtype=BF16, compiled=True
    ),
    "ONNX Runtime float32": partial(_runtime, name="plain"),
    "ONNX Runtime dynamic int8": partial(_runtime, name="plain-int8"),
    "ONNX Runtime MatMulNBits 4": partial(_runtime, name="plain-int4"),
    "graphopt int8": partial(_graphopt, name="int8", target="torch", dtype=F32),
    "graphopt int8, Inductor": partial(_graphopt, name="int8", target="inductor", dtype=F32),
    "graphopt int8, bfloat16 attention, Inductor": partial(
        _graphopt, name="int8-attention", target="inductor", dtype=F32
    ),
    "graphopt int8 of bfloat16, Inductor": partial(
        _graphopt, name="int8-half", target="inductor", dtype=BF16
    ),
    "graphopt int8, ONNX Runtime": partial(_runtime, name="int8"),
    "graphopt int8 weight-only": partial(
        _graphopt, name="int8-weights", target="torch", dtype=BF16
    ),
    "graphopt int4 weight-only": partial(_graphopt, name="int4-half", target="torch", dtype=BF16),
    "graphopt int4 weight-only, Inductor": partial(
        _graphopt, name="int4-half", target="inductor", dtype=BF16
    ),
    "graphopt int4 weight-only, ONNX Runtime": partial(_runtime, name="int4"),
}


def memory() -> dict[str, float]:
    """Megabytes of this process, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    found = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name in ("Rss", "Pss"):
            found[name] = round(int(rest.split()[0]) / 1024, 1)
    return found


def _libraries(name: str) -> None:
    """Imported before memory is measured, so that what is added by loading is the model."""
    import onnxruntime  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import graphopt.passes  # noqa: F401

    if name.startswith("torchao"):
        import torchao.quantization  # noqa: F401


def _timed(step: Step, times: int) -> list[float]:
    """Milliseconds of each of some calls, after one more."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        step()
        seconds.append((time.perf_counter() - start) * 1e3)
    return seconds[1:]


def _answer(command: str, contender: Contender) -> Any:
    if command == "memory":
        return memory()
    if command == "logits":
        return {"decode": contender.decode().tolist(), "prefill": contender.prefill().tolist()}
    if command == "decode":
        return _timed(contender.decode, 3)
    start = time.perf_counter()
    contender.prefill()
    return [(time.perf_counter() - start) * 1e3]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    name, folder = sys.argv[1], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr

    def say(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        _libraries(name)
        before, start = memory()["Rss"], time.perf_counter()
        contender = CONTENDERS[name](folder)
        seconds, now = round(time.perf_counter() - start, 1), memory()
        say({"seconds to load": seconds, "Rss of the model": round(now["Rss"] - before, 1), **now})
        for line in sys.stdin:
            say(_answer(line.strip(), contender))
    except Exception as error:
        said = [text.strip() for text in str(error).splitlines() if text.strip()] or [""]
        say({"error": f"{type(error).__name__}: {said[0]}"[:300]})


if __name__ == "__main__":
    main()
