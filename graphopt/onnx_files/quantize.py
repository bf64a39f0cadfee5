"""``QuantizeMatmul`` on ONNX files: weights of MatMul and Gemm in few bits, rounded as elsewhere.

Forms are those of `emit.onnx_quantized`, tried in ONNX Runtime on what each product reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graphopt.emit.onnx_quantized import notes_of
from graphopt.emit.onnx_quantized.alone import alone, difference
from graphopt.emit.onnx_quantized.calls import Call
from graphopt.emit.onnx_quantized.choosing import Choice, FormChooser, sample
from graphopt.emit.onnx_quantized.emitter import Emitter
from graphopt.emit.onnx_quantized.place import place
from graphopt.emit.onnx_quantized.slots import DOMAIN
from graphopt.errors import ExportError, GraphoptError, RecipeError
from graphopt.kernels.quantized import QuantizedWeight
from graphopt.onnx_files.document import tensor_bytes
from graphopt.onnx_files.numbers import held_tensor
from graphopt.onnx_files.products import Product, is_head, others, products, refusal
from graphopt.onnx_files.recording import recorded
from graphopt.onnx_files.steps import Allowed, Change, OnnxPass, Outcome, Surroundings, label
from graphopt.onnx_files.unused import remove_unused
from graphopt.onnx_files.values import as_tensor
from graphopt.onnx_types import dtype_name
from graphopt.passes.quantize import QuantizeMatmul
from graphopt.passes.quantize.layers import Kind
from graphopt.passes.quantize.linear import QuantizeLinear
from graphopt.passes.quantize.names import check_names, paths
from graphopt.passes.quantize.plan import Plan, rounded
from graphopt.report.model import MissedRewrite
from graphopt.report.quantized import QuantizedLayer

LOSS = 2.0
"""What outputs may be off by, times what products come to."""
NODES = 1024
"""Bytes of a file that the nodes and names of a form take, about."""
OLDEST = 13
"""The first operator set that any form is for."""


@dataclass(frozen=True)
class Made:
    """A weight in few bits.

    Attributes:
        bytes: of the weight in floats.
        error: relative RMS error of products with it, against float64 with the float weight.
    """

    bytes: int
    weight: QuantizedWeight
    choice: Choice
    error: float
    cosine: float | None


@dataclass(frozen=True)
class OnnxQuantizeMatmul(OnnxPass):
    """Products with a constant matrix store it in few bits; lossy.

    Attributes:
        step: the pass whose options these are.
        known: what became of each weight, by name; rounded once, however often the pass is applied.
        ranks: dimensions of the values that products read, by name.
    """

    step: QuantizeMatmul = field(default_factory=QuantizeMatmul)
    known: dict[str, Made | str] = field(default_factory=dict, compare=False, repr=False)
    ranks: dict[str, int] = field(default_factory=dict, compare=False, repr=False)

    lossy = True

    @property
    def name(self) -> str:
        return self.step.name

    def options(self) -> Mapping[str, Any]:
        return self.step.options()

    def apply(self, model: Any, around: Surroundings, allowed: Allowed) -> Outcome:
        version = model.opset_imports.get("", 1)
        if version < OLDEST:
            fix = f"convert it to {OLDEST} or later with onnx.version_converter"
            reason = f"the file has operator set {version}: {fix}"
            return Outcome(missed=[self.missed(_RULE, reason)])
        found = list(products(model))
        self._check_names(found)
        outcome = Outcome(missed=list(self._others(model, found)))
        wanted = [p for p in found if self._takes(p, found, outcome)]
        self._make(model, wanted, around)
        chosen = [p for p in wanted if self._holds(p, outcome) and allowed(p.name)]
        if chosen:
            self._write(model, chosen, outcome)
        return outcome

    def _check_names(self, found: list[Product]) -> None:
        names = [p.name for p in found]
        check_names("skip", self.step.skip, names, "the file")
        check_names("layers", self.step.layers, names, "the file")

    def _others(self, model: Any, found: list[Product]) -> list[MissedRewrite]:
        rows = others(model, found)
        return [self._left(reason, label(node), weight) for node, weight, reason in rows]

    def _left(self, reason: str, node: str, weight: str, option: str = "") -> MissedRewrite:
        return replace(self.missed(_RULE, reason, node, option=option), weights=(weight,))

    def _takes(self, product: Product, found: list[Product], outcome: Outcome) -> bool:
        """Whether nothing speaks against it so far; what does is noted."""
        reason, option = refusal(product, found), ""
        skipped = _pattern(self.step.skip, product.name)
        if not reason and skipped:
            reason, option = f"`{product.name}` is skipped by {skipped!r}", "QuantizeMatmul:skip"
        if not reason and self._kind(product.name) is None:
            reason, option = f"`{product.name}` is kept in float", "QuantizeMatmul:layers"
        mine = [p for p in found if p.source is product.source]
        if not reason and not self.step.head and any(map(is_head, mine)):
            reason = "an output of the model shows the product: errors of a head are its own"
            option = "QuantizeMatmul:head=True"
        if reason:
            outcome.missed.append(self._left(reason, label(product.node), product.name, option))
        return not reason

    def _kind(self, name: str) -> Kind | None:
        """The format of a weight; None where it is kept as it is."""
        formats = self.step.formats
        pattern = formats.first(name)
        return formats.usual if pattern is None else formats.patterns[pattern]

    def _make(self, model: Any, wanted: list[Product], around: Surroundings) -> None:
        """Round the weights that are not known yet, and choose forms for them."""
        new = [p for p in wanted if p.name not in self.known]
        if not new:
            return
        feeds = around.feeds.calibration or (around.feeds.first,)
        chooser = FormChooser(standard=False, opset=model.opset_imports[""], time=around.measure)
        readers: dict[str, list[Product]] = {}
        for product in new:
            readers.setdefault(str(product.x.name), []).append(product)
        for name, arrays in recorded(model, list(readers), feeds, external=around.external):
            given = [t for t in map(as_tensor, arrays) if t is not None and t.ndim]
            self.ranks[name] = max((t.ndim for t in given), default=0)
            for product in readers[name]:
                if product.name not in self.known:
                    around.progress(f"QuantizeMatmul: {product.name}")
                    self.known[product.name] = self._made(product, given, chooser)

    def _made(self, product: Product, given: list[Tensor], chooser: FormChooser) -> Made | str:
        """A weight in few bits with its form, or why there is none."""
        kind, matrix = self._kind(product.name), product.matrix()
        if kind is None or not given:
            return "its input is no tensor of floats"
        scheme = kind.scheme
        try:
            scheme.groups(matrix.shape[1])
        except ValueError as error:
            return str(error)
        weight = rounded(matrix, scheme, self.step.settings.methods, self._moment(given))
        held = held_tensor(product.source)
        saved = tensor_bytes(held) - sum(t.nbytes for t in weight.tensors.values())
        if saved < NODES:
            return f"few bits save {saved} bytes, less than the nodes around it take"
        rank = max(t.ndim for t in given)
        dtype = getattr(torch, dtype_name(int(held.dtype)))
        call = Call(product.name, False, weight, kind.activations, dtype, rank)
        x = sample(call, given[0])
        try:
            choice = chooser.choose(call, x)
        except ExportError as refused:
            return str(refused.what)
        off, cosine = _difference(choice, x, matrix, chooser.opset)
        limit = self._tolerance(kind)
        if off > limit:
            return f"error {off:.2g} of its products is above {limit:.2g}"
        return Made(tensor_bytes(held), weight, choice, off, cosine)

    def _moment(self, given: list[Tensor]) -> Tensor | None:
        """``sum x^T x`` over calibration inputs, for methods that learn from them."""
        if self.step.settings.methods.rounding != "gptq":
            return None
        rows = (t.reshape(-1, t.shape[-1]).to(torch.float32) for t in given)
        return torch.stack([r.t() @ r for r in rows]).sum(0)

    def _tolerance(self, kind: Kind) -> float:
        """The largest error of a product: as for captured models."""
        return QuantizeLinear(self.step.settings.of(kind), Plan()).tolerance

    def _holds(self, product: Product, outcome: Outcome) -> bool:
        made = self.known.get(product.name, "its input is not known")
        if isinstance(made, Made):
            return True
        option = "QuantizeMatmul:tolerance" if made.startswith("error ") else ""
        outcome.missed.append(self._left(made, label(product.node), product.name, option))
        return False

    def _choice(self, choice: Choice, product: Product) -> Choice:
        """For a product whose input has other dimensions than the one that was tried."""
        rank = self.ranks[str(product.x.name)]
        return replace(choice, call=replace(choice.call, rank=rank))

    def _write(self, model: Any, chosen: list[Product], outcome: Outcome) -> None:
        made = {p.name: found for p in chosen if isinstance(found := self.known[p.name], Made)}
        choices = [self._choice(made[p.name].choice, p) for p in chosen]
        for key, product in enumerate(chosen):
            _slot(model, product, key)
        place(model, choices)
        remove_unused(model)
        for name, found in made.items():
            mine = [p for p in chosen if p.name == name]
            bound = max(self._tolerance(k) for k in [self._kind(name)] if k is not None)
            outcome.changes.append(_change(model, name, mine, found, bound))
            outcome.layers.append(_layer(model, name, mine, found))
        total = math.hypot(*(found.error for found in made.values()))
        limits = (self._tolerance(kind) for name in made if (kind := self._kind(name)))
        outcome.allowed = min(1.0, max(LOSS * total, *limits))
        outcome.notes += notes_of([found.choice for found in made.values()])


_RULE = "quantize a product"


def onnx_quantize(step: QuantizeMatmul, where: str) -> OnnxQuantizeMatmul:
    """The pass on ONNX files.

    Raises:
        RecipeError: an option that an ONNX file has nothing for.
    """
    methods = step.settings.methods if not step.searches else None
    kinds = step.formats.kinds
    refused = {
        f"bits={step.bits}": (step.searches, "bits are searched on captured models"),
        "activations='static'": (
            any(kind.activations == "static" for kind in kinds),
            "ranges are found on captured models",
        ),
        f"method={step.method!r}": (
            methods is not None and (methods._replace(rounding="rtn") != _PLAIN),
            "it changes more than the weight; 'rtn', 'hqq' and 'gptq' round weights of a file",
        ),
        "embeddings=True": (step.embeddings, "look-ups stay as they are"),
        f"importance={step.importance!r}": (
            step.importance is not None,
            "what rows count by is seen on captured models",
        ),
        f"size={step.size!r}": (step.size is not None, "bits are searched on captured models"),
        f"latency={step.latency!r}": (step.latency is not None, "it goes with a search for bits"),
        f"sensitivity={step.sensitivity!r}": (
            step.sensitivity != "output",
            "it goes with a search for bits",
        ),
    }
    for option, (given, why) in refused.items():
        if given:
            raise RecipeError(
                f"QuantizeMatmul:{option} means nothing for an ONNX file: {why}",
                where=where,
                fix="leave it out, or optimize the model that the file was exported from",
            )
    return OnnxQuantizeMatmul(step)


_PLAIN = QuantizeMatmul().settings.methods


def check_calibration(step: OnnxPass, around: Surroundings) -> None:
    """Whether a method that learns from calibration inputs has some.

    Raises:
        GraphoptError: it has none.
    """
    needs = isinstance(step, OnnxQuantizeMatmul) and step.step.settings.methods.rounding == "gptq"
    if needs and not around.feeds.calibration:
        raise GraphoptError(
            "method gptq learns from calibration inputs, and there are none",
            where="QuantizeMatmul:method",
            fix="give some: --calibration FILE, in Python calibration=[{name: tensor}, ...]",
        )


def _pattern(patterns: Any, name: str) -> str:
    from fnmatch import fnmatchcase

    held = list(paths([name]))
    return next((p for p in patterns if any(fnmatchcase(path, p) for path in held)), "")


def _difference(
    choice: Choice, x: Tensor, matrix: Tensor, opset: int
) -> tuple[float, float | None]:
    """Relative RMS error and cosine of a form's product, against that with the float weight."""
    session = alone(choice.form, choice.call, x.ndim, x.dtype, opset)
    made = torch.from_numpy(session.run(None, {"x": x.numpy()})[0]).double()
    wanted = x.double() @ matrix.double().t()
    error, _ = difference(made, wanted)
    norm = float(made.norm() * wanted.norm())
    return error, float((made * wanted).sum()) / norm if norm else None


