"""Quantized products: a weight of the model in few bits, and activations in eight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from graphopt.kernels.quantized.scheme import Scheme
from graphopt.kernels.quantized.split import Beside
from graphopt.passes.quantize.factors import ScaleBeforeQuantizing
from graphopt.passes.quantize.layers import Kind, Layers, checked
from graphopt.passes.quantize.methods import Methods, methods
from graphopt.passes.quantize.names import Scope, Skip
from graphopt.passes.quantize.options import check_options
from graphopt.passes.quantize.plan import Settings
from graphopt.passes.quantize.products import SpellProducts
from graphopt.passes.quantize.rotation import rotating
from graphopt.passes.quantize.rotation_norms import recognised
from graphopt.passes.quantize.search import Search
from graphopt.passes.quantize.weights import QuantizeWeights
from graphopt.program import Program
from graphopt.rewrite import Pass, Rule
from graphopt.rewrite.passes import Settled, Trials

__all__ = ["QuantizeMatmul"]

SHARE, RANK = 0.01, 8
"""Defaults of `QuantizeMatmul.outliers` and `QuantizeMatmul.rank`."""


@dataclass(frozen=True)
class QuantizeMatmul(Pass):
    """Products with a weight of the model store it in few bits; lossy.

    Attributes:
        bits: of a weight: 8, 6, 4, 3 or 2. Of a sequence such as ``(2, 3, 4, 8)`` each weight gets
            one, so that the model is as near as it can be within ``size`` or ``latency``; without
            these, the smallest model is taken that `graphopt.compile` measures to stay within its
            ``budget`` of ``quality``. That needs calibration inputs. The report's recipe has what
            was chosen as ``layers``, and its trades what else there was.
        size: of all tensors that the model stores: bytes, ``"85MB"`` or ``"40%"`` of what they
            took before.
        latency: milliseconds that all products of matrices with these weights take together on
            the example inputs, as measured for each of them by itself.
        sensitivity: how the loss by each weight is estimated: ``"output"`` by the error of products
            on calibration inputs, where the gradient of the outputs says how much it counts;
            ``"hessian"`` by the error of the weight and the mean of the Hessian's diagonal (Dong et
            al. 2020, HAWQ-V2). See `sensitivity.choices`.
        activations: ``"dynamic"``: each row of activations becomes int8 as the model runs, and
            products are exact integers. ``"static"``: all of them by one scale and zero point for
            each tensor, found on calibration inputs, which this needs: no maximum is looked for as
            the model runs, but what lies outside of the range saturates. Where these show no range
            (experts they never reach), rows have their own. ``None``: weights only; activations
            stay as they are.
        ranges: of static activations: ``"mse"``, where the error of what is rounded and what is
            cut off is smallest (Nagel et al. 2021, section 3.1); ``"minmax"``, all that calibration
            inputs show; ``"percentile"``, all but one in ten thousand (Wu et al. 2020, section
            3.3), or a percentile such as 99.9. See `activation_ranges`.
        group_size: inputs that share a scale; default: all of an output channel.
        symmetric: groups without a zero point.
        dtype: what codes stand for: ``"int"``, or the tables ``"nf4"`` and ``"fp4"``, or ``"fp8"``,
            ``"mxfp4"``, ``"nvfp4"``.
        method: ``"rtn"`` rounds to nearest, below eight bits after a search for the range of each
            group; ``"hqq"`` optimises zero points (Badri & Shaji 2023); ``"gptq"`` makes the error
            of products on calibration inputs small (Frantar et al. 2023). ``"awq"`` and
            ``"smoothquant"`` scale channels before, which needs calibration inputs too.
            ``"outliers"`` keeps what suffers most in floats and ``"lowrank"`` adds a correction of
            low rank, both beside the product; the rest is rounded with them in view, by any of the
            others. They see what matters on calibration inputs, if there are any. ``"rotate"``
            turns the residual stream and the heads of attention into bases without outliers before
            all this, exactly (Ashkboos et al. 2024, QuaRot). Several are given as a sequence, or
            ``"rotate+gptq+outliers"``; the order of names means nothing. ``"learned"`` goes on
            from gptq, or from what it is joined to: all of a block is learned together, so that it
            gives on calibration inputs what it gave. ``"rtn+learned"`` and ``"hqq+learned"`` learn
            codes (Cheng et al. 2024, SignRound), and all of them scales and zero points.
            ``"adaround"`` and ``"flexround"`` learn codes in two other ways, from those of
            ``"rtn"`` or of what they are joined to, gptq too: whether each number is rounded up or
            down (Nagel et al. 2020), or what it is divided by before (Lee et al. 2023); and then
            scales and zero points. ``"norms"`` changes scales and shifts of norms at last, so that
            channels of a block's output have the means and variances that they had (Li et al.
            2023, Norm Tweaking).
            ``"propagate"`` moves each weight, before gptq rounds it, to what gives on the inputs
            that quantized layers before it leave what the weight gave on those of the float model
            (Arai & Ichikawa 2025, QEP), as far as that is seen to hold on other inputs.
        importance: what rows of calibration inputs count by, where a method weighs errors by the
            second moment of inputs (Sung et al. 2025, RSQ): ``"attention"``, how much attention
            their tokens get; ``"norm"``, their own length; ``"frequency"``, how rare their tokens
            are among calibration inputs; ``"first"``, whether they are in the first quarter of
            their sequence, or ``"first:64"`` among its first 64. Default: all count the same, as
            they do at products whose rows are no tokens that an attention looks at, or that a table
            is looked up by (the report says so).
        steps: of ``"learned"``, ``"adaround"`` and ``"flexround"``, for the codes and for the
            scales of a block each, and of ``"norms"``; default 100.
        outliers: how much of each weight ``"outliers"`` keeps: a share (0.01 if not given) or, from
            1 up, a count. Numbers that spikes of activations hang on (super weights, Yu et al.
            2024) are always kept where there are calibration inputs; with 0 they alone.
        outlier_kind: what is kept: ``"columns"``, whole inputs (OWQ, Lee et al. 2024), or single
            ``"numbers"`` (SqueezeLLM, Kim et al. 2024): about as near at the same size, but their
            product is sparse, and slower.
        rank: of the correction of ``"lowrank"`` (LoRC, Yao et al. 2023); 8 if not given.
        embeddings: store what embeddings look up in few bits too. A table that a head shares is
            stored once, and needs ``head`` besides.
        head: quantize a product that is an output of the model too.
        skip: weights to leave alone: patterns, as `fnmatch` reads them, of their names or of the
            modules that they lie in, such as ``"lm_head"`` or ``"model.layers.*.down_proj"``.
            Weights that were merged or folded are found by the names they had.
        layers: formats of weights that differ from the rest: a mapping from patterns, which are
            read as those of ``skip``, to fields of their own (``bits``, ``dtype``, ``group_size``,
            ``symmetric``, ``activations``), or to ``None`` or ``"float"``, which leaves weights as
            they are: ``{"model.layers.*.down_proj": {"bits": 8}, "lm_head": None}``. The first
            pattern that matches decides. Weights that are one tensor have one format.
        tolerance: largest relative error of a product; weights with which it is larger are kept.
            Default: two and a half times that of random weights in this format.

    Raises:
        ValueError: the fields do not go together; the message says what does.
    """

    bits: int | Sequence[int] = 8
    activations: Literal["dynamic", "static"] | None = "dynamic"
    group_size: int | None = None
    symmetric: bool = True
    dtype: Literal["int", "nf4", "fp4", "fp8", "mxfp4", "nvfp4"] = "int"
    method: str | Sequence[str] = "rtn"
    outliers: float | None = None
    outlier_kind: Literal["columns", "numbers"] = "columns"
    rank: int | None = None
    importance: str | None = None
    steps: int | None = None
    embeddings: bool = False
    head: bool = False
    skip: str | Sequence[str] = ()
    layers: Mapping[str, Mapping[str, Any] | str | None] = field(default_factory=dict, hash=False)
    tolerance: float | None = None
    size: int | str | None = None
    latency: float | None = None
    sensitivity: Literal["output", "hessian"] = "output"
    ranges: str | float = "mse"

    def __post_init__(self) -> None:
        bits = tuple(self.bits) if isinstance(self.bits, Sequence) else self.bits
        skip = (self.skip,) if isinstance(self.skip, str) else tuple(self.skip)
        for name, value in {"bits": bits, "skip": skip, "layers": checked(self.layers)}.items():
            object.__setattr__(self, name, value)
        check_options(self)

    @property
    def _methods(self) -> Methods:
        return methods(self.method)

    def defers(self) -> frozenset[str]:
        """Weights are nearer to what groups and rows of few bits can hold with the scales of norms
        where they are.

        SmolLM2-135M in four bits (groups of 64, rounded to nearest, head left): perplexity 29.8,
        and 44.2 with them folded into the weights; in int8 with rounded activations the cosine of
        logits is 0.995 and 0.988.
        """
        return frozenset({"FoldNormAffine"})

    @property
    def searches(self) -> bool:
        return not isinstance(self.bits, int)

    def settled(self, trials: Trials) -> Settled:
        return Search(self, trials).run()

    @property
    def each(self) -> list[QuantizeMatmul]:
        """The pass with each of its numbers of bits for all weights, from few to many."""
        if isinstance(self.bits, int):
            return [self]
        rest = {"size": None, "latency": None, "sensitivity": "output"}
        return [replace(self, bits=bits, **rest) for bits in sorted(self.bits)]  # type: ignore[arg-type]

    @property
    def scheme(self) -> Scheme:
        bits = self.bits if isinstance(self.bits, int) else max(self.bits)
        return Scheme(bits, self.dtype, self.group_size, self.symmetric)

    @property
    def formats(self) -> Layers:
        """Which format each weight has."""
        usual, alone = Kind(self.scheme, self.activations or "none"), self.each[-1]

        def kind(fields: Mapping[str, Any]) -> Kind:
            return replace(alone, layers={}, ranges="mse", **fields).formats.usual

        return Layers.of(usual, checked(self.layers), kind)

    @property
    def settings(self) -> Settings:
        return Settings(
            self.scheme,
            self._methods,
            self.activations or "none",
            beside=self._beside,
            steps=self.steps or Settings.steps,
            tolerance=self.tolerance,
            ranges=self.ranges,
            layers=self.formats if self.layers else None,
            importance=self.importance,
        )

    @property
    def _beside(self) -> Beside:
        kinds = self._methods.beside
        share = SHARE if self.outliers is None else self.outliers
        return Beside(
            share if "outliers" in kinds else None,
            self.outlier_kind,
            (self.rank or RANK) if "lowrank" in kinds else None,
        )

    @property
    def scope(self) -> Scope:
        return Scope(self.head, self.embeddings, Skip(tuple(self.skip)))

    def concede(self, program: Program) -> None:
        """Nothing; but patterns that mean nothing in this model are an error."""
        if program.frozen:
            self.scope.skip.check(program)
            self.formats.check(program)

    def stages(self) -> Sequence[Pass]:
        scaling, settings = self._methods.scaling, self.settings
        last = QuantizeWeights(self, settings, self.scope)
        stages: list[Pass] = [SpellProducts(self, settings, self.scope)]
        if self._methods.rotates:
            stages += rotating(self, last.matches)
        elif self._methods.tweaks:
            stages += recognised(self)
        if scaling is not None:
            stages.append(ScaleBeforeQuantizing(self, settings, scaling, last.matches))
        return (*stages, last)

    def rules(self) -> Sequence[Rule]:
        return [rule for stage in self.stages() for rule in stage.rules()]
