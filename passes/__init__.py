"""The passes that come with graphopt: ``from graphopt.passes import MergeProjections``.

Names are loaded when first used; entry points of the group ``graphopt.passes`` list the same ones.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.passes.canonicalize import Canonicalize
    from graphopt.passes.composites import RecognizeComposites
    from graphopt.passes.fold_batch_norm import FoldBatchNorm
    from graphopt.passes.fold_norm_affine import FoldNormAffine
    from graphopt.passes.loss_head import FuseLossHead
    from graphopt.passes.merge_projections import MergeProjections
    from graphopt.passes.pre_rms_norm import PreRMSNorm
    from graphopt.passes.quantize import QuantizeMatmul
    from graphopt.passes.round_attention import RoundAttention
    from graphopt.passes.simplify import EliminateCommonSubexpressions, FoldConstants

_HOMES = {
    "Canonicalize": "canonicalize",
    "EliminateCommonSubexpressions": "simplify",
    "FoldBatchNorm": "fold_batch_norm",
    "FoldConstants": "simplify",
    "FoldNormAffine": "fold_norm_affine",
    "FuseLossHead": "loss_head",
    "MergeProjections": "merge_projections",
    "PreRMSNorm": "pre_rms_norm",
    "QuantizeMatmul": "quantize",
    "RecognizeComposites": "composites",
    "RoundAttention": "round_attention",
}

__all__ = [
    "Canonicalize",
    "EliminateCommonSubexpressions",
    "FoldBatchNorm",
    "FoldConstants",
    "FoldNormAffine",
    "FuseLossHead",
    "MergeProjections",
    "PreRMSNorm",
    "QuantizeMatmul",
    "RecognizeComposites",
    "RoundAttention",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
