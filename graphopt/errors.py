"""The one exception family of graphopt: what happened, where, and what to do about it."""

from __future__ import annotations


class GraphoptError(Exception):
    """An error a person can act on.

    Args:
        what: what was found, and what was expected, in one sentence.
        where: the user's ``file:line``, or the file, node or option at fault.
        fix: what to change, or the option that lifts the refusal.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        lines = [what]
        if where:
            lines.append(f"  at: {where}")
        if fix:
            lines.append(f"  try: {fix}")
        super().__init__("\n".join(lines))


class CaptureError(GraphoptError):
    """The model could not be turned into one graph."""


class IllegalRewriteError(GraphoptError):
    """A rule asked for a graph that is not a legal program; always a bug in the rule."""


class VerificationError(GraphoptError):
    """A rewrite, or the whole result, does not compute what the original computes."""


class LoadError(GraphoptError):
    """A file was refused: unsafe, damaged, or not what its name says."""


class RecipeError(GraphoptError):
    """A recipe, pass name or pass option that does not exist or does not fit."""


class ExportError(GraphoptError):
    """The program could not be written in the requested format."""


class MissingDependencyError(GraphoptError):
    """An optional package that this feature stands on is not installed."""
