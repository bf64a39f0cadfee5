"""Weight-only quantization of a causal language model by other libraries, in place."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.models import smollm2
from graphopt.emit.onnx_runtime import open_session
from graphopt.emit.onnx_translate import quiet
from graphopt.kernels.quantized import Scheme, quantize

Sequences = list[Tensor]
Logits = Callable[[Tensor], Tensor]


class Format(NamedTuple):
    """Integers with a scale per group of inputs, or per output channel."""

    bits: int
    group_size: int | None
    symmetric: bool


def logits_of(model: nn.Module) -> Logits:
    return lambda ids: model(ids).logits


def nearest(model: nn.Module, format_: Format, _text: Sequences) -> Logits:
    """Round-to-nearest on the whole range of each group: what every method is for."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lm_head" not in name:
            scheme = Scheme(format_.bits, "int", format_.group_size, format_.symmetric)
            stored = quantize(module.weight, scheme).dequantize().to(module.weight.dtype)
            module.weight = nn.Parameter(stored, requires_grad=False)
    return logits_of(model)


def torchao_hqq(model: nn.Module, format_: Format, _text: Sequences) -> Logits:
    """torchao 0.18 searches scales as HQQ does; it has no zero points with that."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_
    from torchao.quantization.quant_api import IntxChooseQParamsAlgorithm

    size = format_.group_size
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{format_.bits}"),
        granularity=PerAxis(0) if size is None else PerGroup(size),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    quantize_(model, config, lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)
    for module in model.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return logits_of(model)


def auto_round(model: nn.Module, format_: Format, text: Sequences) -> Logits:
    """SignRound's own defaults but 100 steps instead of 200, on the same sequences."""
    from auto_round import AutoRound

    loaded = smollm2()
    assert loaded is not None
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in text]
    rounder = AutoRound(
        model, loaded[1], bits=format_.bits, group_size=format_.group_size or -1,
        sym=format_.symmetric, iters=100, nsamples=len(text), seqlen=text[0].shape[1],
        batch_size=4, dataset=data, device_map="cpu", enable_torch_compile=False,
    )  # fmt: skip
    made, _ = rounder.quantize()
    return logits_of(made.bfloat16())


def onnxruntime_hqq(model: nn.Module, format_: Format, _text: Sequences) -> Logits:
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    if format_.group_size is None:
        raise ValueError("it has groups of powers of two alone")
    return _onnxruntime(
        model, nbits.HQQWeightOnlyQuantConfig(block_size=format_.group_size, bits=format_.bits)
    )


def onnxruntime_gptq(model: nn.Module, format_: Format, text: Sequences) -> Logits:
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    if format_.bits != 4 or format_.group_size is None:
        raise ValueError("its GPTQ has 4 bits and groups of powers of two alone")

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(text)

        def get_next(self) -> dict[str, Any] | None:
            ids = next(self.left, None)
            return None if ids is None else {"input_ids": ids.numpy()}

    config = nbits.GPTQWeightOnlyQuantConfig(
        calibration_data_reader=Reader(), block_size=format_.group_size, actorder=False
    )
    return _onnxruntime(model, config)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids).logits


def _onnxruntime(model: nn.Module, config: Any) -> Logits:
    """Every product but the head's by ONNX Runtime's quantizer, run in its session."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with tempfile.TemporaryDirectory() as folder:
        plain, small = Path(folder, "plain.onnx"), Path(folder, "small.onnx")
        with quiet():
            torch.onnx.export(
                _Logits(model.float()), (torch.ones(1, 16, dtype=torch.long),), dynamo=True,
                verbose=False, input_names=["input_ids"],
                dynamic_shapes={"input_ids": {1: torch.export.Dim.DYNAMIC}},
            ).save(plain)  # fmt: skip
        graph = onnx.load(plain)
        output = graph.graph.output[0].name
        heads = [n.name for n in graph.graph.node if output in n.output]
        quantizer = MatMulNBitsQuantizer(
            graph, algo_config=config, nodes_to_exclude=heads, block_size=config.block_size,
            is_symmetric=False,
        )  # fmt: skip
        quantizer.process()
        quantizer.model.save_model_to_file(str(small), use_external_data_format=True)
        session = open_session(small)
    return lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])


PEERS: dict[str, Callable[[nn.Module, Format, Sequences], Logits]] = {
    "round to nearest": nearest,
    "torchao HQQ": torchao_hqq,
    "ONNX Runtime HQQ": onnxruntime_hqq,
    "ONNX Runtime GPTQ": onnxruntime_gptq,
    "auto-round": auto_round,
}
