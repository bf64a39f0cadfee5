"""One region at run time: torch tensors in, ONNX Runtime, torch tensors out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch.utils._sympy.printers import PythonPrinter

from graphopt.analysis.regions import Region
from graphopt.conditions import compiled
from graphopt.emit.folded import mark
from graphopt.emit.ort.models import RegionModel
from graphopt.emit.ort.programs import Place, places, symbols_in
from graphopt.emit.ort.sessions import Session, Settings, element_type
from graphopt.errors import GraphoptError
from graphopt.program import Program, val
from graphopt.room import extent


@dataclass(frozen=True)
class Result:
    """What is known of an output before it is computed.

    Attributes:
        sizes: numbers, or functions of the values of symbols; None where values decide them.
        order: dimensions from the outermost in memory, where they are not in order.
    """

    name: str
    dtype: torch.dtype
    device: torch.device
    sizes: tuple[int | Callable[..., int], ...] | None
    order: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """How the values of a call are laid out, in the order in which the graph gives them.

    Attributes:
        inputs: position -> name of the tensor in the model.
        weights: position -> name of the state that the session holds.
        sizes: symbol -> position of a tensor, and the dimension that it is the size of.
        results: what comes back.
        plain: how many of the values torch's graph takes.
    """

    inputs: tuple[tuple[int, str], ...]
    weights: tuple[tuple[int, str], ...]
    sizes: tuple[tuple[str, int, int], ...]
    results: tuple[Result, ...]
    plain: int


class OrtRegion(nn.Module):
    """A region in ONNX Runtime, called with what its graph reads: tensors, weights and sizes.

    It computes no gradients: a call in which autograd would record is an error. Under autocast or a
    transform of ``torch.func``, while it is traced, and on empty tensors, the region's own graph
    runs in torch instead, over the same weights. Calls from several threads do not disturb each
    other. Weights belong to the session: a call after one was written is an error.

    Args:
        plain: the region for torch.
        weights: the state that the model was made of, by name.
    """

    def __init__(
        self,
        plain: fx.GraphModule,
        model: RegionModel,
        settings: Settings,
        layout: Layout,
        weights: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.plain, self.layout = plain, layout
        self.model, self.settings, self.weights = model, settings, weights
        self.marks = {name: mark(tensor) for name, tensor in weights.items()}
        self.session = Session(model, settings)

    def forward(self, *values: Any) -> tuple[Any, ...]:
        """The region's outputs.

        Raises:
            GraphoptError: autograd would record the call, or a weight was written.
        """
        layout = self.layout
        if _in_torch(values, layout):
            return tuple(self.plain(*values[: layout.plain]))
        if torch.is_grad_enabled():
            _refuse_gradients(values)
        for position, name in layout.weights:
            self._check(name, values[position])
        return self._run(values)

    def _check(self, name: str, tensor: Tensor) -> None:
        if mark(tensor) != self.marks[name]:
            raise GraphoptError(
                f"{name} was written or moved after it was given to ONNX Runtime, which may still "
                "compute with its old value",
                fix="compile the model again; with target='torch' weights may be written",
            )

    def _run(self, values: Sequence[Any]) -> tuple[Any, ...]:
        session, results = self.session, self.layout.results
        binding = session.session.io_binding()
        kept = []  # what is bound has to live until the call is over
        for position, name in self.layout.inputs:
            if name in session.inputs:
                kept.append(values[position].contiguous())
                _bind(binding.bind_input, name, kept[-1])
        sizes = {symbol: values[at].shape[dim] for symbol, at, dim in self.layout.sizes}
        made = [_room(result, sizes) for result in results]
        for result, tensor in zip(results, made, strict=True):
            if tensor is None:
                binding.bind_output(result.name, result.device.type, result.device.index or 0)
            else:
                _bind(binding.bind_output, result.name, tensor)
        _wait_for(kept)
        session.session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if any(tensor is None for tensor in made):
            pairs = zip(made, binding.get_outputs(), results, strict=True)
            made = [_taken_over(g, r.dtype) if t is None else t for t, g, r in pairs]
        return tuple(map(_laid_out, made, results))

    def __deepcopy__(self, memo: dict[int, Any]) -> OrtRegion:
        """The same with a session of its own, over copies of the weights."""
        for name, tensor in self.weights.items():
            self._check(name, tensor)
        weights = {name: copy.deepcopy(tensor, memo) for name, tensor in self.weights.items()}
        model = self.model.over(self.weights, weights)
        plain = copy.deepcopy(self.plain, memo)
        memo[id(self)] = twin = OrtRegion(plain, model, self.settings, self.layout, weights)
        return twin.train(self.training)

    def extra_repr(self) -> str:
        return f"{len(self.layout.inputs)} inputs, {', '.join(self.settings.providers)}"


def layout_of(
    program: Program, region: Region, extra: Sequence[fx.Node], model: RegionModel
) -> Layout:
    """How `OrtRegion` is called: with ``region.inputs``, then ``extra``."""
    given = [*region.inputs, *extra]
    position = {node: index for index, node in enumerate(given)}
    constants = {n for n in given if program.is_constant(n)}
    users = [n for n in given if n not in constants and isinstance(val(n), Tensor)]
    known = places(users)
    sizes = tuple((str(s), position[node], dim) for s, (node, dim) in known.items())
    results = map(_result, model.outputs, region.outputs, [known] * len(region.outputs))
    return Layout(
        tuple(zip((position[n] for n in users), model.inputs, strict=True)),
        tuple((position[n], program.target_of(n) or "") for n in given if n in constants),
        sizes,
        tuple(results),
        len(region.inputs),
    )


def _result(name: str, node: fx.Node, known: dict[sympy.Symbol, Place]) -> Result:
    fake = val(node)
    sizes = tuple(map(_size, fake.shape)) if symbols_in(fake) <= known.keys() else None
    strides = [extent(stride) for stride in fake.stride()]
    order = tuple(sorted(range(fake.dim()), key=strides.__getitem__, reverse=True))
    in_order = order == tuple(range(fake.dim()))
    return Result(name, fake.dtype, fake.device, sizes, None if in_order else order)


def _size(size: Any) -> int | Callable[..., int]:
    if isinstance(size, int):
        return size
    names = sorted(map(str, size.node.expr.free_symbols))
    function = compiled(PythonPrinter().doprint(size.node.expr), names)
    return lambda sizes: int(function(**{name: sizes[name] for name in names}))


def _in_torch(values: Sequence[Any], layout: Layout) -> bool:
    """Whether the call is one that ONNX Runtime cannot take part in."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return True
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return True
    return any(values[position].numel() == 0 for position, _ in layout.inputs)


