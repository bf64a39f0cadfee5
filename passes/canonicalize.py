from dataclasses import dataclass

from graphopt.rewrite import Pass


@dataclass(frozen=True)
class Canonicalize(Pass):
    def rules(self):
        return ()
