from dataclasses import dataclass

from graphopt.rewrite import Pass


@dataclass(frozen=True)
class RecognizeComposites(Pass):
    def rules(self):
        return ()