def _refuse_gradients(values: Sequence[Any]) -> None:
    if any(isinstance(v, Tensor) and v.requires_grad for v in values):
        raise GraphoptError(
            "a tensor that requires grad reaches a region in ONNX Runtime, which computes no "
            "gradients",
            fix="call the module under torch.no_grad(), detach its inputs, or compile it with "
            "target='torch'",
        )


def _bind(bind: Callable[..., None], name: str, tensor: Tensor) -> None:
    device, kind = tensor.device, element_type(tensor.dtype)
    bind(name, device.type, device.index or 0, kind, tuple(tensor.shape), tensor.data_ptr())


def _room(result: Result, sizes: dict[str, int]) -> Tensor | None:
    """Memory for a result; None where its sizes are not known, or it has no numbers."""
    if result.sizes is None:
        return None
    shape = [size if isinstance(size, int) else size(sizes) for size in result.sizes]
    return None if 0 in shape else torch.empty(shape, dtype=result.dtype, device=result.device)


def _wait_for(tensors: Sequence[Tensor]) -> None:
    """Let torch finish what ONNX Runtime reads, which does not know of torch's streams."""
    for device in {t.device for t in tensors if t.device.type == "cuda"}:
        torch.cuda.current_stream(device).synchronize()


def _taken_over(value: Any, dtype: torch.dtype) -> Tensor:
    """A result in the memory that ONNX Runtime gave it; a copy of it where that is an old one."""
    shares = hasattr(value, "__dlpack__")
    made = torch.from_dlpack(value) if shares else torch.from_numpy(value.numpy())
    return made if made.dtype is dtype else made.view(dtype)  # truth values may come as bytes


def _laid_out(tensor: Tensor, result: Result) -> Tensor:
    """With dimensions in the order in memory that the program's own value has: views may follow."""
    if result.order is None:
        return tensor
    back = sorted(range(tensor.dim()), key=result.order.__getitem__)
    return tensor.permute(result.order).contiguous().permute(back)
