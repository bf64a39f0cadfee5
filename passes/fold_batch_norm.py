from dataclasses import dataclass

from graphopt.rewrite import Pass


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    def rules(self):
        return ()
