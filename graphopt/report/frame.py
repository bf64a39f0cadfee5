"""What every page is: one file with its own style and script, which loads nothing."""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from string import Template

from graphopt.report.markup import Markup, join, tag


def framed(title: str, body: str, script: str = "") -> str:
    """A page whose policy lets no script run but its own, and loads nothing from anywhere.

    Args:
        body: HTML, as `filled` and `tag` make it.
        script: JavaScript that runs behind the body.
    """
    own = join("\n", tag("script", Markup(script))) if script else Markup()
    return filled(
        "frame.html",
        policy=_policy(script),
        title=join(title),
        style=file_text("page.css"),
        body=join(Markup(body.rstrip("\n")), own),
    )


def filled(name: str, **parts: str) -> Markup:
    """A template of this package; parts are HTML already."""
    return Markup(Template(file_text(name)).substitute(parts))


def file_text(name: str) -> str:
    """A file of this package."""
    return resources.files("graphopt.report").joinpath(name).read_text(encoding="utf-8")


def _policy(script: str) -> str:
    """The page's own script by its hash; no other."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    own = [f"script-src 'sha256-{digest}'"] if script else []
    rest = ["style-src 'unsafe-inline'", "base-uri 'none'", "form-action 'none'"]
    return "; ".join(["default-src 'none'", *own, *rest])
