"""From a rewritten program back to the parameters of the model that it was captured from."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.errors import ExportError
from graphopt.interchange.folder import is_linear, sizes
from graphopt.interchange.modules import QuantizedEmbedding, QuantizedLinear
from graphopt.kernels.quantized import QuantizedWeight, Scheme, Static
from graphopt.kernels.quantized.remainder import weight_beside
from graphopt.kernels.quantized.static import static_of
from graphopt.kernels.quantized.weight import OPERANDS
from graphopt.program import Program
from graphopt.rewrite import arguments

aten, ops = torch.ops.aten, torch.ops.graphopt
ALONE = "quantize the model as it is: passes=[QuantizeMatmul(...)], and no other pass"
_FOLDED = re.compile(r"(_folded(_\d+)?)+$")


@dataclass(frozen=True)
class Product:
    """A quantized linear layer of the model."""

    weight: QuantizedWeight
    activations: str
    bias: Tensor | None
    order: Tensor | None = None
    static: Static | None = None


@dataclass
class Recovered:
    """Parameters of the model as the program has them, by the names of the model.

    Attributes:
        products: quantized layers, by the name of the module.
        floats: all other parameters and buffers that are saved.
    """

    products: dict[str, Product] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def recovered(program: Program, model: nn.Module) -> Recovered:
    """What a program computes with, as parameters of ``model``.

    Merged projections are taken apart, and folded weights stand under the names of those that they
    replace; norms whose scales were folded into others get neutral ones.

    Raises:
        ExportError: something has no place among the parameters of the model.
    """
    return _Recovery(program, model).run()


class _Recovery:
    def __init__(self, program: Program, model: nn.Module) -> None:
        self.program, self.found = program, Recovered()
        self.modules = dict(model.named_modules())
        self.saved: dict[str, Tensor] = dict(model.state_dict())
        self.kinds = (QuantizedLinear, QuantizedEmbedding)
        self.placed: set[str] = set()
        """Names of the program's state that stand under a name of the model."""

    def run(self) -> Recovered:
        self._refuse_remainders()
        for node in self.program.graph.nodes:
            if node.target is ops.quantized_linear.default:
                self._quantized(node)
            elif node.target is aten.linear.default:
                self._float(node)
            elif node.target is ops.quantized_embedding.default:
                self._table(node)
        self._folded_elsewhere()
        self._rest()
        return self.found

    def _refuse_remainders(self) -> None:
        """What stands beside codes would be lost without a word."""
        for name in self.program.state:
            if (weight := weight_beside(name, self.program.state)) is not None:
                raise ExportError(
                    f"{weight} has numbers beside its codes ({name}): the formats of checkpoints "
                    "have no place for them",
                    where=weight,
                    fix="quantize without the methods outliers and lowrank, or save a .pt2",
                )

    def _quantized(self, node: fx.Node) -> None:
        given = arguments(node)
        if given.get("layout", "plain") != "plain":
            raise ExportError(f"`{node.name}` has a weight laid out for this machine", fix=ALONE)
        weight, names = self._weight(node, given), self._weight_names(given["codes"])
        parts = self._parts(names, weight.shape[0])
        bias = self._split_bias(given["bias"], [rows for _, rows in parts], node)
        start = 0
        for (module, rows), part in zip(parts, bias, strict=True):
            self._check_fits(module, rows, weight.width, node)
            old = self.modules[module]
            order = old.order if isinstance(old, QuantizedLinear) else None
            piece = weight.select(slice(start, start + rows))
            part = self._own_bias(module, part, node)
            kind: Any = given["activations"]
            self.found.products[module] = Product(piece, kind, part, order, static_of(given))  # type: ignore[arg-type]
            start += rows

    def _weight(self, node: fx.Node, given: Mapping[str, Any]) -> QuantizedWeight:
        codes, scales, zeros, outer = (self._state(given[n], node) for n in OPERANDS)
        assert codes is not None and scales is not None
        scheme = Scheme(*(given[n] for n in ("bits", "dtype", "group_size", "symmetric")))
        width = given.get("width") or node.args[0].meta["val"].shape[-1]  # type: ignore[union-attr]
        return QuantizedWeight(scheme, int(width), codes, scales, zeros, outer)

    def _state(self, value: Any, node: fx.Node) -> Tensor | None:
        if value is None:
            return None
        name = self.program.target_of(value) if isinstance(value, fx.Node) else None
        if name is None:
            raise ExportError(f"`{node.name}` computes its weights as it runs", fix=ALONE)
        self.placed.add(name)
        return self.program.state[name].detach()

    def _weight_names(self, codes: fx.Node) -> list[str]:
        """Names of the weight that was quantized: several where it is tied."""
        name, state = str(self.program.target_of(codes)), self.program.state
        named = [name, *(other for other in state if state[other] is state[name])]
        weights = [n.removesuffix("_codes") for n in named]
        return list(dict.fromkeys([*weights, *self._tied(weights[0])]))

    def _tied(self, name: str) -> list[str]:
        """Other names in the model of one of its tensors."""
        held = self.saved.get(name)
        if held is None:
            return []
        return [n for n, t in self.saved.items() if n != name and _is_same(t, held)]

    def _parts(self, names: list[str], rows: int) -> list[tuple[str, int]]:
        """Modules whose weights, one below the other, are the state of these names, and their rows.

        Raises:
            ExportError: it is no weight of the model, nor made of some.
        """
        for name in names:
            parts = list(self._resolve(name))
            if parts and sum(count for _, count in parts) == rows:
                return parts
        raise ExportError(
            f"{names[0]} ({rows} rows) is no weight of the model, nor linear layers merged",
            where=names[0],
            fix=ALONE,
        )

    def _resolve(self, name: str) -> Iterator[tuple[str, int]]:
        module = name.removesuffix(".weight")
        if module in self.modules and name != module and self._is_product(module):
            yield module, self._rows(module)
        elif name in self.program.origins:
            operator, sources, _ = self.program.origins[name]
            resolved = [list(self._resolve(source)) for source in sources]
            chosen = resolved if operator == "aten.cat" else [r for r in resolved if r][:1]
            for parts in chosen:
                yield from parts
        elif (base := _FOLDED.sub("", name)) != name:
            yield from self._resolve(base)

    def _is_product(self, module: str) -> bool:
        old = self.modules[module]
        return is_linear(old) or isinstance(old, QuantizedLinear)

    def _rows(self, module: str) -> int:
        old = self.modules[module]
        return old.out_features if isinstance(old, QuantizedLinear) else sizes(old)[0]

    def _check_fits(self, module: str, rows: int, width: int, node: fx.Node) -> None:
        old = self.modules[module]
        inputs = old.in_features if isinstance(old, QuantizedLinear) else sizes(old)[1]
        if module in self.found.products or inputs != width:
            raise ExportError(
                f"`{node.name}` ({rows} x {width}) does not stand in the place of {module}",
                where=module,
                fix=ALONE,
            )

    def _split_bias(self, given: Any, rows: list[int], node: fx.Node) -> list[Tensor | None]:
        bias = self._state(given, node)
        return [None] * len(rows) if bias is None else list(bias.split(rows))

    def _own_bias(self, module: str, bias: Tensor | None, node: fx.Node) -> Tensor | None:
        """The bias as the module can have it: zeros where merging filled it up are left out."""
        has = getattr(self.modules[module], "bias", None) is not None
        if bias is None and has:
            return torch.zeros_like(self.modules[module].bias)  # type: ignore[arg-type]
        if bias is None or has:
            return bias
        if bias.count_nonzero():
            raise ExportError(
                f"{module} has no bias in the model, and `{node.name}` needs one: another layer's "
                "shift was folded into it",
                where=module,
                fix=ALONE,
            )
        return None

    def _float(self, node: fx.Node) -> None:
        """A float product: what was folded or merged stands under the names of the modules."""
        given = arguments(node)
        name = self.program.target_of(given["weight"])
        if name is None or name in self.saved:
            return
        weight = self.program.state[name].detach()
        parts = list(self._resolve(name))
        if sum(rows for _, rows in parts) != weight.shape[0]:
            return  # a constant of the graph that is no parameter
        self.placed.add(name)
        split = self._split_bias(given["bias"], [rows for _, rows in parts], node)
        for (module, rows), part, bias in zip(
            parts, weight.split([rows for _, rows in parts]), split, strict=True
        ):
            self._check_fits(module, rows, weight.shape[1], node)
            transposed = self.saved[f"{module}.weight"].shape != part.shape
            self.found.floats[f"{module}.weight"] = part.t() if transposed else part
            if (bias := self._own_bias(module, bias, node)) is not None:
                self.found.floats[f"{module}.bias"] = bias

    def _table(self, node: fx.Node) -> None:
        given = arguments(node)
        modules = [n.removesuffix(".weight") for n in self._weight_names(given["codes"])]
        tables = (nn.Embedding, QuantizedEmbedding)
        module = next((m for m in modules if isinstance(self.modules.get(m), tables)), None)
        if module is None:
            what = f"{modules[0]} is no embedding of the model"
            raise ExportError(what, where=modules[0], fix=ALONE)
        numbers = self._weight(node, given).dequantize(given["out_dtype"])
        self.found.floats[f"{module}.weight"] = numbers
        self.found.notes.append(
            f"{module} is written dequantized: formats of linear layers hold no embedding"
        )

    def _folded_elsewhere(self) -> None:
        """Folded norms, embeddings and the like, which keep the name of what they replace."""
        for name, value in self.program.state.items():
            base = _FOLDED.sub("", name)
            if base == name or name in self.placed or base in self.found.floats:
                continue
            if base in self.saved and self.saved[base].shape == value.shape:
                self.found.floats[base] = value.detach()

    def _rest(self) -> None:
        held = tuple(f"{module}." for module in self.found.products)
        made = (o for o in self.program.origins.values() if o.operator)
        folded = {source for origin in made for source in origin.sources}
        for name, value in self.saved.items():
            if name in self.found.floats or name.startswith(held) or self._is_stored(name):
                continue
            if name in self.program.state:
                self.found.floats[name] = self.program.state[name].detach()
            elif name in folded:
                self.found.floats[name] = self._neutral(name, value)
            else:  # nothing of it is in the program
                self.found.floats[name] = value

    def _is_stored(self, name: str) -> bool:
        return isinstance(self.modules.get(name.rpartition(".")[0]), self.kinds)

    def _neutral(self, name: str, value: Tensor) -> Tensor:
        """A scale or shift of a norm without effect: what it did was folded into other weights."""
        module, _, leaf = name.rpartition(".")
        if leaf == "bias" and value.dim() == 1:
            return torch.zeros_like(value)
        for number in (1.0, 0.0) if value.dim() == 1 else ():
            if _keeps_scale(self.modules[module], leaf, number, value):
                return torch.full_like(value, number)
        raise ExportError(
            f"{name} was folded into other weights, and nothing can stand for it",
            where=name,
            fix=ALONE,
        )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same memory."""
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.numel() > 0


def _keeps_scale(norm: nn.Module, leaf: str, number: float, like: Tensor) -> bool:
    """Whether a norm whose scale is ``number`` everywhere gives numbers of mean square 1."""
    twin = copy.deepcopy(norm).float()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.fill_(number if name == leaf else 0.0)
        x = torch.randn(4, len(like), generator=torch.Generator().manual_seed(0))
        try:
            made = twin(x)
        except Exception:
            return False
    return isinstance(made, Tensor) and abs(float(made.square().mean()) - 1) < 0.01