def _slot(model: Any, product: Product, key: int) -> None:
    """A box in place of the product, and its bias as an addition."""
    import onnx_ir

    emit, old = Emitter(), product.result
    made = emit("Slot", product.x, domain=DOMAIN, key=key)
    made.type, made.shape = old.type, old.shape
    if product.bias is not None:
        made = emit("Add", made, _bias(model, product, emit))
        made.type, made.shape = old.type, old.shape
    onnx_ir.convenience.replace_nodes_and_values(
        model.graph, product.node, [product.node], emit.nodes, [old], [made]
    )


def _bias(model: Any, product: Product, emit: Emitter) -> Any:
    import onnx_ir

    if product.share == 1:
        return product.bias
    name, dtype = f"{product.bias.name}.share", held_tensor(product.source).dtype
    if name not in model.graph.initializers:
        import numpy as np

        held = onnx_ir.tensor(np.array(product.share, dtype.numpy()), name=name)
        value = onnx_ir.Value(
            name=name, shape=held.shape, type=onnx_ir.TensorType(dtype), const_value=held
        )
        model.graph.register_initializer(value)
    return emit("Mul", product.bias, model.graph.initializers[name])


def _change(model: Any, name: str, mine: list[Product], found: Made, bound: float) -> Change:
    """What reads the codes is what was made of the products."""
    removed = tuple(label(p.node) for p in mine)
    held = {v for n, v in model.graph.initializers.items() if n.startswith(f"{name}.")}
    added = tuple(label(n) for n in model.graph if held & {v for v in n.inputs if v is not None})
    rule = f"quantize to {found.weight.scheme.bits} bits"
    return Change(name, rule, removed, added, error=found.error, bound=bound)


def _layer(model: Any, name: str, mine: list[Product], found: Made) -> QuantizedLayer:
    scheme, error = found.weight.scheme, found.error
    held = [v for n, v in model.graph.initializers.items() if n.startswith(f"{name}.")]
    return QuantizedLayer(
        names=(name,),
        node=label(mine[0].node),
        operators=("linear",),
        shape=tuple(found.weight.shape),
        dtype=scheme.dtype,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        activations=found.choice.call.activations,
        bytes_before=found.bytes,
        bytes_after=sum(tensor_bytes(v.const_value) for v in held),
        error=error,
        sqnr=-20 * math.log10(error) if error else None,
        cosine=found.cosine,
        note=found.choice.form.name,
    )
