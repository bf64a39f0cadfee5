"""Rules that say, per operator, where an axis goes and whether the operator mixes along it.

Each module holds one family; importing this package fills the table `RULES`. A third party adds an
operator with `rule`.
"""

from graphopt.analysis.axis_rules import (
    advanced,
    attention,
    conv,
    creation,
    cuts,
    gathers,
    joins,
    losses,
    norms,
    pointwise,
    pool,
    products,
    reduce,
    scatters,
    views,
)
from graphopt.analysis.axis_rules.call import RULES, rule

__all__ = [
    "RULES", "advanced", "attention", "conv", "creation", "cuts", "gathers", "joins", "losses",
    "norms", "pointwise", "pool", "products", "reduce", "rule", "scatters", "views",
]  # fmt: skip
